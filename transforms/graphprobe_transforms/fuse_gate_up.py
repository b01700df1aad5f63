"""The two projections of a gated MLP become one linear with the weights stacked, and a split of its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from graphprobe.pipeline import NotApplied, Outcome
from graphprobe_transforms import graphs, matching
from graphprobe_transforms.graphs import arg, aten, is_call
from graphprobe_transforms.stacking import obstacle, parent, stack

_ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default)


@dataclass(frozen=True)
class FuseGateUp:
    """Fuse the gate and up projections of a gated MLP; `where` is a glob on the module path of the MLP.

    Tried on llama, qwen2, qwen3 and mistral; gpt2 and bert have no gate.
    """

    where: str = "*"
    name: ClassVar[str] = "fuse_gate_up"
    stage: ClassVar[str] = "post_load_fusion"
    makes: ClassVar[tuple[str, ...]] = ("aten.split_with_sizes.default",)

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        found = {product: pair for product in gm.graph.nodes if (pair := gate_and_up(product)) is not None}
        products = [product for product, (gate, _) in found.items() if graphs.is_at(parent(gate), self.where)]
        return matching.rewrite(
            gm,
            products,
            match,
            lambda gm, pair: stack(gm, pair, "gate_up_proj"),
            f"no activation of a linear is multiplied with another linear in a module that matches {self.where!r}",
        )


def gate_and_up(product: Node) -> tuple[Node, Node] | None:
    """Return (gate, up) where the node is activation(gate) * up of two linears."""
    if not is_call(product, aten.mul.Tensor):
        return None
    for active, up in ((arg(product, 0), arg(product, 1)), (arg(product, 1), arg(product, 0))):
        gate = arg(active, 0) if is_call(active, *_ACTIVATIONS) else None
        if is_call(gate, aten.linear.default) and is_call(up, aten.linear.default):
            return gate, up
    return None


def match(product: Node) -> tuple[Node, ...] | NotApplied:
    """Return the two linears in the order of the graph, or say why they cannot be stacked."""
    found = gate_and_up(product)
    if found is None:
        return NotApplied("its projections went into another product", product.name)
    gate, up = found
    if gate is up:
        return NotApplied("gate and up are one projection", gate.name)
    if arg(gate, 0) is not arg(up, 0):
        return NotApplied("gate and up projection have different inputs", gate.name)
    pair = (gate, up) if gate < up else (up, gate)
    why = obstacle(pair)
    return NotApplied(why, gate.name) if why else pair

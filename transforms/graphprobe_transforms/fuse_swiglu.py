"""silu(gate) * up becomes one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from graphprobe.pipeline import NotApplied, Outcome
from graphprobe_transforms import graphs, matching, ops
from graphprobe_transforms.graphs import arg, aten, is_call

assert ops.NAMESPACE  # importing it registers the operators


@dataclass(frozen=True)
class _Match:
    """product = silu(gate) * up."""

    gate: Node
    up: Node
    silu: Node
    product: Node


@dataclass(frozen=True)
class FuseSwiGlu:
    """Fuse the activation and the product of SwiGLU; `where` is a glob on the module path of the product.

    Tried on llama, qwen2, qwen3 and mistral; gpt2 and bert have none.
    """

    where: str = "*"
    name: ClassVar[str] = "fuse_swiglu"
    stage: ClassVar[str] = "post_load_fusion"
    makes: ClassVar[tuple[str, ...]] = ("graphprobe_transforms.silu_mul.default",)

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        products = [n for n in matching.anchors(gm, self.where, aten.mul.Tensor) if _silu_of(n) is not None]
        return matching.rewrite(
            gm, products, match, _fuse, f"nothing is multiplied with aten.silu in a module that matches {self.where!r}"
        )


def _silu_of(product: Node) -> Node | None:
    return next((n for n in product.all_input_nodes if is_call(n, aten.silu.default)), None)


def match(product: Node) -> _Match | NotApplied:
    """Match the gate around one product, or say what is in the way."""
    silu = _silu_of(product)
    assert silu is not None
    up = arg(product, 1) if arg(product, 0) is silu else arg(product, 0)
    gate = arg(silu, 0)
    if not isinstance(up, Node) or up is silu:
        return NotApplied("the activation is not multiplied with another value", product.name)
    if len(graphs.users(silu)) != 1:
        return NotApplied("the activation is used elsewhere", silu.name)
    if lost := matching.unknown(gate, up):
        return lost
    if not graphs.same_kind(graphs.tensor(gate), graphs.tensor(up)):
        return NotApplied("gate and up have different shapes or dtypes", product.name)
    return _Match(gate, up, silu, product)


def _fuse(gm: GraphModule, m: _Match) -> list[Node]:
    target = torch.ops.graphprobe_transforms.silu_mul.default
    fused = graphs.insert(m.product, target, (m.gate, m.up), like=m.product)
    graphs.replace(m.product, fused)
    graphs.erase_unused([m.silu])
    return [fused]

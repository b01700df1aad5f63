"""Transforms for the tests of bisection: honest ones, planted bugs, and pairs that are wrong only together."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

import graphprobe
from graphprobe import provenance
from graphprobe.bisection.records import Bisection
from graphprobe.pipeline import Applied, Outcome, Pipeline, Transform

aten = torch.ops.aten
HONEST = ("fuse_rmsnorm", "fuse_qkv", "eager_attention_to_sdpa")


# --- the demo's pipeline with a bug in it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug:
    """A change of one node that an honest transform has made."""

    host: str  # the transform it is planted in
    target: object  # the operator of the node that it changes
    change: Callable[[GraphModule, Node], None]


def wrong_eps(gm: GraphModule, node: Node) -> None:
    node.update_arg(3, 1.5 * float(node.args[3]) + 1e-3)  # type: ignore[arg-type]


def weight_of_another(gm: GraphModule, node: Node) -> None:
    last = list(gm.graph.find_nodes(op="call_function", target=node.target))[-1]
    node.update_arg(2, last.args[2])
    node.prepend(last.args[2])  # type: ignore[arg-type]


def parts_swapped(gm: GraphModule, node: Node) -> None:
    for user in node.users:
        user.update_arg(1, (0, 2, 1)[user.args[1]])  # type: ignore[index, call-overload]


def scale_off(gm: GraphModule, node: Node) -> None:
    node.update_kwarg("scale", 1.001 * float(node.kwargs["scale"]))  # type: ignore[arg-type]


def mask_lost(gm: GraphModule, node: Node) -> None:
    node.update_kwarg("attn_mask", None)


def row_scaled(gm: GraphModule, node: Node) -> None:
    """Spoil one row of the fused weight."""
    (linear,) = node.all_input_nodes
    weight = gm.get_parameter(str(linear.args[1].target))  # type: ignore[union-attr]
    with torch.no_grad():
        weight[5] *= 1.1


def keys_for_values(gm: GraphModule, node: Node) -> None:
    node.update_arg(2, node.args[1])


BUGS = (
    Bug("fuse_rmsnorm", aten.rms_norm.default, wrong_eps),
    Bug("fuse_rmsnorm", aten.rms_norm.default, weight_of_another),
    Bug("fuse_qkv", aten.split_with_sizes.default, parts_swapped),
    Bug("fuse_qkv", aten.split_with_sizes.default, row_scaled),
    Bug("eager_attention_to_sdpa", aten.scaled_dot_product_attention.default, scale_off),
    Bug("eager_attention_to_sdpa", aten.scaled_dot_product_attention.default, keys_for_values),
    Bug("eager_attention_to_sdpa", aten.scaled_dot_product_attention.default, mask_lost),
)


@dataclass(frozen=True)
class Planted:
    """An honest transform with a bug in one layer; it says that it is the honest one."""

    bug: Bug
    layer: int
    stage: str = "post_load_fusion"

    @property
    def name(self) -> str:
        return self.bug.host

    def apply(self, gm: GraphModule) -> Outcome:
        (honest,) = Pipeline.parse(self.bug.host).transforms
        outcome = honest.apply(gm)
        node = next(
            n
            for n in gm.graph.nodes
            if n.target is self.bug.target and f".layers.{self.layer}." in provenance.module_path(n)
        )
        self.bug.change(gm, node)
        assert isinstance(outcome, Applied)
        return outcome


@functools.cache
def deep_llama(layers: int) -> tuple[GraphModule, tuple[object, ...], dict[str, object]]:
    """Capture a Llama of so many small layers, with attention written out. Do not change it."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(**sizes, **heads, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(3, 64, (1, 8))
    kwargs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    return graphprobe.capture(model, (), kwargs), (), kwargs


def planted(bug: Bug, layer: int) -> list[Transform]:
    """Return the demo's pipeline with the bug in the layer."""
    honest = Pipeline.parse(",".join(HONEST)).transforms
    return [Planted(bug, layer) if t.name == bug.host else t for t in honest]


# --- a chain of five functions, and transforms of it -----------------------------------------------------------------


class Chain(nn.Module):
    """y = tanh(relu(sin(...))): one operation after the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.relu(torch.sin(torch.cos(x)) + 0.5))


def chain() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Chain().eval(), (torch.randn(4, 6),)


def search(*pipeline: Any, **options: Any) -> Bisection:
    model, args = chain()
    return graphprobe.bisect(model, args, pipeline=list(pipeline), **options)


def node_of(gm: GraphModule, target: object) -> Node | None:
    return next((n for n in gm.graph.nodes if n.target is target), None)


def scaled(gm: GraphModule, target: object, factor: float) -> None:
    """Multiply what an operator returns."""
    node = node_of(gm, target)
    assert node is not None
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(aten.mul.Tensor, (node, factor))
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def wrong_sin(gm: GraphModule) -> None:
    scaled(gm, aten.sin.default, 1.01)


def wrong_tanh(gm: GraphModule) -> None:
    scaled(gm, aten.tanh.default, 0.99)


def doubles(gm: GraphModule) -> None:
    scaled(gm, aten.cos.default, 2.0)


def halves(gm: GraphModule) -> None:
    """Make up for `doubles`; wrong without it."""
    scaled(gm, aten.cos.default, 0.5)


def fails_on_clamp(gm: GraphModule) -> None:
    """Fail after `honest` only."""
    if node_of(gm, aten.clamp_min.default) is not None:
        raise RuntimeError("cannot take a clamp")


def one_more_output(gm: GraphModule) -> None:
    output = next(iter(gm.graph.find_nodes(op="output")))
    (value,) = output.all_input_nodes
    output.args = ((value, value),)


def one_more_input(gm: GraphModule) -> None:
    first = next(iter(gm.graph.find_nodes(op="placeholder")))
    with gm.graph.inserting_after(first):
        gm.graph.placeholder("extra")


def another_module(gm: GraphModule) -> GraphModule:
    """Return a new module in place of the given one, wrong by half."""
    new = GraphModule(gm, copy.deepcopy(gm.graph))
    scaled(new, aten.tanh.default, 1.5)
    new.recompile()
    return new


def honest(gm: GraphModule) -> None:
    """Write relu as a maximum with zero."""
    old = node_of(gm, aten.relu.default)
    if old is None:
        return
    with gm.graph.inserting_before(old):
        new = gm.graph.call_function(aten.clamp_min.default, (old.args[0], 0))
    new.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)


def idle(gm: GraphModule) -> None:
    """Change nothing."""


def assumes_relu(gm: GraphModule) -> None:
    """Harmless on relu, but wrong on what `honest` puts in its place."""
    clamp = node_of(gm, aten.clamp_min.default)
    if clamp is not None:
        clamp.args = (clamp.args[0], 0.6)


def divides_by_zero(gm: GraphModule) -> None:
    scaled(gm, aten.cos.default, float("nan"))


def needs_clamp(gm: GraphModule) -> None:
    """Fail without `honest`."""
    assert node_of(gm, aten.clamp_min.default) is not None, "there is no clamp"


def bad_shape(gm: GraphModule) -> None:
    """Leave a graph that cannot be run."""
    node = node_of(gm, aten.cos.default)
    assert node is not None
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(aten.view.default, (node, [5, 5]))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def loses_val(gm: GraphModule) -> None:
    node = node_of(gm, aten.cos.default)
    assert node is not None
    node.meta.pop("val")
    node.meta["touched"] = True
    node.args = tuple(node.args)


def rewrites(gm: GraphModule, first: int | None = None, wrong: tuple[int, ...] = ()) -> Outcome:
    """Replace each of the elementwise functions by itself; the matches in `wrong` come out too large."""
    targets = (aten.cos.default, aten.sin.default, aten.relu.default, aten.tanh.default)
    found = [n for n in gm.graph.nodes if n.target in targets][:first]
    for i, node in enumerate(found):
        if i in wrong:
            scaled(gm, node.target, 1.5)
    return Applied(tuple(n.name for n in found))

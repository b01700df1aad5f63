"""Transforms that lose metadata as transforms of real compilers have done, each on the tiny llama of the corpus.

The numbers are those of TensorRT-LLM's pull requests and issues in which the defect was found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten


def calls(gm: GraphModule, target: object) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target is target]


def attribute(gm: GraphModule, node: object) -> torch.nn.Parameter:
    assert isinstance(node, Node)
    owner, _, name = str(node.target).rpartition(".")
    found = getattr(gm.get_submodule(owner), name)
    assert isinstance(found, torch.nn.Parameter)
    return found


def insert(gm: GraphModule, place: Node, target: object, *args: object) -> Node:
    with gm.graph.inserting_before(place):
        return gm.graph.call_function(target, args)  # type: ignore[arg-type]


def fused_gemm_without_val(gm: GraphModule) -> None:
    """12357: the fused linear and its narrows have no val."""
    gate, up = calls(gm, aten.linear.default)[4:6]
    stacked = torch.cat([attribute(gm, gate.args[1]), attribute(gm, up.args[1])])
    gm.register_parameter("fused_weight", torch.nn.Parameter(stacked, requires_grad=False))
    with gm.graph.inserting_before(gate):
        weight = gm.graph.get_attr("fused_weight")
    weight.meta["val"] = gate.meta["val"].fake_mode.from_tensor(stacked, static_shapes=True)
    fused = insert(gm, gate, aten.linear.default, gate.args[0], weight)
    for i, old in enumerate((gate, up)):
        part = insert(gm, gate, aten.narrow.default, fused, -1, 96 * i, 96)
        old.replace_all_uses_with(part)
        gm.graph.erase_node(old)


def cached_attention_without_val(gm: GraphModule) -> None:
    """12369: the attention node is made anew without metadata; the shape propagation of a later transform mends it."""
    old = calls(gm, aten.softmax.int)[0]
    new = insert(gm, old, aten.softmax.int, *old.args)
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)


def meta_of_the_norm_on_packed_codes(gm: GraphModule) -> None:
    """14361: what is quantised and packed bears the shape and dtype of the norm."""
    norm = calls(gm, aten.linear.default)[0].args[0]
    assert isinstance(norm, Node)
    last = calls(gm, aten.linear.default)[-1]
    codes = insert(gm, last, aten.to.dtype, insert(gm, last, aten.slice.Tensor, norm, -1, 0, 32), torch.uint8)
    for node in (codes, codes.args[0]):
        assert isinstance(node, Node)
        node.meta = dict(norm.meta)
    wide = insert(gm, last, aten.to.dtype, codes, torch.float32)
    wide.meta["val"] = norm.meta["val"].new_empty((2, 16, 32))
    shift = insert(gm, last, aten.mean.dim, wide, [-1], True)
    shift.meta["val"] = norm.meta["val"].new_empty((2, 16, 1))
    total = insert(gm, last, aten.add.Tensor, last.args[0], shift)
    total.meta["val"] = norm.meta["val"].new_empty((2, 16, 64))
    last.update_arg(0, total)


def shard(gm: GraphModule, linear: Node, dim: int) -> None:
    """Keep the first half of a linear's weight along `dim`, and say so in its metadata."""
    source = linear.args[1]
    assert isinstance(source, Node)
    weight = attribute(gm, source)
    half = torch.nn.Parameter(weight.detach().narrow(dim, 0, weight.shape[dim] // 2).clone(), requires_grad=False)
    owner, _, name = str(source.target).rpartition(".")
    setattr(gm.get_submodule(owner), name, half)
    source.meta["val"] = source.meta["val"].fake_mode.from_tensor(half, static_shapes=True)
    if dim == 0:
        value = linear.meta["val"]
        linear.meta["val"] = value.new_empty((*value.shape[:-1], value.shape[-1] // 2))


def heads_written_out_after_a_column_shard(gm: GraphModule) -> None:
    """7912: the view after a sharded projection still names the number of all heads."""
    linear = calls(gm, aten.linear.default)[0]
    view = next(iter(linear.users))
    view.args = (linear, [2, 16, 4, 16])
    shard(gm, linear, 0)


def row_shard_of_an_unsharded_input(gm: GraphModule) -> None:
    """11220, 14679: the weight is cut along the contraction, its input is not."""
    shard(gm, calls(gm, aten.linear.default)[3], 1)


def none_for_val(gm: GraphModule) -> None:
    """What moving a graph between devices makes of a missing val: the key is there, and None."""
    calls(gm, aten.silu.default)[0].meta["val"] = None


def transpose_without_val(gm: GraphModule) -> None:
    """The layout change before rotary embedding has no val, only what follows it has."""
    linear = calls(gm, aten.linear.default)[-1]
    source = linear.args[0]
    assert isinstance(source, Node)
    there = insert(gm, linear, aten.transpose.int, source, 0, 1)
    back = insert(gm, linear, aten.transpose.int, there, 0, 1)
    back.meta = dict(source.meta)
    back.meta.pop("custom", None)
    linear.update_arg(0, back)


def split_in_a_closure(gm: GraphModule) -> None:
    """The split of a fused GEMM is a closure, which nobody can find again."""
    silu = calls(gm, aten.silu.default)[0]

    def split_output(x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    source = silu.args[0]
    assert isinstance(source, Node)
    part = insert(gm, silu, split_output, source)
    part.meta["val"] = source.meta["val"]
    silu.update_arg(0, part)


def meta_tensor_for_val(gm: GraphModule) -> None:
    """A plain tensor on the meta device in place of the fake tensor: it says the wrong device."""
    silu = calls(gm, aten.silu.default)[0]
    silu.meta["val"] = torch.empty(silu.meta["val"].shape, device="meta")


def another_fake_mode(gm: GraphModule) -> None:
    """10646: a replacement traced in a mode of its own brings that mode's values along."""
    silu = calls(gm, aten.silu.default)[0]
    with torch._subclasses.FakeTensorMode():
        silu.meta["val"] = torch.empty(silu.meta["val"].shape)


def cosine_in_meta(gm: GraphModule) -> None:
    """Cosines are handed to the attention in its metadata, so that no edge leads there."""
    calls(gm, aten.softmax.int)[0].meta["rope_cos"] = calls(gm, aten.cos.default)[0]


def weight_left_behind(gm: GraphModule) -> None:
    """A weight is replaced and stays registered beside the new one."""
    node = calls(gm, aten.linear.default)[-1].args[1]
    assert isinstance(node, Node)
    value = attribute(gm, node).detach().clone()
    gm.get_submodule("model.norm").register_parameter("twin", torch.nn.Parameter(value, requires_grad=False))
    with gm.graph.inserting_before(node):
        new = gm.graph.get_attr("model.norm.twin")
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    gm.get_submodule("model.norm").register_parameter("left", torch.nn.Parameter(value, requires_grad=False))


def written_in_place(gm: GraphModule) -> None:
    """A scale is folded into a weight where it stands, and the graph before changes with it."""
    weight = attribute(gm, calls(gm, aten.linear.default)[0].args[1])
    weight.data.mul_(1.5)


@dataclass(frozen=True)
class Planted:
    """One defect: what plants it, the rule that sees it, and how many nodes it hits."""

    plant: Callable[[GraphModule], None]
    rules: tuple[str, ...]
    count: int


DEFECTS = [
    Planted(fused_gemm_without_val, ("missing-val",), 3),
    Planted(cached_attention_without_val, ("missing-val",), 1),
    Planted(meta_of_the_norm_on_packed_codes, ("stale-val",), 2),
    Planted(heads_written_out_after_a_column_shard, ("cannot-run",), 1),
    Planted(row_shard_of_an_unsharded_input, ("cannot-run",), 1),
    Planted(none_for_val, ("missing-val",), 1),
    Planted(transpose_without_val, ("missing-val",), 1),
    Planted(split_in_a_closure, ("python-closure",), 1),
    Planted(meta_tensor_for_val, ("stale-val",), 1),
    Planted(another_fake_mode, ("foreign-fake-mode",), 1),
    Planted(cosine_in_meta, ("hidden-input",), 1),
    Planted(weight_left_behind, ("orphaned-parameter",), 1),
    Planted(written_in_place, ("weight-written",), 1),
]

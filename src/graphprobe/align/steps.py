"""Steps: how a node re-arranges its operand, where it makes no values: a view, a part, a cast."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes

Step = tuple[Any, ...]  # () keeps the flat order; else ("perm" | "part" | "expand" | "order", shape before, ...)

FLAT: Step = ()
CASTS = {
    "aten::to", "aten::_to_copy", "aten::type_as", "aten::float", "aten::half", "aten::bfloat16", "aten::double",
    "prims::convert_element_type",
}  # fmt: skip
_PERMUTES = {"aten::permute", "aten::transpose", "aten::t", "aten::numpy_T", "aten::mT", "aten::swapaxes"}
_SPLITS = {"aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unbind", "aten::tensor_split"}
_CUTS = {"aten::slice", "aten::select", "aten::narrow"}
EXPANDS = {"aten::expand", "aten::expand_as", "aten::broadcast_to"}
FLATS = CASTS | {
    f"aten::{name}"
    for name in (
        "view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "unsqueeze", "squeeze", "clone",
        "contiguous", "alias", "detach", "lift_fresh", "view_as", "reshape_as", "ravel",
    )
} | {"prims::device_put"}  # fmt: skip


def joined(steps: tuple[Step, ...], step: Step) -> tuple[Step, ...]:
    """Append a step; two permutations of one shape become one, and none where they undo each other."""
    if steps and step[0] == "perm" and steps[-1][0] == "perm":
        _, shape, first = steps[-1]
        _, now, second = step
        if tuple(shape[d] for d in first) == now:
            both = tuple(first[d] for d in second)
            return steps[:-1] if keeps_order(shape, both) else (*steps[:-1], ("perm", shape, both))
    if steps and step[0] == steps[-1][0] == "order" and step[1:3] == steps[-1][1:3]:
        moved = tuple(steps[-1][3][i] for i in step[3])
        return steps[:-1] if moved == tuple(range(len(moved))) else (*steps[:-1], (*step[:3], moved))
    return (*steps, step)


def keeps_order(shape: Sequence[Any], order: Sequence[int]) -> bool:
    """Whether a permutation moves nothing but dimensions of size 1."""
    moved = [d for d in order if shape[d] != 1]
    return moved == sorted(moved)


def is_cast(node: Node) -> bool:
    """Whether the node casts a floating tensor to another floating dtype of at least 16 bits."""
    if nodes.schema_name(node) not in CASTS or not node.all_input_nodes:
        return False
    mine, theirs = nodes.tensor_val(node), nodes.tensor_val(node.all_input_nodes[0])
    return (
        mine is not None
        and theirs is not None
        and mine.dtype != theirs.dtype
        and all(t.dtype.is_floating_point and t.dtype.itemsize > 1 for t in (mine, theirs))
    )


def step_of(node: Node) -> Step | None:
    """Return how a node re-arranges its operand, None where it makes values."""
    name = nodes.schema_name(node)
    if node.target is operator.getitem:
        return _split_part(node)
    if not name or not node.args or not isinstance(node.args[0], Node):
        return None
    if is_cast(node) or (name in ("aten::dropout", "aten::native_dropout") and not nodes.is_random(node)):
        return FLAT if nodes.tensor_val(node) is not None else None
    if not nodes.is_view(node) or nodes.tensor_val(node) is None:
        return None
    if nodes.ORDER in node.meta:
        shape = nodes.shape(node) or ()
        return ("order", shape, node.meta[nodes.ORDER][0] - len(shape), node.meta[nodes.ORDER][1])
    mine, theirs = nodes.shape(node), nodes.shape(node.args[0])
    if theirs is None or mine is None:
        return None
    if name in _PERMUTES:
        return _permuted(node, theirs)
    if name in _CUTS:
        return _cut(node, theirs)
    if name in EXPANDS:
        padded = (1,) * (len(mine) - len(theirs)) + tuple(theirs)
        return FLAT if padded == mine else ("expand", padded, mine)
    return FLAT if name.removesuffix("_copy") in FLATS and _same_bits(node) and count(mine) == count(theirs) else None


def _same_bits(node: Node) -> bool:
    return not any(isinstance(a, torch.dtype) for a in node.args) or nodes.schema_name(node) in CASTS


def count(shape: Sequence[Any]) -> Any:
    """Multiply the sizes; symbolic ones stay a nested tuple."""
    out: Any = 1
    for d in shape:
        out = out * d if isinstance(d, int) and isinstance(out, int) else (out, d)
    return out


def _permuted(node: Node, shape: tuple[Any, ...]) -> Step:
    rank, name = len(shape), nodes.schema_name(node)
    if name == "aten::permute":
        order = tuple(int(d) % rank for d in argument(node, 1, "dims"))
    else:
        order_ = list(range(rank))
        if name in ("aten::transpose", "aten::swapaxes"):
            i, j = int(argument(node, 1, "dim0")) % rank, int(argument(node, 2, "dim1")) % rank
        else:
            i, j = (rank - 2, rank - 1) if rank >= 2 else (0, 0)
        if name == "aten::numpy_T":
            order_.reverse()
        elif rank >= 2:
            order_[i], order_[j] = order_[j], order_[i]
        order = tuple(order_)
    return FLAT if keeps_order(shape, order) else ("perm", tuple(shape), order)


def _cut(node: Node, shape: tuple[Any, ...]) -> Step | None:
    name = nodes.schema_name(node)
    dim = int(argument(node, 1, "dim", 0)) % len(shape)
    size = shape[dim]
    if not isinstance(size, int):
        return None
    start = argument(node, 2, {"aten::select": "index"}.get(name, "start"), 0) or 0
    length = argument(node, 3, {"aten::narrow": "length"}.get(name, "end"), None)
    stride = argument(node, 4, "step", 1) if name == "aten::slice" else 1
    if not isinstance(start, int) or not isinstance(stride, int) or not isinstance(length, (int, type(None))):
        return None
    start = max(0, start + size) if start < 0 else min(start, size)
    if name == "aten::select":
        stop = start + 1
    elif name == "aten::narrow":
        stop = start + (length or 0)
    else:
        stop = size if length is None else min(length, size) if length >= 0 else size + length
    return part(shape, dim, start, stop, stride)


def part(shape: tuple[Any, ...], dim: int, start: int, stop: int, stride: int = 1) -> Step:
    """Return the step that keeps elements `start` to `stop` of one dimension."""
    if (start, stop, stride) == (0, shape[dim], 1):
        return FLAT
    return ("part", tuple(shape), dim - len(shape), start, stop, stride)


def _split_part(node: Node) -> Step | None:
    source, index = node.args[0], node.args[1]
    if not isinstance(source, Node) or nodes.schema_name(source) not in _SPLITS or not isinstance(index, int):
        return None
    shape = nodes.shape(source.args[0]) if isinstance(source.args[0], Node) else None
    if shape is None:
        return None
    dim = int(argument(source, 1 if "unbind" in nodes.schema_name(source) else 2, "dim", 0)) % len(shape)
    parts = source.meta.get("val")
    if not isinstance(parts, (list, tuple)) or not all(isinstance(v, torch.Tensor) for v in parts):
        return None
    index %= len(parts)
    if nodes.schema_name(source) == "aten::unbind":
        return part(shape, dim, index, index + 1)
    ends = list(accumulate(int(v.shape[dim]) for v in parts))
    return part(shape, dim, ends[index - 1] if index else 0, ends[index])


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument by place or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)

"""Rotary embedding written out with rotate-half becomes one operator."""

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
    """result = x * cos + cat(-x[half:], x[:half]) * sin."""

    x: Node
    cos: Node
    sin: Node
    result: Node
    inside: tuple[Node, ...]


@dataclass(frozen=True)
class FuseRotary:
    """Fuse rotary embedding in rotate-half form; `where` is a glob on the module path of the attention.

    Tried on llama, qwen2, qwen3 and mistral; gpt2 and bert have none.
    """

    where: str = "*"
    name: ClassVar[str] = "fuse_rotary"
    stage: ClassVar[str] = "pattern_matcher"
    makes: ClassVar[tuple[str, ...]] = ("graphprobe_transforms.rotary.default",)

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        halves = [n for n in matching.anchors(gm, self.where, aten.cat.default) if _is_half_negated(n)]
        return matching.rewrite(
            gm, halves, match, _fuse, f"nothing is rotated by halves in a module that matches {self.where!r}"
        )


def _is_half_negated(cat: Node) -> bool:
    parts = arg(cat, 0)
    return isinstance(parts, (list, tuple)) and len(parts) == 2 and is_call(parts[0], aten.neg.default)


def match(rotated: Node) -> _Match | NotApplied:
    """Match the rotation around one concatenation, or say what is in the way."""
    negated, first = arg(rotated, 0)
    second = arg(negated, 0)
    if not is_call(first, aten.slice.Tensor) or not is_call(second, aten.slice.Tensor):
        return NotApplied("what is concatenated are no slices", rotated.name)
    x = arg(first, 0)
    if lost := matching.unknown(x):
        return lost
    if x is not arg(second, 0) or not _are_halves(x, first, second, rotated):
        return NotApplied("the slices are not the two halves of one value in its last dimension", rotated.name)
    with_sin = graphs.only_user(rotated, aten.mul.Tensor)
    result = graphs.only_user(with_sin, aten.add.Tensor) if with_sin is not None else None
    if with_sin is None or result is None or result.kwargs:
        return NotApplied("the rotated value is not multiplied with sines and added", rotated.name)
    with_cos = next((n for n in result.all_input_nodes if n is not with_sin), None)
    if not is_call(with_cos, aten.mul.Tensor) or x not in with_cos.args or len(graphs.users(with_cos)) != 1:
        return NotApplied("it is not added to the value times cosines", result.name)
    sin = next((n for n in with_sin.all_input_nodes if n is not rotated), None)
    cos = next((n for n in with_cos.all_input_nodes if n is not x), None)
    inside = (first, second, negated, rotated, with_sin, with_cos)
    shared = [n for n in inside if len(graphs.users(n)) != 1]
    if shared:
        return NotApplied("an intermediate value is used elsewhere", shared[0].name)
    if lost := matching.unknown(result):
        return lost
    if sin is None or cos is None or not graphs.same_kind(graphs.tensor(x), graphs.tensor(result)):
        return NotApplied("cosines or sines change the shape or dtype of the value", result.name)
    return _Match(x, cos, sin, result, inside)


def _are_halves(x: Node, first: Node, second: Node, rotated: Node) -> bool:
    value = graphs.tensor(x)
    if value is None or not isinstance(value.shape[-1], int):
        return False
    size, last = value.shape[-1], (-1, value.dim() - 1)
    if arg(rotated, 1) not in last or any(arg(n, 1) not in last or len(n.args) > 4 for n in (first, second)):
        return False
    return (arg(first, 2), arg(first, 3)) == (0, size // 2) and arg(second, 2) == size // 2 and arg(second, 3) >= size


def _fuse(gm: GraphModule, m: _Match) -> list[Node]:
    target = torch.ops.graphprobe_transforms.rotary.default
    fused = graphs.insert(m.result, target, (m.x, m.cos, m.sin), like=m.result)
    graphs.replace(m.result, fused)
    graphs.erase_unused(m.inside)
    return [fused]

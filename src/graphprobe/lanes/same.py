"""Which regions are the same program on the same tensors, and which weight of `after` stands for which of `before`.

One program on the same content needs no exact lanes; where the weights also lie alike in memory and no operation is
known to differ from itself, the forced lane would do over again what the before lane just did, and is left out, too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.chains import CASTS
from graphprobe.lanes.regions import Region
from graphprobe.program import Program

#: Forward operators of torch that may sum in another order at every run (torch.use_deterministic_algorithms).
_UNSTEADY = {
    "index_add", "index_put", "index_reduce", "scatter_add", "scatter_reduce", "scatter", "put", "cumsum", "histc",
    "bincount", "embedding_bag", "_embedding_bag", "kthvalue", "median", "nanmedian", "max_unpool2d", "max_unpool3d",
    "_ctc_loss", "segment_reduce", "resize", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}  # fmt: skip
#: Functions that are no operators, and make no numbers that another call would not make.
_PLAIN = {operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv}
_HALVES = (torch.float16, torch.bfloat16)
_WIDENINGS = {
    *((narrow, wide) for narrow in _HALVES for wide in (torch.float32, torch.float64)),
    (torch.float32, torch.float64),
}
_LINE = 64  # bytes; kernels ask for no wider alignment


class Weights:
    """Compares weights by content, each pair once."""

    def __init__(self, before: Program, after: Program) -> None:
        self.before, self.after = before, after
        self._known: dict[tuple[int, int], bool] = {}

    def equal(self, x: Node, y: Node) -> bool:
        """Whether two ``get_attr`` nodes read the same content in the same dtype."""
        return self._compare(x, y, cast=False)

    def stands_for(self, x: Node, y: Node) -> bool:
        """Whether after's weight is bitwise before's, or bitwise its cast to another dtype, in either direction."""
        return self._compare(x, y, cast=True)

    def lie_alike(self, x: Node, y: Node) -> bool:
        """Whether they are `equal`, and kernels cannot tell them apart by how they lie in memory."""
        return self.equal(x, y) and _layout(self.before.held(x)) == _layout(self.after.held(y))

    def _compare(self, x: Node, y: Node, cast: bool) -> bool:
        mine, theirs = self.before.held(x), self.after.held(y)
        if mine is theirs:
            return True
        if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor):
            return False
        if mine.is_meta != theirs.is_meta:  # one was never loaded
            return False
        if mine.shape != theirs.shape or (mine.dtype != theirs.dtype and not cast):
            return False
        key = (id(mine), id(theirs))
        if key not in self._known:
            self._known[key] = _same_content(mine.detach(), theirs.detach())
        return self._known[key]


def _layout(value: Any) -> Any:
    """Return what a kernel sees of a weight beside its numbers."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided or value.is_meta:
        return id(value)
    return tuple(value.shape), value.stride(), value.dtype, value.device, value.data_ptr() % _LINE


def _same_content(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    mine, theirs = (t if t.layout is torch.strided else t.to_dense() for t in (mine, theirs))
    if mine.dtype == theirs.dtype:
        same_memory = mine.data_ptr() == theirs.data_ptr() and mine.stride() == theirs.stride()
        return same_memory or torch.equal(mine, theirs.to(mine.device))
    if not (mine.dtype.is_floating_point and theirs.dtype.is_floating_point):
        return False
    if mine.dtype.itemsize == 1 or theirs.dtype.itemsize == 1:  # a cast to 8 bits is quantisation
        return False
    there = theirs.to(mine.device)
    return torch.equal(mine.to(theirs.dtype), there) or torch.equal(there.to(mine.dtype), mine)


def repeats(region: Region, weights: Weights) -> bool:
    """Whether the forced lane would run the same kernels on the same tensors as before: it can only make the same bits.

    More is asked than of `isomorphic`: equal dtypes at the frontier, weights that lie alike in memory (kernels are
    chosen by that), and operations that are torch's own and not among those that sum in whatever order comes.
    """
    if any(_dtype(p) != _dtype(q) for p, q in region.frontier):
        return False
    steady = all(_is_steady(n) for n in region.after if n.op != "get_attr")
    return steady and _Matcher(region, weights.lie_alike).match()


def widened(region: Region) -> tuple[Node, Node] | None:
    """Return the pair that both sides do nothing with but raise it to a wider floating type; None for other regions.

    No number changes by that: what was measured of the pair holds for the raised one.
    """
    mine = [n for n in region.after if n.op != "get_attr"]
    if len(mine) != 1 or len(region.frontier) != 1 or nodes.schema_name(mine[0]) not in CASTS:
        return None
    narrow, wide = _dtype(region.frontier[0][1]), _dtype(mine[0])
    rising = narrow is not None and wide is not None and (narrow, wide) in _WIDENINGS
    return region.frontier[0] if rising and nodes.shape(mine[0]) == nodes.shape(region.frontier[0][1]) else None


def _dtype(node: Node) -> torch.dtype | None:
    value = nodes.tensor_val(node)
    return None if value is None else value.dtype


def _is_steady(node: Node) -> bool:
    name = nodes.schema_name(node)
    plain = name.startswith(("aten::", "prims::")) if name else callable(node.target) and node.target in _PLAIN
    return plain and name.removeprefix("aten::") not in _UNSTEADY and not nodes.is_random(node)


def substitutes(regions: list[Region], weights: Weights) -> dict[Node, Node]:
    """Map each weight of after to the weight of before whose value the exact lanes use in its place."""
    found: dict[Node, Node] = {}
    for region in regions:
        mine = [n for n in region.before if n.op == "get_attr"]
        for y in region.after:
            if y.op != "get_attr" or y in found:
                continue
            # the same name first: two norms often hold equal weights
            for x in sorted(mine, key=lambda n: str(n.target) != str(y.target)):
                if weights.stands_for(x, y):
                    found[y] = x
                    break
    return found


def isomorphic(region: Region, weights: Weights) -> bool:
    """Whether both pieces are one program: equal operators, constants, dtypes and weight content."""
    return _Matcher(region, weights.equal).match()


class _Matcher:
    def __init__(self, region: Region, equal: Callable[[Node, Node], bool]) -> None:
        self.region, self.equal = region, equal
        self.frontier = set(region.frontier)
        self.leaves = {p for p, _ in region.frontier} | {q for _, q in region.frontier}
        self.same: dict[Node, Node] = {}

    def match(self) -> bool:
        region = self.region
        if len(region.before) != len(region.after) or region.loose_before or region.loose_after:
            return False
        stack = [(region.claim.before, region.claim.after)]
        while stack:
            x, y = stack.pop()
            if x in self.same:
                if self.same[x] is not y:
                    return False
                continue
            if not self._alike(x, y):
                return False
            self.same[x] = y
            operands = zip(x.all_input_nodes, y.all_input_nodes, strict=True)
            stack.extend((p, q) for p, q in operands if (p, q) not in self.frontier)
        return True

    def _alike(self, x: Node, y: Node) -> bool:
        if x.op != y.op or x in self.leaves or y in self.leaves:
            return False
        if x.op == "get_attr":
            return self.equal(x, y)
        if x.target is not y.target or len(x.all_input_nodes) != len(y.all_input_nodes):
            return False
        mine, theirs = nodes.tensor_val(x), nodes.tensor_val(y)
        if mine is not None and theirs is not None and mine.dtype != theirs.dtype:
            return False
        return same_arguments(x, y)


def same_arguments(x: Node, y: Node) -> bool:
    """Whether all constants agree and operands stand in the same places."""
    if x is y:
        return True
    slots_x = {n: i for i, n in enumerate(x.all_input_nodes)}
    slots_y = {n: i for i, n in enumerate(y.all_input_nodes)}

    def same(mine: Any, theirs: Any) -> bool:
        if isinstance(mine, Node) or isinstance(theirs, Node):
            return isinstance(mine, Node) and isinstance(theirs, Node) and slots_x[mine] == slots_y[theirs]
        if isinstance(mine, (list, tuple)):
            alike = isinstance(theirs, (list, tuple)) and len(mine) == len(theirs)
            return alike and all(map(same, mine, theirs))
        if isinstance(mine, dict):
            alike = isinstance(theirs, dict) and mine.keys() == theirs.keys()
            return alike and all(same(value, theirs[key]) for key, value in mine.items())
        return mine is theirs or (type(mine).__name__ == type(theirs).__name__ and repr(mine) == repr(theirs))

    return same(x.args, y.args) and same(x.kwargs, y.kwargs)

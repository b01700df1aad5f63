"""Rule 6: decisions (argmax, top-k, floor, comparison, rounding to codes) flip on ties, and that is rounding.

A flip is on a tie where noise makes one side take the other's decision: noise of float64 in the exact lanes, where only
equal scores and exact halves flip, and of ``8 u`` of the coarsest dtype involved in the native ones. What hangs on the
decisions is then compared with `after` taking before's decisions, so that nothing can hide behind a flip.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.chains import chains
from graphprobe.execute import Values
from graphprobe.judge import precision
from graphprobe.judge.rows import Measured
from graphprobe.judge.same import BOUND, Compared, Sameness, Variant, ask, compare
from graphprobe.lanes import elements, exact
from graphprobe.lanes.noise import U64, Noise, jittered
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

RULE = "6 tie"
_DRAWS = 16
_NATIVE = 8.0  # times the unit roundoff

Pairs = list[tuple[Node, Node]]  # decisions of before and after that correspond
Evaluate = Callable[[Values], Values]  # decisions that after shall take -> the values of after's nodes


def decisions(region: Region, side: str) -> list[Node]:
    """Return the nodes of a piece that hold a decision taken on floating values; of a chain of codes only the last."""
    inner = {n for chain in chains(getattr(region, side)) for n in chain.members if n is not chain.last}
    return [n for n in region.operations(side) if n not in inner and exact.decides(n) and _on_floats(n)]


def _on_floats(node: Node) -> bool:
    if node.target is operator.getitem:  # the indices of a top-k
        return any(_is_floating(n) for n in node.all_input_nodes[0].all_input_nodes)
    return any(_is_floating(n) for n in node.all_input_nodes)


def _is_floating(node: Node) -> bool:
    value = nodes.tensor_val(node)
    return value is not None and value.dtype.is_floating_point


def ask_ties(replay: Replay, region: Region, plain: Sameness) -> Sameness | None:
    """Excuse what differs in exact arithmetic if it goes with the flips of decisions that hang on a tie."""
    pairs = _pairs(region)
    if pairs is None:
        return None
    truth = replay.exact_values("before", region)

    def after(taken: Values) -> Values:
        return replay.exact_values("after", region, override=taken)

    size = BOUND * U64
    flips = _flips(replay, region, pairs, truth, after, size)
    if flips is not None:
        taken = {y: truth[x] for x, y in pairs}
        answer = ask(replay, region, Variant(taken)) if flips else plain
        if answer.same:
            return Sameness(True, answer.spread, rule=RULE, kind="rounding", note=_note(flips), exact=plain.exact)
    found = compare(replay, region)
    if isinstance(found, Compared) and not _is_floating(region.claim.after):
        count = _met(replay, region, region.claim.before, region.claim.after, found.truth, found.other, {}, size)
        if count is not None:
            return Sameness(True, 0.0, rule=RULE, kind="rounding", note=_note(count), exact=plain.exact)
    return None


def native_ties(replay: Replay, row: Measured) -> str | None:
    """Say how many native decisions flip, if all of them hang on a near tie and explain the difference; else None."""
    region = row.region
    pairs = _pairs(region)
    if pairs is None:
        return None
    before = replay.native("before", region)

    def after(taken: Values) -> Values:
        return replay.native("after", region, override=taken)

    flips = _flips(replay, region, pairs, before, after, _NATIVE * _coarsest(region))
    if not flips:
        return None
    taken = {y: before[x] for x, y in pairs}
    if precision.ratio(replay, row, taken=taken) > precision.BOUND:
        return None
    return _note(flips).replace("a tie", "a near tie")


def _note(count: int) -> str:
    return f"{count} decisions flip that hang on a tie" if count != 1 else "one decision flips that hangs on a tie"


def _pairs(region: Region) -> Pairs | None:
    """Pair the decisions of both pieces in order; None where there are none, or as many as do not correspond."""
    mine, theirs = decisions(region, "before"), decisions(region, "after")
    if not mine or len(mine) != len(theirs):
        return None
    if any(nodes.shape(x) != nodes.shape(y) for x, y in zip(mine, theirs, strict=True)):
        return None
    return list(zip(mine, theirs, strict=True))


def _flips(replay: Replay, region: Region, pairs: Pairs, before: Values, after: Evaluate, size: float) -> int | None:
    """Count the decisions that differ, each with the earlier ones taken as before takes them; None if one is no tie."""
    taken: Values = {}
    count = 0
    for x, y in pairs:
        held = after(taken)[y]
        if not torch.equal(_plain(before[x]), _plain(held)):
            met = _met(replay, region, x, y, before[x], held, taken, size)
            if met is None:
                return None
            count += met
        taken[y] = before[x].to(held.dtype)
    return count


def _met(
    replay: Replay,
    region: Region,
    x: Node,
    y: Node,
    mine: torch.Tensor,
    theirs: torch.Tensor,
    taken: Values,
    size: float,
) -> int | None:
    """Count where two nodes differ, if noise makes each such element of one what the other holds; else None."""
    left, right = (_plain(t) for t in (mine, theirs))
    moved = replay.mask(region.claim.before, region.claim.after)
    open_ = left != right
    if moved is not None and moved.shape == open_.shape:
        open_ = open_ & ~moved
    count = int(open_.sum())
    for seed in range(_DRAWS):
        for side, node, goal, held in (("before", x, right, {}), ("after", y, left, taken)):
            noise = Noise(seed)
            # what the piece starts from is shaken too, else equal scores would not part
            given = {p: _shaken(replay.values[p], noise, size) for p, _ in region.frontier if p in replay.values}
            noisy = replay.exact_values(side, region, noise, given=given, override=held, size=size)
            open_ = open_ & (_plain(noisy[node]) != goal)
        if not bool(open_.any()):
            return count
    return None


def _shaken(value: Any, noise: Noise, size: float) -> Any:
    return jittered(exact.lift(value), noise, size)


def _plain(value: torch.Tensor) -> torch.Tensor:
    return elements.real(value).double()


def _coarsest(region: Region) -> float:
    """Return the unit roundoff of the coarsest floating dtype of both pieces and what they start from."""
    involved = [
        *region.operations("before"),
        *region.operations("after"),
        *(n for pair in region.frontier for n in pair),
    ]
    values = [v for n in involved if (v := nodes.tensor_val(n)) is not None and v.dtype.is_floating_point]
    return max((torch.finfo(v.dtype).eps / 2 for v in values if v.dtype.itemsize > 1), default=2.0**-24)

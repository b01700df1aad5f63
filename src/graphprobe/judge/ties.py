"""Rule 6: decisions (argmax, top-k, floor, comparison, rounding to codes) flip on ties, and that is rounding.

A flip is on a tie where noise flips it too: noise of float64 for the exact lanes, where only equal scores and exact
halves can flip, and of ``8 u`` of the coarsest dtype involved for the native ones. What moves further down because of
a flip must be no larger than what the flips under noise move.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.judge.rows import Measured
from graphprobe.judge.same import BOUND, Compared, Sameness, compare, difference, worst_ratio
from graphprobe.lanes import exact, measure
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import U64, Replay, jittered

RULE = "6 tie"
_DRAWS = 16
_RATIO = 8.0
_NATIVE = 8.0  # times the unit roundoff
_CHOOSERS = {
    f"aten::{name}" for name in ("topk", "sort", "argsort", "argmax", "argmin", "max", "min", "kthvalue", "median")
} | {"aten::searchsorted", "aten::bucketize"}


def decisions(region: Region) -> list[Node]:
    """Return the operations of both pieces that decide on floating values."""
    return [n for side in ("before", "after") for n in region.operations(side) if _decides_on_floats(n)]


def _decides_on_floats(node: Node) -> bool:
    if not (exact.decides(node) or nodes.schema_name(node) in _CHOOSERS):
        return False
    return any(_is_floating(n) for n in node.all_input_nodes)


def _is_floating(node: Node) -> bool:
    value = nodes.tensor_val(node)
    return value is not None and value.dtype.is_floating_point


def ask_ties(replay: Replay, region: Region, plain: Sameness) -> Sameness | None:
    """Excuse what differs in exact arithmetic if float64 noise flips the same decisions."""
    if not decisions(region):
        return None
    found = compare(replay, region)
    if not isinstance(found, Compared):
        return None
    if not _explained(replay, region, found, found.truth, found.other, BOUND * U64):
        return None
    count = int(((found.difference != 0) | found.wrong).sum())
    note = f"{count} of {found.truth.numel()} elements differ, where a decision hangs on a tie"
    return Sameness(True, 0.0, rule=RULE, kind="rounding", note=note, exact=found.relative)


def native_ties(replay: Replay, row: Measured) -> str | None:
    """Say how many elements differ natively, if noise of the native precision flips the same decisions; else None."""
    region = row.region
    if not decisions(region):
        return None
    before = replay.native("before", region)[region.claim.before]
    forced = replay.native("after", region)[region.claim.after]
    found = compare(replay, region)
    if not isinstance(found, Compared) or before.shape != forced.shape:
        return None
    if not _explained(replay, region, found, before, forced, _NATIVE * _coarsest(region)):
        return None
    change, _, wrong = difference(replay, region, before, forced)
    count = int(((change != 0) | wrong).sum())
    return f"{count} of {before.numel()} elements differ, where a decision hangs on a near tie"


def _explained(
    replay: Replay, region: Region, found: Compared, mine: torch.Tensor, theirs: torch.Tensor, size: float
) -> bool:
    """Whether noise makes of each side what the other side holds.

    Codes, indices and masks must be met one by one; of numbers it is asked that they move no less than they differ.
    """
    change, _, wrong = difference(replay, region, mine, theirs)
    whole = not _is_floating(region.claim.after)
    open_ = (change != 0) | wrong
    noises: list[torch.Tensor] = []
    for seed in range(_DRAWS):
        for side, plain, goal in (("before", found.truth, theirs), ("after", found.other, mine)):
            noisy = _noisy(replay, side, region, plain, seed, size)
            moved, _, moved_class = difference(replay, region, plain, noisy)
            noises.append(moved)
            open_ = open_ & (measure.real(noisy) != measure.real(goal)) if whole else open_ & ~moved_class
        if whole and not bool(open_.any()):
            return True
    if whole or bool((open_ & wrong).any()):
        return False
    return worst_ratio(change, noises)[0] <= _RATIO


def _noisy(replay: Replay, side: str, region: Region, plain: torch.Tensor, seed: int, size: float) -> torch.Tensor:
    """Evaluate one piece with noise on all it computes and on all it starts from: equal scores must part, too."""
    noise = torch.Generator(device=plain.device).manual_seed(seed)
    given = {p: jittered(exact.lift(replay.values[p]), noise, size) for p, _ in region.frontier if p in replay.values}
    return replay.exact(side, region, noise, given=given, size=size)


def _coarsest(region: Region) -> float:
    """Return the unit roundoff of the coarsest floating dtype of both pieces and what they start from."""
    involved = [
        *region.operations("before"),
        *region.operations("after"),
        *(n for pair in region.frontier for n in pair),
    ]
    values = [v for n in involved if (v := nodes.tensor_val(n)) is not None and v.dtype.is_floating_point]
    return max((torch.finfo(v.dtype).eps / 2 for v in values if v.dtype.itemsize > 1), default=2.0**-24)

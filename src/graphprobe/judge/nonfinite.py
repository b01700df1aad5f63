"""Rule 8 inside rule 1: NaN or infinity in exact arithmetic, on one side only.

NaN is nobody's intention, so where only ``before`` has it (a fully masked row of a hand-written softmax), ``after`` is
the better one and the rest is judged. An infinity of ``before`` may be a mask that ``after`` forgot, so it excuses
nothing.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.judge.same import Compared, Sameness, compare, judge_difference
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

RULE = "8 non-finite"


def ask_nonfinite(replay: Replay, region: Region, plain: Sameness) -> Sameness | None:
    """Say which side is not finite, if all that differs in class does so for that reason."""
    if not plain.wrong_class:
        return None
    found = compare(replay, region)
    if not isinstance(found, Compared):
        return None
    truth, other = found.truth[found.wrong], found.other[found.wrong]
    if not bool(torch.isnan(truth).any() or torch.isnan(other).any()) and _is_given_infinities(replay, region):
        return None  # the infinities of a mask are nobody's overflow
    if not bool((torch.isfinite(truth) | torch.isfinite(other)).all()):
        return None
    if bool(torch.isfinite(truth).all()):
        return Sameness(
            False, plain.spread, plain.where, plain.wrong_class, rule=RULE, kind="nonfinite", better="before"
        )
    if not bool(torch.isnan(truth).all()):
        return None
    rest = judge_difference(replay, region, found)
    if not rest.same:
        return None
    note = f"before holds NaN in {plain.wrong_class} elements where after is finite"
    return Sameness(True, rest.spread, rule=RULE, kind="rounding", note=note, better="after", exact=rest.exact)


def beyond(replay: Replay, region: Region) -> Node | None:
    """Return a value that the region starts from and that after's dtype cannot hold: what makes it overflows, and has
    a region of its own; what takes it is handed an infinity and is not to blame."""
    replay.fetch_frontiers([region])
    for p, q in region.frontier:
        value, taken = replay.values.get(p), nodes.tensor_val(q)
        if p.op == "placeholder" or not isinstance(value, torch.Tensor) or taken is None:
            continue
        if (
            not value.is_floating_point()
            or not taken.is_floating_point()
            or taken.dtype.itemsize >= value.dtype.itemsize
        ):
            continue
        if int(torch.isfinite(value).sum()) > int(torch.isfinite(value.to(taken.dtype)).sum()):
            return q
    return None


def _is_given_infinities(replay: Replay, region: Region) -> bool:
    """Whether an infinity enters the region: as a number, in a weight, or in a value that opens it."""
    for side, program in (("before", replay.plan.before), ("after", replay.plan.after)):
        for node in getattr(region, side):
            held = [program.attribute(node)] if node.op == "get_attr" else [*node.args, *node.kwargs.values()]
            if any(_is_infinite(value) for value in held):
                return True
    return any(_is_infinite(replay.values.get(p)) for p, _ in region.frontier)


def _is_infinite(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and bool(torch.isinf(value).any())
    return isinstance(value, float) and math.isinf(value)

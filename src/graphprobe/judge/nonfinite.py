"""Rule 8 inside rule 1: NaN or infinity in exact arithmetic, on one side only.

NaN is nobody's intention, so where only ``before`` has it (a fully masked row of a hand-written softmax), ``after`` is
the better one and the rest is judged. An infinity of ``before`` may be a mask that ``after`` forgot, so it excuses
nothing.
"""

from __future__ import annotations

import torch

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

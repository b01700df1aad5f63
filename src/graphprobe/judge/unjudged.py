"""Regions of which nobody can say what they compute: where they differ by more than rounding, nothing is fine."""

from __future__ import annotations

from collections.abc import Sequence

from graphprobe.judge.judging import Judged, Judgement
from graphprobe.judge.rows import unit_roundoff

_LOUD = 8.0  # times the unit roundoff: a handful of operations may round so much


def is_open(judged: Judged) -> bool:
    """Whether a region could not be judged and introduces more than a few roundings."""
    introduced = judged.measured.introduced
    if judged.kind != "unknown" or introduced is None:
        return False
    return introduced > _LOUD * unit_roundoff(judged.region)


def question(judgement: Judgement, regions: Sequence[Judged]) -> str:
    """Say what is left open, and how it may be closed."""
    worst = max(regions, key=lambda j: j.measured.introduced or 0.0)
    name = judgement.replay.plan.after.label(worst.region.claim.after)
    why = f" ({worst.note})" if worst.note else ""
    many = f"{len(regions)} regions differ" if len(regions) > 1 else "a region differs"
    return (
        f"{many} by more than rounding and could not be judged: {name} by {worst.measured.introduced:.1e}{why}. No bug "
        "is known, and none is ruled out; graphprobe.exact_rule gives an operator its exact form"
    )

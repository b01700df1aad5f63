"""Rule 5, rewrites that compensate further down: heads in another order, a scale folded into a weight, shifted positions.

What lies between the two halves of such a rewrite differs in the free lane, too, and what lies below does not. So the
free lane's total error says where the halves may meet: all claims between are withdrawn at once, and the exact lanes
have the last word. Where the error never fades there is nothing to be tried.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from graphprobe.align.claims import Claim
from graphprobe.judge.rows import Measured, unit_roundoff
from graphprobe.lanes.regions import Region, consumers

LARGEST = 160  # claims between the halves: all layers that read one table of rotary angles
LEVELS = 32
ROUNDS = 4
_FADED = 32.0  # times the unit roundoff, or the floor where that was measured: no more than rounding is left


def meeting(
    group: list[Claim],
    regions: Mapping[Claim, Region],
    rows: Mapping[Claim, Measured],
    fails: Callable[[list[Claim], list[Region]], list[Claim]],
) -> list[Claim] | None:
    """Return `group` and all claims between it and where the sides meet again; None where they do not.

    `fails` withdraws claims and returns which of the regions below them do not agree in exact arithmetic then.
    """
    known: set[Claim] = set()  # seemed to have faded, but does not agree
    for _ in range(ROUNDS):
        found = _between(group, regions, rows, known)
        if found is None or len(found[0]) == len(group):
            return None
        between, below = found
        failing = fails(between, below)
        if not failing:
            return between
        known.update(failing)
    return None


def _between(
    group: list[Claim], regions: Mapping[Claim, Region], rows: Mapping[Claim, Measured], known: Collection[Claim]
) -> tuple[list[Claim], list[Region]] | None:
    between = list(group)
    for _ in range(LEVELS):
        below = consumers(between, regions.values())
        differing = [r.claim for r in below if r.claim in known or not _has_faded(rows.get(r.claim))]
        if not differing:
            return between, below
        between += differing
        if len(between) > LARGEST or any(c.output for c in between):
            return None
    return None


def _has_faded(row: Measured | None) -> bool:
    if row is None or row.total is None or row.free_class:
        return False
    u = max(unit_roundoff(row.region), row.floor or 0.0)
    return row.total <= _FADED * u

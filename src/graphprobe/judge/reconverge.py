"""Rule 5, rewrites that compensate further down: heads in another order, a scale in a weight, shifted positions.

What lies between the two halves of such a rewrite differs in the free lane, too, and what lies below does not. So the
free lane's total error says where the halves may meet: all claims between are withdrawn at once, and the exact lanes
have the last word. What else feeds the place where they meet and differs goes with them: heads in another order are
three projections, a rotated residual stream is every layer that writes to it. Where the error never fades there is
nothing to be tried.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from graphprobe.align.claims import Claim
from graphprobe.judge.rows import Measured, unit_roundoff
from graphprobe.lanes.regions import Region, consumers

LARGEST = 160  # claims between the halves: all layers that read one table of rotary angles
LEVELS = 32
ROUNDS = 8
_FADED = 32.0  # times the unit roundoff, or the floor where that was measured: no more than rounding is left


def meeting(
    group: list[Claim],
    regions: Mapping[Claim, Region],
    rows: Mapping[Claim, Measured],
    fails: Callable[[list[Claim], list[Region]], list[Region]],
) -> list[Claim] | None:
    """Return `group` and all claims between it and where the sides meet again; None where they do not.

    `fails` withdraws claims and returns those of the regions below that do not agree in exact arithmetic then.
    """
    known: set[Claim] = set()  # seemed to have faded, but does not agree
    start = list(group)
    for _ in range(ROUNDS):
        found = _between(start, regions, rows, known)
        if found is None:
            return None
        between, below = found
        failing = fails(between, below)
        if not failing:
            return between
        feeding = _feeding(failing, between, rows)
        start += feeding
        if not feeding:
            known.update(r.claim for r in failing)
    return None


def _feeding(failing: list[Region], between: list[Claim], rows: Mapping[Claim, Measured]) -> list[Claim]:
    """Return the claims that the failing regions start from and that differ in the free lane, too."""
    frontier = {pair for region in failing for pair in region.frontier}
    inside = set(between)
    return [c for c, row in rows.items() if (c.before, c.after) in frontier and c not in inside and not _has_faded(row)]


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

"""Rule 5, the trial: what lies below a group of claims, measured as if the group were not claimed."""

from __future__ import annotations

from collections.abc import Mapping

from graphprobe.align.claims import Alignment, Claim
from graphprobe.judge.derived import Looks
from graphprobe.judge.same import Sameness
from graphprobe.lanes.regions import Region, Regions


def without(
    looks: Looks,
    active: Alignment,
    known: Mapping[Claim, Sameness],
    group: list[Claim],
    below: list[Region],
    first: bool,
    rounded: float | None,
) -> tuple[list[Region], dict[Claim, Sameness]]:
    """Return the regions below with the group withdrawn, and the claims that do not hold then (`first`: only one)."""
    replay = looks.replay
    left = active.without(set(group))
    finder = Regions(replay.plan.before, replay.plan.after, left)
    regions = [finder.region(r.claim) for r in below if r.claim not in group]
    replay.fetch_frontiers(regions)
    failing: dict[Claim, Sameness] = {}
    looks = looks.aside()
    for region in regions:
        answer = looks.ask(region, left, known, rounded)
        if answer.same is not True:
            failing[region.claim] = answer
            if first:
                break
    return regions, failing


def holds_again(region: Region, group: list[Claim]) -> bool:
    """Whether a region ends in a node of the group and does its work again: what it is with the group forced, it does
    not say (a value, and what codes made of it stand for, are both claimed to be one value of before)."""
    return any(
        (region.claim.before is c.before and c.after in region.after)
        or (region.claim.after is c.after and c.before in region.before)
        for c in group
    )

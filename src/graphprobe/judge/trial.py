"""Rule 5, the trial: what is claimed and fails, and what lies below a group of claims when that is withdrawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from graphprobe.align.claims import Alignment, Claim
from graphprobe.judge.constants import RULE as AHEAD
from graphprobe.judge.derived import Looks
from graphprobe.judge.noise import carried, moves
from graphprobe.judge.rows import Measured
from graphprobe.judge.same import Sameness
from graphprobe.lanes.regions import Region, Regions, consumers
from graphprobe.lanes.replay import Replay
from graphprobe.lanes.same import Weights

HALF = 0.25  # of each half alone, what both leave together at most
COMPENSATED = "compensated elsewhere"


@dataclass
class Settled:
    """What became of the failing claims."""

    guilty: dict[Claim, str] = field(default_factory=dict)  # claim -> note ("", "masked on this input")
    pardoned: dict[Claim, str] = field(default_factory=dict)  # claim -> "compensated", "don't-care"
    unknown: dict[Claim, str] = field(default_factory=dict)


class Trial:
    """The claims as they stand, those that fail, and what became of them; a group can be withdrawn to see what then."""

    def __init__(
        self,
        replay: Replay,
        alignment: Alignment,
        rows: list[Measured],
        answers: dict[Claim, Sameness],
        looks: Looks,
        weights: Weights,
    ) -> None:
        self.replay = replay
        self.weights = weights
        self.looks = looks
        self.active = alignment
        self.rows = {r.region.claim: r for r in rows}
        self.regions = {r.region.claim: r.region for r in rows} | self.looks.wider
        self.failing = {c: s for c, s in answers.items() if s.same is False}
        self.unclear = {c: s for c, s in answers.items() if s.same is None}
        self._straightened: set[Claim] = set()
        self._looked_at: set[Claim] = set()  # what nothing stands crosswise above, as claims are now
        self.settled = Settled(unknown={c: s.reason for c, s in self.unclear.items()})

    def decided(self) -> set[Claim]:
        """Return the claims that are settled, in whatever way."""
        s = self.settled
        return {*s.guilty, *s.pardoned, *s.unknown}

    def withdrawn(self, group: list[Claim], below: list[Region]) -> list[Region] | None:
        """Return D's regions with the group withdrawn if all of them agree, else None."""
        if any(c.output and not c.cut for c in group):
            return None
        regions, failing = self.without(group, below, first=True)
        return None if failing else regions

    def without(
        self, group: list[Claim], below: list[Region], first: bool = False, rounded: float | None = None
    ) -> tuple[list[Region], dict[Claim, Sameness]]:
        """Return D's regions with the group withdrawn, and the claims that do not hold then (`first`: only one)."""
        left = self.active.without(set(group))
        finder = Regions(self.replay.plan.before, self.replay.plan.after, left)
        regions = [finder.region(r.claim) for r in below if r.claim not in group]
        self.replay.fetch_frontiers(regions)
        failing: dict[Claim, Sameness] = {}
        looks = self.looks.aside()
        for region in regions:
            answer = looks.ask(region, left, self.failing, rounded)
            if answer.same is not True:
                failing[region.claim] = answer
                if first:
                    break
        return regions, failing

    def pardon(self, group: list[Claim], regions: list[Region]) -> None:
        """W holds: learn by noise whether the halves compensate, a later operation hides the difference, or neither."""
        own = [self.regions[c] for c in group]
        failing = [c for c in group if c in self.failing]  # what lies between two halves may well agree
        if moves(self.replay, own, regions, as_value=False):
            if any(self._passes_on(group, own, region) for region in regions):
                self.settled.guilty.update(dict.fromkeys(failing, ""))
            else:
                self.withdraw(group, COMPENSATED)
        elif moves(self.replay, own, regions, as_value=True):
            self.settled.guilty.update(dict.fromkeys(failing, "masked on this input"))
        else:
            self.withdraw(group, "don't-care: nothing below depends on it")

    def _passes_on(self, group: list[Claim], own: list[Region], region: Region) -> bool:
        """Whether a region below agrees only as far as constants computed ahead are rounded, and still differs by as
        much as the group would make it differ: it cannot testify that anything is made good."""
        answer = self.looks.aside().ask(region, self.active.without(set(group)), self.failing)
        if answer.rule != AHEAD or answer.exact is None:
            return False
        return answer.exact > HALF * carried(self.replay, own, region)

    def withdraw(self, group: list[Claim], why: str, instead: Sequence[Claim] = ()) -> None:
        """Withdraw claims, take others in their place, and ask again what starts from either."""
        self.settled.pardoned.update(dict.fromkeys(group, why))
        touched = [r.claim for r in consumers([*group, *instead], self.regions.values())]
        self.active = self.active.without(set(group))
        for c in instead:
            self.active.add(c)
        self.active.sort(self.replay.plan.after.order)
        self._looked_at.clear()
        finder = Regions(self.replay.plan.before, self.replay.plan.after, self.active)
        for c in group:
            self.regions.pop(c, None)
        again = [finder.region(c) for c in (*(c for c in touched if c in self.regions), *instead)]
        self.replay.fetch_frontiers(again)
        for region in again:
            claim = region.claim
            self.regions[claim] = region
            if claim in self.settled.pardoned:
                continue
            answer = self.looks.ask(region, self.active, self.failing)
            self.regions[claim] = self.looks.wider.get(claim, region)
            self.failing.pop(claim, None)
            if instead or answer.same is not False:  # a conviction may have been due to what was withdrawn
                self.settled.guilty.pop(claim, None)
            if answer.same is False:
                self.failing[claim] = answer
            elif answer.same is None:
                self.settled.unknown[claim] = answer.reason


def holds_again(region: Region, group: list[Claim]) -> bool:
    """Whether a region ends in a node of the group and does its work again: what it is with the group forced, it does
    not say (a value, and what codes made of it stand for, are both claimed to be one value of before)."""
    return any(
        (region.claim.before is c.before and c.after in region.after)
        or (region.claim.after is c.after and c.before in region.before)
        for c in group
    )

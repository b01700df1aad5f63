"""Rule 5: a claim that fails may be a wrong claim, or half of a rewrite that compensates elsewhere.

For a failing group ``G`` let ``D`` be the claims and outputs first reached below it, ``W``: all of ``D`` agree with
``G`` withdrawn, ``K``: all of ``D`` agree with ``G`` forced.

- not W, K: a finding at G.
- W: noise of random sign is put on G in ``exact_before``. As large as the difference: if that moves D, the two halves
  really compensate, and G is pardoned. Only as large as the value: a finding, masked on this input. Neither:
  don't-care.
- neither W nor K: wrong claims beget wrong claims, so G grows by the claims of D that fail once G is gone, and is
  pardoned if all below agrees then; else it grows by the failing claims of D and by those that feed them.

- neither, but what is left below without G is far less than G and what fails below differ by: they are halves of one
  rewrite, and not quite right. G is withdrawn, and what it fed is judged in its place.
- a conviction is due: if the free lane's error fades further down, all claims up to there are withdrawn together, and
  pardoned if all below agrees then (judge.reconverge).

After a pardon everything below is judged again on its new frontier. Outputs are never withdrawn.
"""

from __future__ import annotations

import math

from graphprobe.align.claims import Claim
from graphprobe.judge.culprit import other_weights
from graphprobe.judge.layouts import denied
from graphprobe.judge.reconverge import meeting
from graphprobe.judge.same import Sameness
from graphprobe.judge.straight import straight
from graphprobe.judge.trial import HALF, Settled, Trial, holds_again
from graphprobe.lanes.regions import Region, consumers

ROUNDS = 4
LARGEST_GROUP = 64
_LEFT = 1e-2
GUESSED = ("slot", "weight", "value", "operand")  # evidence that names a likely partner, not a certain one


class Withdrawal(Trial):
    """Settles failing claims one after the other, the earliest in after's order first."""

    def settle(self) -> Settled:
        """Decide every failing claim."""
        while True:
            decided = self.decided()
            waiting = [c for c in self.active.claims if c in self.failing and c not in decided]
            if not waiting:
                return self.settled
            if not self._straighten(waiting):
                self._decide(waiting[0])

    def _straighten(self, waiting: list[Claim]) -> bool:
        """Withdraw guesses that run across one program, if some stand above a failing claim."""
        for claim in waiting:
            if claim not in self._looked_at and self._straight_above(claim):
                return True
            self._looked_at.add(claim)
        return False

    def _straight_above(self, claim: Claim, other: int = 0) -> bool:
        found = straight(claim, self.active, self.weights, self._straightened, other)
        if found is None:
            return False
        self._straightened.update(found.instead)
        self.withdraw(found.crosswise, "wrong claim: another pair plays the same part", found.instead)
        return True

    def _decide(self, claim: Claim) -> None:
        if claim.output and self._nobody_meant_a_layout(claim, [claim]):
            return
        if claim.output and not claim.cut:
            self.settled.guilty[claim] = ""
            return
        group = [claim]
        for _ in range(ROUNDS):
            below = consumers(group, self.regions.values())
            withdrawn = self.withdrawn(group, below)
            if self._blame(group, below, withdrawn):
                return
            if len(group) == 1 and (self._settles_below(below) or self._are_halves(claim) or self._is_folded(claim)):
                return  # if it is not settled itself, it is asked again
            if self._wrong_together(group):
                return
            grown = self._grow(group, below)
            if len(grown) == len(group) or len(grown) > LARGEST_GROUP:
                break
            group = grown
        self._convict(group)

    def _blame(self, group: list[Claim], below: list[Region], withdrawn: list[Region] | None) -> bool:
        """Pardon or convict the group if W or K decides; False where neither holds."""
        if any(c.output for c in group):
            withdrawn = None  # an output disagrees: nothing below can make that good
        if withdrawn is not None:
            self.pardon(group, withdrawn)
            return True
        taking = [r for r in below if not holds_again(r, group)]
        if not all(r.claim not in self.failing or r.claim in self.settled.pardoned for r in taking):
            if any(c.output for c in group) and len(group) == 1:
                self.settled.guilty[group[0]] = ""
                return True
            return False
        siblings = self._siblings(group, below)
        if siblings and not any(c.output for c in [*group, *siblings]):
            together = [*group, *siblings]
            joint = self.withdrawn(together, consumers(together, self.regions.values()))
            if joint is not None:
                self.pardon(together, joint)
                return True
        self._convict(group)
        return True

    def _settles_below(self, below: list[Region]) -> bool:
        """Pardon or convict a claim below that fails for its own reason, and says nothing of those above it."""
        for region in below:
            claim = region.claim
            if claim not in self.failing or claim in self.decided() or claim.output:
                continue
            withdrawn = self.withdrawn([claim], consumers([claim], self.regions.values()))
            if withdrawn is not None:
                self.pardon([claim], withdrawn)
                return True
        return False

    def _are_halves(self, claim: Claim) -> bool:
        """Withdraw a claim that takes away most of what those below it differ by: they are halves of one rewrite.

        Independent defects add up. Halves take each other away, and what they leave is the defect: a batch norm folded
        into a convolution with one wrong scale is no wrong convolution and a batch norm forgotten. What fails below by
        as much as before may be a half itself, and is withdrawn, too.
        """
        halves = [claim]
        for _ in range(ROUNDS):
            alone = [self.failing[c].exact for c in halves]
            if any(c.output for c in halves) or any(size is None for size in alone):
                return False
            least = min(size for size in alone if size is not None)
            left = self.without(halves, consumers(halves, self.regions.values()))[1]
            standing = [c for c, answer in left.items() if not self._is_left_over(c, answer, least)]
            if not standing:
                self.withdraw(halves, "half of a rewrite: what it feeds is judged instead")
                return True
            if any(c not in self.failing or c in self.decided() for c in standing):
                return False
            halves.append(min(standing, key=lambda c: self.replay.plan.after.order[c.after]))
        return False

    def _is_folded(self, claim: Claim) -> bool:
        """Withdraw a claim of one operator on other weights, below which only before goes on: the rest is folded in.

        What is folded wrongly may leave as much as each half differs by. But one finding over the whole says what is
        the case: a batch norm or an adapter was folded into a weight, and not rightly.
        """
        region, below = self.regions[claim], consumers([claim], self.regions.values())
        if claim.certain or claim.output or not other_weights(region, self.weights):
            return False
        failing = [r for r in below if r.claim in self.failing and r.claim not in self.decided()]
        if not failing or len(failing) < len(below) or any(r.size("before") <= r.size("after") for r in failing):
            return False
        alone = [self.failing[c].exact for c in (claim, *(r.claim for r in failing))]
        most = max((size for size in alone if size is not None), default=0.0)
        left = self.without([claim], below)[1]
        if any(answer.exact is None or answer.exact > most for answer in left.values()):
            return False
        self.withdraw([claim], "half of a rewrite: what it feeds is judged instead")
        return True

    def _is_left_over(self, claim: Claim, answer: Sameness, least: float) -> bool:
        alone = self.failing[claim].exact if claim in self.failing else None
        return answer.exact is not None and alone is not None and answer.exact <= HALF * min(least, alone)

    def _wrong_together(self, group: list[Claim]) -> bool:
        """Pardon a group of claims that were inferred one from the other and are wrong together."""
        together = list(group)
        for _ in range(ROUNDS):
            if any(c.output or c.certain for c in together) or len(together) > LARGEST_GROUP:
                return False
            below = consumers(together, self.regions.values())
            regions, failing = self.without(together, below)
            if not failing:
                self.pardon(together, regions)
                return True
            together = [*together, *failing]
        return False

    def _convict(self, group: list[Claim]) -> None:
        """Every claim of the group is a finding; but while some only rest on a guess, the first of those is taken for
        wrong and withdrawn: what it fed is judged on the frontier above it, and the rest waits for its turn."""
        if self._meets_below(group) or (len(group) > 1 and any(self._is_folded(c) for c in group)):
            return
        if any(self._straight_above(c, other=1) for c in group):
            return
        if any(self._nobody_meant_a_layout(claim, group) for claim in group):
            return
        wrong = self._wrong_guess(group) if len(group) > 1 else None
        if wrong is not None:
            self.withdraw([wrong], "wrong claim: what it feeds is judged instead")
        else:
            self.settled.guilty.update(dict.fromkeys(group, ""))

    def _nobody_meant_a_layout(self, claim: Claim, group: list[Claim]) -> bool:
        """Withdraw the layouts that a failing region starts from, if it agrees without them and, where several claims
        fail together, these do."""
        layouts = denied(self.replay, self.regions[claim], self.active.claims)
        if layouts and (len(group) == 1 or all(c in group for c in layouts)):
            self.withdraw(layouts, "wrong claim: nobody meant the other layout")
            return True
        return False

    def _wrong_guess(self, group: list[Claim]) -> Claim | None:
        """Return the first guess of the group that nothing speaks for: what it feeds does not begin to fail without it.

        A claim below which all agrees is a good place to cut, wherever the defect is: withdrawn, it would hand the
        failure on to what it feeds, and that in turn, down to the outputs.
        """
        for claim in group:
            if claim.evidence not in GUESSED or claim.output or claim.certain:
                continue
            agreed = [r for r in consumers([claim], self.regions.values()) if r.claim not in self.failing]
            if not self.without([claim], agreed, first=True)[1]:
                return claim
        return None

    def _meets_below(self, group: list[Claim]) -> bool:
        """Pardon a group that something further down than the next claims makes good."""
        if any(c.output for c in group):
            return False

        differences = [self.failing[c].exact for c in group if c in self.failing]
        # halves that compensate leave next to nothing of what each of them does
        rounded = _LEFT * max((d for d in differences if d is not None), default=math.inf)

        def fails(between: list[Claim], below: list[Region]) -> list[Region]:
            regions, failing = self.without(between, below, rounded=rounded)
            return [r for r in regions if r.claim in failing]

        with self.replay.remembering():
            together = meeting(group, self.regions, self.rows, fails)
        if together is None:
            return False
        below = consumers(together, self.regions.values())
        self.pardon(together, self.without(together, below)[0])
        return True

    def _siblings(self, group: list[Claim], below: list[Region]) -> list[Claim]:
        """Return the other failing claims that feed the same regions."""
        feeding = {pair for r in below for pair in r.frontier}
        decided = self.decided()
        return [
            c
            for c in self.active.claims
            if c in self.failing and c not in group and c not in decided and (c.before, c.after) in feeding
        ]

    def _grow(self, group: list[Claim], below: list[Region]) -> list[Claim]:
        failing_below = [r.claim for r in below if r.claim in self.failing and r.claim not in self.decided()]
        feeding = self._siblings(group, below)
        return list(dict.fromkeys([*group, *failing_below, *feeding]))

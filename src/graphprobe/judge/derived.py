"""Rule 1 where the frontier holds a value and what was computed from it: ask once more from the value alone.

The exact lanes start from before's native values, and a mean at the frontier is a *rounded* mean. Two ways to write a
variance, ``mean((x - m)^2)`` and ``mean(x^2) - m^2``, are one function of ``x``, but not of ``x`` and a rounded ``m``.
So a region that fails is asked again with the *derived* pairs withdrawn: those that both sides compute from other pairs
of the frontier within a few operations. Their own claims are judged by themselves and must not fail.

A defect between ``x`` and ``m`` is found at ``m``. One behind them is still there when ``m`` is computed exactly, as
large as before; what is due to rounding falls by orders of magnitude, and only that is believed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Alignment, Claim
from graphprobe.judge.function import same_function
from graphprobe.judge.masked import without_masked_rows
from graphprobe.judge.same import RULE, Sameness, ask, difference, rms
from graphprobe.lanes.regions import SMALL, Region, Regions
from graphprobe.lanes.replay import Replay

LARGEST = 2 * SMALL  # value-making operations of a region that is asked from further up
STEPS = (4, SMALL)  # what is withdrawn: first only what is near, a mean or a root, then a whole branch of a residual
_SHARE = 100.0  # a difference more than so many times what rounding of the derived values moves is none of rounding
_FALLS = 1e-3  # what is left of the difference when the derived values are no longer rounded, at most
NOTE = "what the frontier held twice was computed again: {}"


@dataclass
class Looks:
    """Asks regions for sameness, and remembers which of them agree only from further up."""

    replay: Replay
    wider: dict[Claim, Region] = field(default_factory=dict)  # claim -> the region that agrees
    asked: dict[Hashable, Sameness] = field(default_factory=dict)  # what rule 1 said of a region: withdrawals ask often
    _known: tuple[Alignment, Regions] | None = None  # what finds regions under the alignment that was asked last

    def aside(self) -> Looks:
        """Return looks of their own for a trial: nothing is withdrawn yet, and what was asked need not be again."""
        return Looks(self.replay, asked=self.asked)

    def ask(
        self, region: Region, alignment: Alignment, failing: Collection[Claim] = (), rounded: float | None = None
    ) -> Sameness:
        """Answer rule 1 for a region; its frontier must have been fetched. `failing` claims are not believed.

        Where `rounded` is given, only a relative difference up to it may be due to a rounded value, and the answer is
        a hasty one (see `judge.same.ask`).
        """
        self.wider.pop(region.claim, None)
        answer = self._same_function(region, rounded is not None)
        if answer.same is not False or answer.rule != RULE or answer.where == "shape":
            return answer
        if rounded is not None and answer.exact is not None and answer.exact > rounded:
            return answer
        if not answer.wrong_class and not _may_be_rounding(self.replay, region, answer):
            return answer
        for wide, withdrawn in self._further_up(region, alignment, failing):
            self.replay.fetch_frontiers([wide])
            again = _asked_again(self.replay, wide, answer, hasty=rounded is not None)
            if again.same is True:
                self.wider[region.claim] = wide
                names = ", ".join(dict.fromkeys(self.replay.plan.after.label(c.after) for c in withdrawn))
                return dataclasses.replace(again, note=NOTE.format(names))
        return answer

    def _same_function(self, region: Region, hasty: bool) -> Sameness:
        mask = self.replay.mask(region.claim.before, region.claim.after)
        left_out = int(mask.sum()) if mask is not None else 0
        key = (region.claim, region.before, region.after, frozenset(region.frontier), hasty, left_out)
        if key not in self.asked:
            self.asked[key] = same_function(self.replay, region, hasty=hasty)
        return self.asked[key]

    def _further_up(
        self, region: Region, alignment: Alignment, failing: Collection[Claim]
    ) -> Iterator[tuple[Region, list[Claim]]]:
        """Yield the region without derived pairs at its frontier, and the claims withdrawn for it: near ones first."""
        seen, finder = 0, self._finder(alignment)
        for steps in STEPS:
            wide, withdrawn = region, list[Claim]()
            while derived := derived_pairs(wide, steps):  # what lies above may be derived from the rest, too
                claims = [c for c in alignment.claims if (c.before, c.after) in derived and c not in withdrawn]
                if not claims or any(c in failing for c in claims):
                    return
                withdrawn += claims
                wide = finder.without(withdrawn).region(region.claim)
                if max(wide.size("before"), wide.size("after")) > LARGEST:
                    return
            if len(withdrawn) > seen:
                seen = len(withdrawn)
                yield wide, withdrawn

    def _finder(self, alignment: Alignment) -> Regions:
        if self._known is None or self._known[0] is not alignment:
            self._known = (alignment, Regions(self.replay.plan.before, self.replay.plan.after, alignment))
        return self._known[1]


def _may_be_rounding(replay: Replay, region: Region, answer: Sameness) -> bool:
    """Whether the rounding of the derived values can move either side by as much as the sides differ (cheap to ask)."""
    rounded = {}
    noise = torch.Generator().manual_seed(0)
    befores = {p for p, _ in region.frontier}
    for p, _ in derived_pairs(region):
        value = replay.values[p]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            xi = torch.rand(value.shape, generator=noise, dtype=torch.float64) * 2 - 1
            rounded[p] = value.double() * (1 + _roundoff(p, befores - {p}) * xi.to(value.device))
    if not rounded:
        return False
    largest = 0.0
    for side in ("before", "after"):
        plain, moved = replay.exact(side, region), replay.exact(side, region, given=rounded)
        change, kept, wrong = difference(replay, region, plain, moved)
        if bool(wrong.any()):
            return True
        largest = max(largest, rms(change) / size if (size := rms(kept)) > 0 else math.inf)
        if answer.exact is None or answer.exact <= _SHARE * largest:
            return True
    return False


def _asked_again(replay: Replay, wide: Region, answer: Sameness, hasty: bool) -> Sameness:
    """Ask rule 1 of a region from further up, and of no more than what is left of a difference that was rounding.

    No other rule is asked: what it excuses there it has not excused here. Elements that were not even finite, or of
    which the difference is not known, need only agree.
    """
    most = math.inf if answer.wrong_class or answer.exact is None else _FALLS * answer.exact
    again = ask(replay, wide, hasty=hasty, most=most)
    if again.same is not False or (again.exact is not None and again.exact > most):
        return again
    masked = without_masked_rows(replay, wide, again)
    return masked if masked.exact is None or masked.exact <= most else again


def derived_pairs(region: Region, steps: int = SMALL) -> set[tuple[Node, Node]]:
    """Return the pairs of the frontier that both sides compute from others, in at most `steps` operations."""
    befores, afters = {p for p, _ in region.frontier}, {q for _, q in region.frontier}
    return {
        (p, q) for p, q in region.frontier if _stands_on(p, befores - {p}, steps) and _stands_on(q, afters - {q}, steps)
    }


def _stands_on(node: Node, others: Collection[Node], steps: int) -> bool:
    """Whether a node is computed from `others` (and weights, and inputs of the graph) by at most `steps` operations."""
    between, met = _between(node, others, steps)
    return met and sum(nodes.makes_values(n) for n in between) <= steps


def _roundoff(node: Node, others: Collection[Node]) -> float:
    """Return the unit roundoff of the coarsest operation by which a node is computed from `others`."""
    values = [nodes.tensor_val(n) for n in _between(node, others, SMALL)[0]]
    return max((torch.finfo(v.dtype).eps / 2 for v in values if v is not None and v.is_floating_point()), default=0.0)


def _between(node: Node, others: Collection[Node], steps: int) -> tuple[set[Node], bool]:
    """Return the node and what it is computed from below `others`, and whether it meets any; stops beyond `steps`."""
    stack, seen, met, making = [node], {node}, False, 1
    while stack and making <= steps:
        for operand in stack.pop().all_input_nodes:
            if operand in others:
                met = True
            elif operand not in seen:
                seen.add(operand)
                stack.append(operand)
                making += nodes.makes_values(operand)
    return seen, met

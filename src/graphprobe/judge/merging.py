"""Findings of one cause become one finding. Each way in which two findings can be one has its function and its reason.

Two mistakes in neighbouring operations stay two: that they touch, or stand in one module, is no reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.judge import exchange
from graphprobe.judge.culprit import Culprit, culprit, renumbered, share_a_split
from graphprobe.judge.explain import explain
from graphprobe.judge.hints import orders
from graphprobe.judge.hints.look import Look
from graphprobe.judge.judging import Judged, Judgement
from graphprobe.lanes.regions import Region
from graphprobe.records import Finding

Found = list[tuple[Judged | None, Finding]]


@dataclass(frozen=True, eq=False)
class Cause:
    """What is known of a finding's cause: its region, as it is shown, and what was found to differ there."""

    judged: Judged
    kind: str
    region: Region
    culprit: Culprit
    taken: frozenset[tuple[Node, Node]]  # what before takes, what after takes in its place, if nothing else differs
    circle: exchange.Circle | None
    numbers: tuple[tuple[object, object], ...] | None  # what before has, what after has in its place
    claimed: frozenset[tuple[Node, Node]]
    places: tuple[float, float] | None = None  # of a part: where it should begin, and where it does, 0..1

    @property
    def home(self) -> str:
        """The module of the named operation."""
        return provenance.module_path(self.culprit.node)


def merged(judgement: Judgement, found: Found) -> Found:
    """Join findings of one cause; the first in after's order stands for all."""
    causes = _causes(judgement, found)
    groups: list[tuple[list[int], str]] = []  # places of findings, and why they are one
    for place, cause in causes.items():
        reasons = [next((r for p in group if (r := _one_cause(causes[p], cause))), None) for group, _ in groups]
        same = [(group, why or r) for (group, why), r in zip(groups, reasons, strict=True) if r]
        groups = [one for one, r in zip(groups, reasons, strict=True) if not r]
        groups.append(([*(p for group, _ in same for p in group), place], next((why for _, why in same), "")))
    standing = {min(group): (sorted(group), why) for group, why in groups}
    out: Found = []
    for place, (judged, finding) in enumerate(found):
        if place not in causes:
            out.append((judged, finding))
        elif place in standing:
            group, why = standing[place]
            out.append(_joined(judgement, finding, [causes[p] for p in group], why) if why else (judged, finding))
    return out


def _causes(judgement: Judgement, found: Found) -> dict[int, Cause]:
    asked = [(place, j, f.kind) for place, (j, f) in enumerate(found) if j and f.kind in ("semantic", "precision")]
    regions = [tight(judgement, j.region) for _, j, _ in asked]
    culprits = [culprit(region, judgement.weights) for region in regions]
    taken = [exchange.substitutions(region, judgement.weights) for region in regions]
    places: list[tuple[float, float] | None] = [None] * len(regions)
    if len(regions) > 1:  # what is written otherwise cannot be read: it is tried
        judgement.replay.fetch_frontiers([j.region for _, j, _ in asked])
        looks = [Look(judgement.replay, j.region, guilty) for (_, j, _), guilty in zip(asked, culprits, strict=True)]
        every = zip(taken, looks, regions, strict=True)
        taken = [found or exchange.tried(look, region) for found, look, region in every]
        places = [_places(look) for look in looks]
    circles = exchange.circles(taken)
    claimed = frozenset((c.before, c.after) for c in judgement.alignment.claims)
    out = {}
    for i, (place, judged, kind) in enumerate(asked):
        instead, numbers = frozenset(taken[i]), renumbered(regions[i], culprits[i])
        out[place] = Cause(judged, kind, regions[i], culprits[i], instead, circles[i], numbers, claimed, places[i])
    return out


def _places(look: Look) -> tuple[float, float] | None:
    """Return where a part that is claimed should begin, and where it does."""
    claim = look.region.claim
    if not any(n.meta.get(nodes.PART) for n in (claim.before, claim.after)):
        return None
    found = orders.elsewhere(look)
    return None if found is None else found.places


# --- the ways in which two findings are one -----------------------------------------------------------------------


def _same_operation(one: Cause, other: Cause) -> bool:
    """What nothing claims shows in every region it feeds, and operations in another order are missing here and too
    much there."""
    mine, theirs = one.culprit, other.culprit
    if mine.node in theirs.lone or theirs.node in mine.lone:
        return True
    if (mine.node, theirs.node) in one.claimed or (theirs.node, mine.node) in one.claimed:
        return True
    first, second = one.judged.region.claim, other.judged.region.claim
    return mine.node in (second.before, second.after) or theirs.node in (first.before, first.after)


def _same_split(one: Cause, other: Cause) -> bool:
    """Parts of one value that are taken otherwise are one mistake: the split."""
    mine, theirs = one.culprit, other.culprit
    return mine.side == theirs.side and share_a_split(mine.node, theirs.node)


def _moved(one: Cause, other: Cause) -> bool:
    """An operation is missing in one place of a module and too much in another."""
    mine, theirs = one.culprit, other.culprit
    if mine.side == theirs.side or mine.node.target is not theirs.node.target or not one.home:
        return False
    return one.home == other.home


def _exchanged(one: Cause, other: Cause) -> bool:
    """Operands that take each other's places (see `judge.exchange`)."""
    return one.circle is not None and one.circle == other.circle


def _same_instead(one: Cause, other: Cause) -> bool:
    """One value is taken in place of another one wherever that should be: what makes it is passed by."""
    return bool(one.taken) and one.taken == other.taken


def _same_number(one: Cause, other: Cause) -> bool:
    """One number of a module, a count or a width, is another one wherever it stands."""
    return one.numbers is not None and one.numbers == other.numbers and bool(one.home) and one.home == other.home


def _same_shard(one: Cause, other: Cause) -> bool:
    """What a shard computes from one value is another shard's: its keys, and its values, too."""
    sources = {p for p, _ in one.region.frontier} & {p for p, _ in other.region.frontier}
    return one.places is not None and one.places == other.places and bool(sources)


_SHOWS = "the same operation also shows in"
#: Whether two findings are one, and how the report says so.
WAYS: tuple[tuple[Callable[[Cause, Cause], bool], str], ...] = (
    (_same_operation, _SHOWS),
    (_same_split, _SHOWS),
    (_moved, _SHOWS),
    (_exchanged, "operands take each other's places, also in"),
    (_same_instead, "the same operand is also taken in"),
    (_same_number, "the same number also differs in"),
    (_same_shard, "another shard's part is also taken in"),
)


def _one_cause(one: Cause, other: Cause) -> str | None:
    """Return how to say that two findings are one, or None."""
    if one.kind != other.kind:
        return None
    return next((words for holds, words in WAYS if holds(one, other)), None)


def _joined(judgement: Judgement, finding: Finding, group: list[Cause], why: str) -> tuple[Judged, Finding]:
    first, others = group[0].judged, [c.judged for c in group[1:]]
    after = judgement.replay.plan.after
    labels = [after.label(other.region.claim.after) for other in others]
    shown = ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")
    hint = "; ".join(h for h in (finding.hint, f"{why} {shown}") if h)
    whole = dataclasses.replace(first, cured_by=_replaced(judgement, group))
    worst = max((c.judged for c in group), key=lambda j: j.measured.introduced or 0.0)
    m = worst.measured  # what it does where it shows most: a bound that accepts a finding must hold everywhere
    joined = dataclasses.replace(
        finding, hint=hint, introduced=m.introduced, total=m.total, exact=m.exact, floor=m.floor, spread=worst.spread
    )
    return whole, dataclasses.replace(joined, explanation=explain(joined))


def _replaced(judgement: Judgement, group: list[Cause]) -> tuple[Region, ...]:
    """Return the regions that must be put right together."""
    circle = group[0].circle
    if circle is None or any(c.circle != circle for c in group):
        return tuple(c.judged.region for c in group)
    plan = judgement.replay.plan
    return exchange.around(circle, [c.region for c in group], judgement.alignment, plan.before, plan.after)


def tight(judgement: Judgement, region: Region) -> Region:
    """Return what of a region to show: neither piece reaches beyond a claim that agrees.

    A frontier must be consumed on both sides to be judged from; to be shown, it is enough that one side passes it.
    """
    failing = judgement.settled.guilty.keys()
    claims = [c for c in judgement.alignment.claims if c.cut and c not in failing and c is not region.claim]
    partners = {c.before: c.after for c in claims}, {c.after: c.before for c in claims}
    known = set(region.frontier)
    pieces = []
    for side, partner in zip(("before", "after"), partners, strict=True):
        inside = set(getattr(region, side))
        piece, stack = set(), [getattr(region.claim, side)]
        while stack:
            node = stack.pop()
            if node not in inside or node in piece:
                continue
            if node in partner and node is not getattr(region.claim, side):
                known.add((node, partner[node]) if side == "before" else (partner[node], node))
                continue
            piece.add(node)
            stack.extend(node.all_input_nodes)
        pieces.append(tuple(n for n in getattr(region, side) if n in piece))
    return dataclasses.replace(region, before=pieces[0], after=pieces[1], frontier=tuple(known))

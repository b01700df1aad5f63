"""Alignment: which node of `after` must equal which of `before`, and how we know. One file per kind of evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import Node

from graphprobe import nodes
from graphprobe.align import (
    addends,
    alike,
    anchors,
    codes,
    counterparts,
    forced,
    identity,
    layouts,
    occurrence,
    orders,
    rows,
    siblings,
    sliced,
    slices,
    slots,
    structure,
    values,
)
from graphprobe.align import events as events_
from graphprobe.align.claims import Alignment, Claim
from graphprobe.align.forms import OTHER, moved_along
from graphprobe.align.leftovers import MET, explained, leftovers
from graphprobe.align.matching import Matching
from graphprobe.program import Program
from graphprobe.records import ClaimRecord, Replacement

__all__ = [
    "MET",
    "OTHER",
    "Alignment",
    "Claim",
    "Matching",
    "align",
    "explained",
    "leftovers",
    "match",
    "moved_along",
    "record",
]

Evidence = Callable[[Matching], None]

#: These grow from what is claimed, so they are asked in turn until none adds anything; the strongest first.
SURE: tuple[Evidence, ...] = (structure.claim,)
#: Asked once each, only where the graphs may be run.
VALUES: tuple[Evidence, ...] = (orders.claim, values.claim, codes.claim, layouts.claim, slices.claim, rows.claim)
TIGHT_VALUES: tuple[Evidence, ...] = (values.claim_tightly,)
#: What only guesses comes after the values have been asked: a wrong guess misleads all that grows from it.
GUESSES: tuple[Evidence, ...] = (
    structure.claim,
    siblings.claim,
    anchors.claim_weighted,
    occurrence.claim_single,
    structure.claim_operands,
    occurrence.claim_handed_on,
    anchors.claim_weighted_anyhow,
    counterparts.claim,
    addends.claim,
    sliced.claim,
    structure.claim_undecided,
    slots.claim,
    occurrence.claim,
    structure.claim_again,
)


def match(
    before: Program,
    after: Program,
    events: Sequence[Replacement] = (),
    bound: Mapping[str, Any] | None = None,
) -> Matching:
    """Claim as `align` does, and return all that was found out on the way."""
    return _completed(_certain(Matching(before, after, bound), events))


def _completed(matching: Matching) -> Matching:
    """Ask all evidence that does not come first."""
    matching = _grown(matching)
    if matching.bound is not None:
        _ask_values(matching)
    _grow(matching, GUESSES)
    _claim_outputs(matching)
    matching.alignment.sort(matching.after.order)
    return matching


def _ask_values(matching: Matching) -> None:
    """Run both sides and ask what their values say.

    Where what plays the same part holds other values, there may be a defect, and a defect may do next to nothing: then
    what lies behind it is nearly what lies before it. So only what agrees to the last digits is believed until `after`
    has gone on from before's values.
    """
    _ask(matching, (orders.claim,))
    known = len(matching.alignment.claims)
    _ask(matching, (values.claim,))
    if matching.unclaimed_before() and matching.unclaimed_after() and counterparts.counterparts(matching):
        matching.forget(known)
        _ask(matching, TIGHT_VALUES)
        forced.claim(matching, lambda: _ask(matching, TIGHT_VALUES))
    _ask(matching, VALUES)
    forced.claim(matching, lambda: _ask(matching, VALUES))


def _ask(matching: Matching, kinds: Sequence[Evidence]) -> None:
    for evidence in kinds:
        if matching.unclaimed_before() or matching.unclaimed_after():
            evidence(matching)
            _grow(matching, SURE)


def align(
    before: Program,
    after: Program,
    events: Sequence[Replacement] = (),
    bound: Mapping[str, Any] | None = None,
) -> Alignment:
    """Claim all that evidence allows; graph outputs are always claimed. Without `bound` inputs nothing is run."""
    return match(before, after, events, bound).alignment


def quick(
    before: Program, after: Program, events: Sequence[Replacement] = (), bound: Mapping[str, Any] | None = None
) -> Alignment | None:
    """Align where structure claims all of `after`, so that nothing need be written into a copy; else None."""
    matching = _certain(Matching(before, after, bound), events)
    if alike.in_order(matching):
        matching = _grown(matching)
    return None if matching.unclaimed_after() else _completed(matching).alignment


def record(claim: Claim, before: Program, after: Program) -> ClaimRecord:
    """Write a claim down by the names its nodes have for the user."""
    names = before.label(claim.before), after.label(claim.after)
    return ClaimRecord(*names, claim.evidence, claim.certain, claim.confidence, claim.view)


def _certain(matching: Matching, events: Sequence[Replacement]) -> Matching:
    events_.claim(matching, events)
    identity.claim(matching)
    return matching


def _grown(matching: Matching) -> Matching:
    """Ask for structure, which looks at no value and writes into no graph."""
    _grow(matching, SURE)
    alike.claim(matching, lambda m: _grow(m, SURE))
    return matching


def _grow(matching: Matching, kinds: Sequence[Evidence]) -> None:
    """Ask the growing kinds of evidence in turn; after each success the strongest has the word again."""
    while matching.unclaimed_after() or matching.unclaimed_before():
        for evidence in kinds:
            known = len(matching.alignment.claims)
            evidence(matching)
            if len(matching.alignment.claims) > known:
                break
        else:
            return


def _claim_outputs(matching: Matching) -> None:
    """Claim every pair of outputs; where a cut already stands on that very pair, it only learns the path."""
    alignment = matching.alignment
    for path, x, y in output_pairs(matching.before, matching.after):
        if nodes.shape(x) != nodes.shape(y) and matching.bound is not None:
            x, y = slices.output(matching, x, y) or (x, y)
        standing = next((c for c in alignment.of_after.get(y, ()) if c.before is x and c.after is y), None)
        cut = standing is not None and standing.cut
        claim = Claim(x, y, standing.evidence if standing else "output", True, path, cut)
        if standing is not None:
            alignment.claims.remove(standing)
            alignment.of_before[x].remove(standing)
            alignment.of_after[y].remove(standing)
        alignment.add(claim)


def output_pairs(before: Program, after: Program) -> list[tuple[str, Node, Node]]:
    """Pair the outputs by path, or by position where paths differ; an input handed through on both sides is none."""
    if set(before.outputs) & set(after.outputs):
        pairs = [(p, x, after.outputs[p]) for p, x in before.outputs.items() if p in after.outputs]
    else:
        mine, theirs = ([*one.outputs.items()] for one in (before, after))
        both = zip(*([o for o in side if not o[0].startswith(STATE)] for side in (mine, theirs)), strict=False)
        pairs = [(p, x, y) for (p, x), (_, y) in both]
    pairs += _states(before, after)
    same = {(x, after.inputs.get(p)) for p, x in before.inputs.items()}
    return [(p, x, y) for p, x, y in pairs if _may_be_tensor(x) and _may_be_tensor(y) and (x, y) not in same]


STATE = "state:"  # what is written in place is an output of that name


def _states(before: Program, after: Program) -> list[tuple[str, Node, Node]]:
    """Pair what both sides write under other names: buffers with buffers and inputs with inputs, in order, where shapes
    and number agree."""
    pairs = []
    for given in (False, True):
        mine, theirs = _written(before, after, given), _written(after, before, given)
        if [nodes.shape(x) for _, x in mine] == [nodes.shape(y) for _, y in theirs]:
            pairs += [(p, x, y) for (p, x), (_, y) in zip(mine, theirs, strict=True)]
    return pairs


def _written(one: Program, other: Program, given: bool) -> list[tuple[str, Node]]:
    """Return the state that is written on one side under a name that the other does not write."""
    inputs = {STATE + name for path, node in one.inputs.items() for name in (path, node.name)}
    found = [(p, n) for p, n in one.outputs.items() if p.startswith(STATE) and p not in other.outputs]
    return [(p, n) for p, n in found if (p in inputs) == given]


def _may_be_tensor(node: Node) -> bool:
    return nodes.tensor_val(node) is not None or "val" not in node.meta

"""Alignment: which node of `after` must equal which of `before`, and how we know. One file per kind of evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import Node

from graphprobe import nodes
from graphprobe.align import anchors, casts, codes, identity, layouts, occurrence, structure, values
from graphprobe.align import events as events_
from graphprobe.align.claims import Alignment, Claim
from graphprobe.program import Program
from graphprobe.records import Replacement

__all__ = ["Alignment", "Claim", "align"]

Evidence = Callable[[Program, Program, Alignment], None]

#: Strongest first. Each takes the two programs and what is claimed already, and adds to it.
EVIDENCE = (identity.claim, occurrence.claim)
#: These grow from what is claimed, so they are asked in turn until none adds anything. What only guesses comes after
#: the values have been asked: a wrong guess misleads all that grows from it.
SURE = (structure.claim, casts.claim)
GUESSES = (structure.claim, casts.claim, structure.claim_slots, anchors.claim)


def align(
    before: Program,
    after: Program,
    events: Sequence[Replacement] = (),
    bound: Mapping[str, Any] | None = None,
) -> Alignment:
    """Claim all that evidence allows; graph outputs are always claimed. Without `bound` inputs nothing is run."""
    alignment = _certain(before, after, events)
    _grow(before, after, alignment, SURE)
    if bound is not None:
        values.claim(before, after, alignment, bound)
        _grow(before, after, alignment, SURE)
        codes.claim(before, after, alignment, bound)
        _grow(before, after, alignment, SURE)
        layouts.claim(before, after, alignment, bound)
    _grow(before, after, alignment, GUESSES)
    _claim_outputs(before, after, alignment)
    alignment.sort(after.order)
    return alignment


def is_quick(before: Program, after: Program, events: Sequence[Replacement] = ()) -> bool:
    """Whether events, ids and occurrences claim all there is, so that nothing need be run or written into a copy."""
    return not _unclaimed(after, _certain(before, after, events))


def _certain(before: Program, after: Program, events: Sequence[Replacement]) -> Alignment:
    alignment = Alignment()
    events_.claim(before, after, alignment, events)
    for evidence in EVIDENCE:
        evidence(before, after, alignment)
    return alignment


def _unclaimed(after: Program, alignment: Alignment) -> bool:
    return any(nodes.makes_values(n) and not alignment.of_after.get(n) for n in after.live)


def _grow(before: Program, after: Program, alignment: Alignment, kinds: Sequence[Evidence]) -> None:
    """Ask the growing kinds of evidence in turn; after each success the strongest has the word again."""
    while _unclaimed(after, alignment):
        for evidence in kinds:
            known = len(alignment.claims)
            evidence(before, after, alignment)
            if len(alignment.claims) > known:
                break
        else:
            return


def _claim_outputs(before: Program, after: Program, alignment: Alignment) -> None:
    """Claim every pair of outputs; where a cut already stands on that very pair, it only learns the path."""
    for path, x, y in output_pairs(before, after):
        standing = next((c for c in alignment.of_after.get(y, ()) if c.before is x), None)
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
        both = zip(before.outputs.items(), after.outputs.values(), strict=False)
        pairs = [(p, x, y) for (p, x), y in both]
    same = {(x, after.inputs.get(p)) for p, x in before.inputs.items()}
    return [(p, x, y) for p, x, y in pairs if _may_be_tensor(x) and _may_be_tensor(y) and (x, y) not in same]


def _may_be_tensor(node: Node) -> bool:
    return nodes.tensor_val(node) is not None or "val" not in node.meta

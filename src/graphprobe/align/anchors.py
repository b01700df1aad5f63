"""Evidence 4, weights: what is computed with a weight that both sides hold is a place that both sides share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.expressions import Expression
from graphprobe.align.matching import Matching, shown_as
from graphprobe.align.numbering import Place
from graphprobe.align.steps import Step
from graphprobe.align.terms import Terms


def claim_weighted(matching: Matching) -> None:
    """Claim the one operation on a weight that the same operator on the same weight claims nowhere else."""
    _claim_anchors(matching, with_operator=True)


def claim_weighted_anyhow(matching: Matching) -> None:
    """Claim the one operation on a weight, whatever its operator: a norm written out, and one operator for it."""
    _claim_anchors(matching, with_operator=False)


def _claim_anchors(matching: Matching, with_operator: bool) -> None:
    left = _anchors(matching, "before", with_operator)
    right = _anchors(matching, "after", with_operator)
    terms = matching.terms("after")
    for place, ys in right.items():
        xs = left.get(place, [])
        if len(xs) != 1 or len(ys) != 1:
            continue
        x, y = xs[0], shown_as(ys[0], nodes.shape(xs[0]), terms)
        if y is None:
            x, y = shown_as(xs[0], nodes.shape(ys[0]), matching.terms("before")), ys[0]  # type: ignore[assignment]
        if x is None or matching.alignment.of_before.get(x) or matching.alignment.of_after.get(y):
            continue
        if not matching.alignment.of_before.get(xs[0]) and not matching.alignment.of_after.get(ys[0]):
            matching.add(x, y, "weight")


def _anchors(matching: Matching, side: str, with_operator: bool) -> dict[Place, list[Node]]:
    terms = matching.terms(side)
    numbers = matching.numbers(side)
    found: dict[Place, list[Node]] = defaultdict(list)
    for node in matching.makers(side):
        term = terms.of[node]
        if term.step is not None:
            continue
        weights = [terms.root(n)[0] for n in term.operands]
        weights = [n for n in weights if terms.is_weight(n)]
        if not weights or len(weights) == len(term.operands):
            continue
        place: Place = tuple(sorted(matching.weight(side, n) for n in weights))
        if with_operator:
            place = _pattern(matching, term.expression, term.operands, terms, numbers)
        found[(*place, nodes.elements(node))].append(node)
    return found


def _pattern(
    matching: Matching, expression: Expression, operands: Sequence[Node], terms: Terms, numbers: dict[Node, int]
) -> Place:
    """Write an expression with its weights by number and everything else left open."""
    children: list[Any] = []
    for child in expression[2:]:
        step: Step = ()
        if isinstance(child, tuple) and child[0] == "turned" and isinstance(child[2], int):
            _, step, child = child
        if isinstance(child, tuple):
            children.append(_pattern(matching, child, operands, terms, numbers))
        else:
            is_weight = terms.is_weight(terms.root(operands[child])[0])
            children.append(matching.turned(numbers[operands[child]], step) if is_weight else "_")
    return (*expression[:2], *children)

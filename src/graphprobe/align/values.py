"""Evidence 5, values: run both graphs; nodes that hold the same numbers claim each other.

Two values agree where their sketches agree to a few percent (accumulated rounding stays below, anything else is far
above) and nothing else is nearly as near, on either side. What is constant, and what several unrelated nodes hold, is
never claimed on values alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.matching import Matching, is_part, shown_as
from graphprobe.align.neighbours import FLOOR, SAME, Near, nearest
from graphprobe.align.sketches import evened

AGREE = 0.05  # relative distance of two sketches that counts as equal, where something is computed in 16 bits or less
AGREE_FINE = 1e-3  # where nothing is
TIGHT = 6e-3  # the same, where there must be no doubt: what rounds once or twice
TIGHT_FINE = 2e-6
_NEARLY = 0.25  # so far apart may be, by a defect, what plays the same part


def claim(matching: Matching) -> None:
    """Claim unclaimed nodes by what they hold when both graphs run on the same inputs."""
    _claim(matching, AGREE if matching.is_coarse() else AGREE_FINE)


def claim_tightly(matching: Matching) -> None:
    """Claim only what agrees to the last digits."""
    _claim(matching, TIGHT if matching.is_coarse() else TIGHT_FINE)


def _claim(matching: Matching, agree: float) -> None:
    left, right = matching.sketches("before"), matching.sketches("after")
    of_before, of_after = matching.alignment.of_before, matching.alignment.of_after
    groups: dict[Any, tuple[list[Node], list[Node]]] = defaultdict(lambda: ([], []))
    for column, (known, claimed) in enumerate(((left, of_before), (right, of_after))):
        for node, sketch in known.items():
            if not claimed.get(node):
                groups[_count(node), sketch.numel()][column].append(node)
    for xs, ys in groups.values():
        if xs and ys:
            a, b = (evened(torch.stack([known[n] for n in group])) for known, group in ((left, xs), (right, ys)))
            rows = {**dict(zip(xs, a, strict=True)), **dict(zip(ys, b, strict=True))}
            for x, y in _uncrossed(matching, _pairs(matching, xs, ys, nearest(a, b, agree)), rows):
                if not (is_part(x) and is_part(y)):
                    _add(matching, x, y)


def _count(node: Node) -> int:
    value = nodes.tensor_val(node)
    return -1 if value is None else int(value.numel())


def _add(matching: Matching, x: Node, y: Node) -> None:
    """Claim a pair that holds the same in flat order; where shapes differ, a view that is there already, if any."""
    if nodes.shape(x) == nodes.shape(y):
        matching.add(x, y, "value")
    elif (shown := shown_as(y, nodes.shape(x), matching.terms("after"))) is not None:
        matching.add(x, shown, "value")
    elif (shown := shown_as(x, nodes.shape(y), matching.terms("before"))) is not None:
        matching.add(shown, y, "value")
    else:
        matching.reshaped.append((x, y))


# --- nearest pairs ----------------------------------------------------------------------------------------------


def _pairs(matching: Matching, xs: list[Node], ys: list[Node], near: Near) -> list[tuple[Node, Node]]:
    """Pair nodes that hold the same numbers; what is nearest on one side must be nearest on the other, too."""
    alike: dict[tuple[Node, ...], list[Node]] = defaultdict(list)  # what holds one value before -> what holds it after
    for row, found in near.of_y.items():
        best = min(d for _, d in found)
        same = [(i, d) for i, d in found if d <= best * SAME + FLOOR]
        # where others are almost as near, or another y is nearer, it cannot be told
        if len(found) == len(same) and all(near.is_mutual(i, d) for i, d in same):
            alike[tuple(xs[i] for i, _ in sorted(same))].append(ys[row])
    pairs = []
    for same_xs, same_ys in alike.items():
        pairs += _one_value(matching, list(same_xs), same_ys)
    return pairs


def _uncrossed(
    matching: Matching, pairs: list[tuple[Node, Node]], rows: Mapping[Node, torch.Tensor]
) -> list[tuple[Node, Node]]:
    """Pair straight what runs across: a value here, and there what the value is computed from.

    A variance and the same with its epsilon added differ by next to nothing, and behind a defect either may be nearer.
    A sum and one of its addends differ by much: where the one is nearer, that is what is meant.
    """
    straight: list[tuple[Node, Node]] = []
    for x, y in pairs:
        across = next((found for found in _across(matching, x, y) if all(_may_be(rows, *p) for p in found)), None)
        straight += [(x, y)] if across is None else across
    return list(dict.fromkeys(straight))


def _may_be(rows: Mapping[Node, torch.Tensor], x: Node, y: Node) -> bool:
    """Whether two nodes hold nearly the same; what was not sketched is not known to differ."""
    mine, theirs = rows.get(x), rows.get(y)
    if mine is None or theirs is None:
        return True
    return float(torch.linalg.vector_norm(mine - theirs)) <= _NEARLY * float(torch.linalg.vector_norm(mine))


def _across(matching: Matching, x: Node, y: Node) -> Iterator[list[tuple[Node, Node]]]:
    """Yield the pairs in place of (x, y) where one is what the other's operand, or user, is on its own side."""
    if provenance.target_name(x) == provenance.target_name(y):
        return
    of_before, of_after = matching.alignment.of_before, matching.alignment.of_after
    for above, below in [(a, b) for a in x.all_input_nodes for b in y.users]:
        if not (of_before.get(above) or of_after.get(below)) and _are_alike(above, y) and _are_alike(x, below):
            yield [(above, y), (x, below)]
    for above, below in [(a, b) for a in y.all_input_nodes for b in x.users]:
        if not (of_after.get(above) or of_before.get(below)) and _are_alike(x, above) and _are_alike(below, y):
            yield [(x, above), (below, y)]


def _are_alike(x: Node, y: Node) -> bool:
    return provenance.target_name(x) == provenance.target_name(y) and nodes.shape(x) == nodes.shape(y)


# --- one of several ---------------------------------------------------------------------------------------------


def _one_value(matching: Matching, xs: list[Node], ys: list[Node]) -> list[tuple[Node, Node]]:
    """Pair what all holds one value: in order where both sides hold it equally often, else as far as it can be told."""
    if not (_is_one(xs, matching.numbers_before()) and _is_one(ys, matching.numbers_after())):
        return []  # unrelated nodes hold the same: a tie
    if len(xs) == len(ys) and (len(xs) == 1 or is_chain(ys)):
        order_x, order_y = matching.before.order, matching.after.order
        return list(zip(sorted(xs, key=order_x.__getitem__), sorted(ys, key=order_y.__getitem__), strict=True))
    pairs = []
    for y in ys:
        alike = [x for x in xs if provenance.target_name(x) == provenance.target_name(y)] or xs
        # a value that is handed on unchanged: the last of the chain
        pairs.append((max(alike, key=lambda n: len(_ancestors(n, xs))), y))
    return pairs


def _is_one(group: list[Node], numbers: dict[Node, int]) -> bool:
    """Whether all compute the same, or one the other."""
    return len({numbers[n] for n in group}) == 1 or is_chain(group)


def is_chain(group: list[Node]) -> bool:
    """Whether every member but one is computed from another member: a value that is handed on unchanged."""
    return sum(not _ancestors(n, group) for n in group) == 1


def _ancestors(node: Node, group: list[Node]) -> set[Node]:
    """Return the members of the group above a node, at most a few steps away."""
    found: set[Node] = set()
    stack, depth = [(node, 0)], 6
    while stack:
        current, steps = stack.pop()
        for operand in current.all_input_nodes:
            if operand in group and operand is not node:
                found.add(operand)
            if steps < depth:
                stack.append((operand, steps + 1))
    return found

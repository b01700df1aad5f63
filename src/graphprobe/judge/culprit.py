"""Which operation of a guilty region to name: the first, views included, without an equal partner on the other side."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.fx import Node

from graphprobe import provenance
from graphprobe.lanes.regions import Region
from graphprobe.lanes.same import Weights, same_arguments


def culprit(region: Region, weights: Weights) -> tuple[str, Node]:
    """Return (side, node): in `after` where it has an operation without partner, else in `before`, else the output."""
    pairs = _partners(region)
    partnered = {y for _, y in pairs}
    for y in region.operations("after"):
        if y not in partnered:
            return "after", y
    matched = {x for x, _ in pairs}
    for x in region.operations("before"):
        if x not in matched:
            return "before", x
    for x, y in pairs:
        if _other_weights(x, y, weights):
            return "after", y
    for x, y in pairs:
        if _other_operands(x, y, dict((b, a) for a, b in pairs), region):
            return "after", y
    return "after", region.claim.after


def _partners(region: Region) -> list[tuple[Node, Node]]:
    """Pair the operations of both pieces that have the same operator and constants, in graph order."""
    free = list(region.operations("before"))
    pairs = []
    for y in region.operations("after"):
        for x in free:
            if x.target is y.target and len(x.all_input_nodes) == len(y.all_input_nodes) and same_arguments(x, y):
                pairs.append((x, y))
                free.remove(x)
                break
    return pairs


def _other_weights(x: Node, y: Node, weights: Weights) -> bool:
    mine = [n for n in x.all_input_nodes if n.op == "get_attr"]
    theirs = [n for n in y.all_input_nodes if n.op == "get_attr"]
    return len(mine) != len(theirs) or not all(weights.stands_for(p, q) for p, q in zip(mine, theirs, strict=True))


def _other_operands(x: Node, y: Node, back: dict[Node, Node], region: Region) -> bool:
    frontier = {q: p for p, q in region.frontier}
    for p, q in zip(x.all_input_nodes, y.all_input_nodes, strict=True):
        if q.op != "get_attr" and back.get(q, frontier.get(q)) not in (p, None):
            return True
    return False


def operators(region: Region, side: str) -> Counter[str]:
    """Count the operators of one piece."""
    counted: Counter[Any] = Counter(provenance.target_name(n) for n in region.operations(side))
    return counted

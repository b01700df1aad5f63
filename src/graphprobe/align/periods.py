"""Which layer a node lies in, read off the graph alone: what repeats, in the order in which it is computed.

Module paths say it where there are any. Elsewhere a node is known by its *kind*: what it computes, of what, of what. A
model of n layers holds many kinds n times, once in each; between two nodes of such a kind lies one layer.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from graphprobe import nodes, provenance

RADIUS = 3  # how far upwards a kind looks
_FEWEST = 2  # layers
Row = tuple[Node, ...]


@dataclass(frozen=True)
class Repeats:
    """What repeats in a graph: rows of one node a layer, all of one kind, in the order of computation."""

    order: dict[Node, int]
    rows: tuple[Row, ...]  # those that are in step with one another, the first in a layer first

    def layers(self, row: Row) -> dict[Node, int]:
        """Number the layers: each begins with its node of the row, and the last is no longer than the others.

        What comes before the first is in none, and neither is what several layers share: a mask, rotary tables.
        """
        ordered = list(self.order)
        starts = [self.order[node] for node in row]
        longest = max(b - a for a, b in itertools.pairwise(starts))
        ends = [*starts[1:], min(starts[-1] + longest, len(ordered))]
        found = {}
        for layer, (start, end) in enumerate(zip(starts, ends, strict=True)):
            found.update(dict.fromkeys(ordered[start:end], layer))
        for node in self._shared(row[0], found):
            found.pop(node, None)
        return found

    def _shared(self, first: Node, layers: dict[Node, int]) -> set[Node]:
        """List what does not depend on the first layer and is used in more than one."""
        below: set[Node] = {first}
        for node in self.order:
            if any(nodes.shown(n) in below for n in node.all_input_nodes):
                below.add(node)
        used: dict[Node, set[int]] = defaultdict(set)
        for node in reversed(self.order):
            mine = ({layers[node]} if node in layers else set()) if node in below else used[node]
            for operand in map(nodes.shown, node.all_input_nodes):
                used[operand] |= mine
        return {node for node in self.order if node not in below and len(used[node]) > 1}


def repeats(ends: Sequence[Node]) -> Repeats | None:
    """Find what repeats above some nodes, the outputs of a graph; None where nothing does."""
    order = _ordered(ends)
    found = _rows(list(order))
    if not found:
        return None
    rows = sorted(found, key=lambda row: order[row[0]])
    base = max(rows, key=lambda row: sum(_in_step(row, other, order) for other in rows))
    return Repeats(order, tuple(row for row in rows if _in_step(base, row, order)))


def _ordered(ends: Sequence[Node]) -> dict[Node, int]:
    """List all nodes above `ends` as they are first needed: the same in whatever order the graph has them.

    What alignment has inserted into a copy is passed over.
    """
    done: dict[Node, int] = {}
    stack = [(nodes.shown(node), False) for node in reversed(ends)]
    while stack:
        node, ready = stack.pop()
        if node in done:
            continue
        if ready:
            done[node] = len(done)
            continue
        stack.append((node, True))
        stack.extend((nodes.shown(n), False) for n in reversed(node.all_input_nodes) if nodes.shown(n) not in done)
    return done


def _rows(ordered: Sequence[Node]) -> list[Row]:
    """List the groups of nodes of one kind that have as many members as most groups have."""
    kinds: dict[Node, Any] = {node: _kind(node) for node in ordered}
    groups: set[Row] = set()
    for _ in range(RADIUS + 1):
        by_kind: dict[Any, list[Node]] = defaultdict(list)
        for node in ordered:
            if node.op == "call_function":
                by_kind[kinds[node]].append(node)
        groups |= {tuple(group) for group in by_kind.values() if len(group) >= _FEWEST}
        numbers: dict[Any, int] = {}
        wider = {n: (kinds[n], *(kinds[nodes.shown(m)] for m in n.all_input_nodes)) for n in ordered}
        kinds = {n: numbers.setdefault(kind, len(numbers)) for n, kind in wider.items()}
    members: dict[int, set[Node]] = defaultdict(set)
    for group in groups:
        members[len(group)].update(group)
    often = max(members, key=lambda size: (len(members[size]), size), default=0)
    return [group for group in groups if len(group) == often]


def _kind(node: Node) -> Any:
    if node.op != "call_function":
        return node.op, nodes.shape(node)
    plain = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float, bool, str))]
    return provenance.target_name(node), nodes.shape(node), tuple(map(repr, plain))


def same_row(before: Repeats, after: Repeats, partners: Mapping[Node, Node]) -> tuple[Row, Row] | None:
    """Choose a row of each side whose nodes are partners one by one, at least two of them; the first there is."""
    place = {node: (row, i) for row in reversed(after.rows) for i, node in enumerate(row)}
    for row in before.rows:
        met = [place.get(partners[x]) for x in row if x in partners and partners[x] in after.order]
        rows = {found[0] for found in met if found is not None}
        if len(met) < _FEWEST or None in met or len(rows) != 1:
            continue
        (other,) = rows
        if len(other) == len(row) and all(partners.get(x, y) is y for x, y in zip(row, other, strict=True)):
            return row, other
    return None


def _in_step(row: Sequence[Node], other: Sequence[Node], order: dict[Node, int]) -> bool:
    """Whether the other row has one node in every layer that the row marks; its first may come before the row's."""
    places, starts = [order[n] for n in other], [order[n] for n in row]
    late = all(s <= p for s, p in zip(starts, places, strict=True)) and _between(places, starts[1:])
    early = all(p <= s for s, p in zip(starts, places, strict=True)) and _between(starts, places[1:])
    return late or early


def _between(firsts: Sequence[int], seconds: Sequence[int]) -> bool:
    return all(first < second for first, second in zip(firsts, seconds, strict=False))

"""Operands that change places: several findings of one mistake, told by a cycle.

Where two operands are exchanged, one operation takes y for x and another takes x for y. Where an operation has moved
(a norm behind the rotation instead of before it) three places are wired otherwise: the norm takes the rotated value for
the raw one, the rotation the raw one for the normed, and what follows the normed one for the rotated. Each of these
regions is the same program on both sides but for one operand, and the substitutions close a circle. Nothing can be said
of one of them alone: put one right, and a value is taken twice and another not at all. Two mistakes that have nothing
to do with each other close no circle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Alignment
from graphprobe.judge.culprit import same_kind
from graphprobe.lanes.regions import Region, Regions
from graphprobe.lanes.same import Weights
from graphprobe.program import Program

Circle = frozenset[Node]  # values of before that take each other's places


def circles(regions: Sequence[Region], weights: Weights) -> list[Circle | None]:
    """Return for each region the circle its substitutions belong to, or None."""
    taken = [_substitutions(region, weights) for region in regions]
    instead: dict[Node, set[Node]] = defaultdict(set)
    for substitutions in taken:
        for p, other in substitutions:
            instead[p].add(other)
    return [next((found for p, other in edges if (found := _circle(p, other, instead))), None) for edges in taken]


def _substitutions(region: Region, weights: Weights) -> list[tuple[Node, Node]]:
    """Return (what before takes, what after takes in its place), both as values of before, if nothing else differs."""
    partners: dict[Node, list[Node]] = defaultdict(list)
    for p, q in region.frontier:
        partners[q].append(p)
    befores, known = {p for p, _ in region.frontier}, set(region.frontier)
    found, seen = list[tuple[Node, Node]](), set[tuple[Node, Node]]()
    stack = [(region.claim.before, region.claim.after)]
    while stack:
        p, q = pair = stack.pop()
        if pair in known or pair in seen:
            continue
        seen.add(pair)
        if p.op == q.op == "get_attr" and weights.stands_for(p, q):
            continue
        if p not in befores and q not in partners and p.op == q.op == "call_function" and same_kind(p, q):
            stack += zip(p.all_input_nodes, q.all_input_nodes, strict=True)
            continue
        p, q = pair = _source(p, befores), _source(q, partners)
        if p not in befores or q not in partners or pair in known:
            return []
        found += [(p, other) for other in partners[q]]
    return found


def _source(node: Node, leaves: Collection[Node]) -> Node:
    """Step over views up to what the region starts from."""
    while node not in leaves and nodes.is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _circle(p: Node, other: Node, instead: Mapping[Node, set[Node]]) -> Circle | None:
    """Return the values from which `p` and `other` can both be reached, and that can be reached from both."""
    below = _reached(other, instead)
    if p not in below:
        return None
    return frozenset(n for n in below if p in _reached(n, instead))


def _reached(start: Node, instead: Mapping[Node, set[Node]]) -> set[Node]:
    stack, seen = [start], {start}
    while stack:
        new = instead.get(stack.pop(), set()) - seen
        seen |= new
        stack.extend(new)
    return seen


def around(
    circle: Circle, members: Sequence[Region], alignment: Alignment, before: Program, after: Program
) -> tuple[Region, ...]:
    """Return regions that hold the whole exchange: from where its values come to the last places that take them.

    What takes its place in the middle has no counterpart there, so its claims are no frontier.
    """
    claims = [region.claim for region in members]
    pairs = {(p, q) for region in members for p, q in region.frontier if p in circle}
    below = [pair for pair in pairs if any(other is not pair and _feeds(other, pair) for other in pairs)]
    lasts = [c for c in claims if not any(_feeds((c.before, c.after), (d.before, d.after)) for d in claims)]
    lasts = lasts or [max(claims, key=lambda c: after.order[c.after])]
    gone = {c for c in alignment.claims if (c.before, c.after) in below} | set(claims)
    left = Regions(before, after, alignment.without(gone))
    return tuple(left.region(c) for c in lasts)


def _feeds(one: tuple[Node, Node], other: tuple[Node, Node]) -> bool:
    """Whether a pair stands above another one on either side."""
    return any(x in _ancestors(y) for x, y in zip(one, other, strict=True))


def _ancestors(node: Node) -> set[Node]:
    stack, seen = [node], set[Node]()
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return seen

"""Operands that change places: several findings of one mistake, told by a cycle.

Where two operands are exchanged, one operation takes y for x and another takes x for y. Where an operation has moved
(a norm behind the rotation instead of before it) three places are wired otherwise: the norm takes the rotated value for
the raw one, the rotation the raw one for the normed, and what follows the normed one for the rotated. Each of these
regions is the same program on both sides but for one operand, and the substitutions close a circle. Nothing can be said
of one of them alone: put one right, and a value is taken twice and another not at all. Two mistakes that have nothing
to do with each other close no circle. Weights that were loaded into each other's places are told in the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TypeGuard

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Alignment
from graphprobe.judge.culprit import same_kind
from graphprobe.judge.hints.look import Look
from graphprobe.lanes.regions import Region, Regions
from graphprobe.lanes.same import Weights
from graphprobe.program import Program

Circle = frozenset[Node]  # values or weights of before that take each other's places
Taken = list[tuple[Node, Node]]  # (what before takes, what after takes in its place), both as nodes of before
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FIRST = 16  # numbers of a weight that are looked at before all of it is


def circles(taken: Sequence[Taken]) -> list[Circle | None]:
    """Return for each region the circle its substitutions belong to, or None."""
    instead: dict[Node, set[Node]] = defaultdict(set)
    for substitutions in taken:
        for p, other in substitutions:
            instead[p].add(other)
    return [next((found for p, other in edges if (found := _circle(p, other, instead))), None) for edges in taken]


def tried(look: Look, region: Region) -> Taken:
    """Give after's piece the one value that only before takes for the one that only after takes: do the sides agree?"""
    taken = [{m for n in getattr(region, side) for m in n.all_input_nodes} for side in ("before", "after")]
    mine = [p for p, q in region.frontier if p in taken[0] and q not in taken[1]]
    theirs = [(p, q) for p, q in region.frontier if p not in taken[0] and q in taken[1]]
    if len(mine) != 1 or len(theirs) != 1:
        return []
    (p,), ((other, q),) = mine, theirs
    value = look.inside[0].get(p)
    if value is None or nodes.elements(p) != nodes.elements(q):
        return []
    agrees = look.agrees(look.again({q: value.reshape(nodes.shape(q) or ())}))
    return [(p, other)] if agrees else []


def substitutions(region: Region, weights: Weights) -> Taken:
    """Return what a region takes in place of what it should take, if nothing else differs."""
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
        if p.op == q.op == "get_attr":
            if not weights.stands_for(p, q):
                others = _holding(q, weights)
                found += [(_first(p, weights), other) for other in others]
                if not others:
                    return []
            continue
        if p not in befores and q not in partners and p.op == q.op == "call_function" and same_kind(p, q):
            stack += zip(p.all_input_nodes, q.all_input_nodes, strict=True)
            continue
        p, q = pair = _source(p, befores), _source(q, partners)
        if p not in befores or q not in partners or pair in known:
            return []
        found += [(p, other) for other in partners[q]]
    return found


def _holding(q: Node, weights: Weights) -> list[Node]:
    """Return the weights of before that after's weight has the content of, each once."""
    held = weights.after.held(q)
    if not _is_plain(held):
        return []
    start = held.detach().reshape(-1)[:_FIRST].double().cpu()
    found = dict[str, Node]()
    for x in weights.before.live:
        mine = weights.before.held(x) if x.op == "get_attr" and str(x.target) not in found else None
        if not _is_plain(mine) or mine.shape != held.shape:
            continue
        first = mine.detach().reshape(-1)[:_FIRST].double().cpu()
        if torch.allclose(first, start, rtol=1e-2, equal_nan=True) and weights.stands_for(x, q):
            found[str(x.target)] = x
    return list(found.values())


def _is_plain(value: object) -> TypeGuard[torch.Tensor]:
    """Whether a weight holds plain numbers: no codes, no packed or wrapped tensor."""
    plain = type(value) in (torch.Tensor, torch.nn.Parameter)
    return (
        plain
        and isinstance(value, torch.Tensor)
        and value.dtype in _PLAIN
        and value.layout is torch.strided
        and not value.is_meta
    )


def _first(p: Node, weights: Weights) -> Node:
    """Return the first node that reads the same weight."""
    return next(x for x in weights.before.live if x is p or (x.op == "get_attr" and x.target == p.target))


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
    claims = sorted((region.claim for region in members), key=lambda c: after.order[c.after], reverse=True)
    pairs = {(p, q) for region in members for p, q in region.frontier if p in circle}
    below = [pair for pair in pairs if any(other is not pair and _feeds(other, pair) for other in pairs)]
    gone = {c for c in alignment.claims if (c.before, c.after) in below} | set(claims)
    left = Regions(before, after, alignment.without(gone))
    found: list[Region] = []
    for claim in claims:
        if not any(claim.after in region.after for region in found):
            found.append(left.region(claim))
    return tuple(found)


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

"""Regions: the two pieces of graph between a claimed output and the nearest frontier that both sides share.

"The nearest claims above" may differ between the two sides: a fused add+RMSNorm starts at ``x`` and ``residual``, the
split one at their claimed sum. So both cones grow upwards, the later node first, until the inputs of one are exactly
the claimed partners of the inputs of the other.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Alignment, Claim, remaining
from graphprobe.program import Program
from graphprobe.records import SMALL_REGION

Origin = frozenset[tuple[Node, Node]]  # frontier pairs, as (node of before, its own or its partner's node)
SMALL = SMALL_REGION
_FAR, _NEAR = 128, 2 * SMALL  # nodes of a region beyond which a nearer frontier is looked for, and that it must leave


@dataclass(frozen=True, eq=False)
class Region:
    """What is judged as one: two pieces with one common frontier."""

    claim: Claim
    before: tuple[Node, ...]  # the piece of `before` in graph order: weights, views and the claimed node included
    after: tuple[Node, ...]
    frontier: tuple[tuple[Node, Node], ...]  # (before, after) pairs both pieces start from
    loose_before: tuple[Node, ...] = ()  # inputs of the graph that only this side consumes
    loose_after: tuple[Node, ...] = ()

    def operations(self, side: str) -> list[Node]:
        """Return the piece's operations without weights."""
        return [n for n in getattr(self, side) if n.op != "get_attr"]

    def size(self, side: str) -> int:
        """Count the value-making operations of one piece."""
        return sum(nodes.makes_values(n) for n in getattr(self, side))

    def constant(self, side: str) -> set[Node]:
        """Return the weights of one piece, and what is computed from them alone."""
        found: set[Node] = set()
        for node in getattr(self, side):
            computed = node.op == "call_function" and not nodes.is_random(node)
            if node.op == "get_attr" or (computed and all(n in found for n in node.all_input_nodes)):
                found.add(node)
        return found


class _Cone:
    """One side's piece while it grows."""

    def __init__(self, top: Node, program: Program) -> None:
        self.program = program
        self.piece: set[Node] = set()
        self.inputs: dict[Node, None] = {top: None}
        if top.op != "placeholder":  # an output that hands an input through has an empty piece
            self.expand(top)

    def _take(self, node: Node) -> None:
        for operand in node.all_input_nodes:
            if operand in self.piece:
                continue
            if operand.op == "get_attr":
                self.piece.add(operand)
            else:
                self.inputs[operand] = None

    def expand(self, node: Node) -> None:
        """Move an input into the piece; its own operands become inputs."""
        del self.inputs[node]
        self.piece.add(node)
        self._take(node)

    def ordered(self) -> tuple[Node, ...]:
        return tuple(sorted(self.piece, key=self.program.order.__getitem__))


def _above(node: Node) -> set[Node]:
    """Return what a node is made of, a few operations far."""
    found: set[Node] = set()
    level = [node]
    while level and len(found) <= SMALL:
        level = [source for one in level for source in one.all_input_nodes if source not in found]
        found.update(level)
    return found


def _hiding(lone: list[Node], cuts: dict[Node, list[Claim]], cone: _Cone, side: str) -> list[Node]:
    """Return what the other side's cone starts from right below the partners of what it does not start from."""
    partners = {getattr(claim, side) for node in lone for claim in cuts.get(node, ())}
    return [n for n in cone.inputs if n.op != "placeholder" and not partners.isdisjoint(_above(n))]


class Regions:
    """Finds regions under one alignment."""

    def __init__(self, before: Program, after: Program, alignment: Alignment) -> None:
        self.before, self.after = before, after
        self._cuts_before: dict[Node, list[Claim]] = {}
        self._cuts_after: dict[Node, list[Claim]] = {}
        for claim in alignment.claims:
            if claim.cut:
                self._cuts_before.setdefault(claim.before, []).append(claim)
                self._cuts_after.setdefault(claim.after, []).append(claim)
        paths = [p for p in before.inputs if p in after.inputs]
        self._same_input = {before.inputs[p]: after.inputs[p] for p in paths}
        self._input_of_after = {q: p for p, q in self._same_input.items()}

    def without(self, withdrawn: Collection[Claim]) -> Regions:
        """Return what finds regions when some claims are withdrawn, too."""
        left = copy.copy(self)
        left._cuts_before = remaining(self._cuts_before, withdrawn)
        left._cuts_after = remaining(self._cuts_after, withdrawn)
        return left

    def region(self, claim: Claim) -> Region:
        """Return the region that the claim closes."""
        left, right = _Cone(claim.before, self.before), _Cone(claim.after, self.after)
        self._meet(left, right)
        if len(left.piece) + len(right.piece) > _FAR:
            left, right = self._closer(claim, left, right)
        if self._behind(left, right) or self._behind(right, left):
            # an input of the graph that one side reads, and the other only above a cut: no common frontier yet
            wider = _Cone(claim.before, self.before), _Cone(claim.after, self.after)
            if self._grow_to_inputs(*wider):
                left, right = wider
        return self._region(claim, left, right)

    def _closer(self, claim: Claim, left: _Cone, right: _Cone) -> tuple[_Cone, _Cone]:
        """Grow once more where one piece has grown far: past what the other side holds right above what it starts from.

        One layer more reads the residual stream and its norm, where after reads the norm alone. A frontier so near that
        only few operations are left may be a wrong claim's, which the wider region shows for what it is.
        """
        far = len(left.piece) + len(right.piece)
        near = _Cone(claim.before, self.before), _Cone(claim.after, self.after)
        self._meet(*near, most=far)
        return near if _NEAR <= sum(len(cone.piece) for cone in near) < far else (left, right)

    def _meet(self, left: _Cone, right: _Cone, most: int | None = None) -> None:
        """Grow both cones until what they start from is claimed to be equal.

        With `most`, a cone that starts right below what the other one starts from is grown first, and both only to so
        many nodes.
        """
        while most is None or len(left.piece) + len(right.piece) < most:
            self._expand_unclaimed(left, self._cuts_before)
            self._expand_unclaimed(right, self._cuts_after)
            lone_before = [p for p in left.inputs if not self._matched_before(p, right)]
            lone_after = [q for q in right.inputs if not self._matched_after(q, left)]
            lone_before = [p for p in lone_before if p.op != "placeholder"]
            lone_after = [q for q in lone_after if q.op != "placeholder"]
            if not lone_after:
                lone_before = [p for p in lone_before if not self._stands_apart(p, right)]
            elif not lone_before:
                lone_after = [q for q in lone_after if not self._stands_apart(q, left)]
            if not lone_before and not lone_after:
                break
            # the latest first: what it stands on may turn out to be an input of the other side too
            top = max([self.before.order[p] for p in lone_before] + [self._rank_after(q) for q in lone_after])
            first = [p for p in lone_before if self.before.order[p] == top]
            first_after = [q for q in lone_after if self._rank_after(q) == top]
            if most is not None:
                hiding = _hiding(first, self._cuts_before, right, "after")
                hiding_after = _hiding(first_after, self._cuts_after, left, "before")
                if hiding or hiding_after:
                    first, first_after = hiding_after, hiding
            for p in first:
                left.expand(p)
            for q in first_after:
                right.expand(q)

    def _grow_to_inputs(self, left: _Cone, right: _Cone) -> bool:
        """Grow both cones until they read the same inputs of the graph, too; whether they stayed small."""
        while len(left.piece) <= SMALL and len(right.piece) <= SMALL:
            self._meet(left, right)
            hiding = [
                (cone, found)
                for cone, found in ((left, self._behind(right, left)), (right, self._behind(left, right)))
                if found
            ]
            if not hiding:
                return True
            for cone, found in hiding:
                for node in found:
                    if node in cone.inputs:
                        cone.expand(node)
        return False

    def _behind(self, reader: _Cone, other: _Cone) -> list[Node]:
        """Return the cuts of `other` right below an input of the graph that `reader` reads and `other` does not.

        A cut that is a guess stays: that it may be wrong is found out by withdrawing it.
        """
        claims = self._cuts_after if reader.program is self.before else self._cuts_before
        same = self._same_input if reader.program is self.before else self._input_of_after
        lone = {same[p] for p in reader.inputs if p in same and same[p] not in other.inputs}
        sure = [n for n in other.inputs if n in claims and all(c.certain for c in claims[n])] if lone else []
        return [n for n in sure if n.op != "placeholder" and not lone.isdisjoint(_above(n))]

    def _region(self, claim: Claim, left: _Cone, right: _Cone) -> Region:
        frontier = []
        for q in right.inputs:
            pair = self._pair_of_after(q, left)
            if pair is None and q.meta.get(nodes.PART):  # it stands apart
                pair = next((c.before for c in self._cuts_after.get(q, ())), None)
            if pair is not None:
                frontier.append((pair, q))
        # one before node may meet several after nodes; each before input must be named at least once
        named = {p for p, _ in frontier}
        for p in left.inputs:
            if p not in named:
                q2 = self._pair_of_before(p, right)
                if q2 is not None:
                    frontier.append((p, q2))
        paired_before = {p for p, _ in frontier}
        paired_after = {q for _, q in frontier}
        return Region(
            claim,
            left.ordered(),
            right.ordered(),
            tuple(frontier),
            tuple(p for p in left.inputs if p not in paired_before),
            tuple(q for q in right.inputs if q not in paired_after),
        )

    def _expand_unclaimed(self, cone: _Cone, cuts: dict[Node, list[Claim]]) -> None:
        while True:
            bare = [n for n in cone.inputs if n not in cuts and n.op != "placeholder"]
            if not bare:
                return
            for node in bare:
                cone.expand(node)

    def _stands_apart(self, part: Node, other: _Cone) -> bool:
        """Whether a node is one of several slices of a value, and not computed from what the other side starts from.

        A prompt taken in chunks, a product split into shards: where one side works on all at once, the other's piece
        for one chunk does not consume the others. They may stay what they are in before; nothing of the other's piece
        stands above them.
        """
        if not part.meta.get(nodes.PART):
            return False
        if other.program is self.after:
            starts = {c.before for q in other.inputs for c in self._cuts_after.get(q, ())}
            starts |= {self._input_of_after[q] for q in other.inputs if q in self._input_of_after}
        else:
            starts = {c.after for p in other.inputs for c in self._cuts_before.get(p, ())}
            starts |= {self._same_input[p] for p in other.inputs if p in self._same_input}
        stack, seen = [part], {part}
        while stack:
            for operand in stack.pop().all_input_nodes:
                if operand in starts:
                    return False
                if operand not in seen:
                    seen.add(operand)
                    stack.append(operand)
        return True

    def _pair_of_after(self, q: Node, left: _Cone) -> Node | None:
        same = self._input_of_after.get(q)
        if same is not None:
            return same
        return next((c.before for c in self._cuts_after.get(q, ()) if c.before in left.inputs), None)

    def _pair_of_before(self, p: Node, right: _Cone) -> Node | None:
        same = self._same_input.get(p)
        if same is not None:
            return same
        return next((c.after for c in self._cuts_before.get(p, ()) if c.after in right.inputs), None)

    def _matched_before(self, p: Node, right: _Cone) -> bool:
        return any(c.after in right.inputs for c in self._cuts_before.get(p, ()))

    def _matched_after(self, q: Node, left: _Cone) -> bool:
        return any(c.before in left.inputs for c in self._cuts_after.get(q, ()))

    def _rank_after(self, q: Node) -> int:
        return max(self.before.order[c.before] for c in self._cuts_after[q])


def regions_of(before: Program, after: Program, alignment: Alignment) -> list[Region]:
    """Return the region of every claim, in after's order."""
    finder = Regions(before, after, alignment)
    return [finder.region(claim) for claim in alignment.claims]


def origins(side: str, region: Region) -> dict[Node, Origin]:
    """Return for every node of one piece, and of its frontier, what it starts from: that alone decides its value."""
    found: dict[Node, Origin] = {}
    for p, q in reversed(region.frontier):
        leaf = p if side == "before" else q
        found[leaf] = frozenset([(p, leaf)])
    piece: tuple[Node, ...] = getattr(region, side)
    for node in piece:
        found[node] = frozenset().union(*(found.get(n, frozenset()) for n in node.all_input_nodes))
    return found


def consumers(group: Iterable[Claim], regions: Iterable[Region]) -> list[Region]:
    """Return the regions that a group of claims feeds, or that hold one of its nodes inside: D of rule 5."""
    members = set(group)
    pairs = {(c.before, c.after) for c in members}
    inside_before = {c.before for c in members}
    inside_after = {c.after for c in members}
    return [
        r
        for r in regions
        if r.claim not in members
        and (
            not pairs.isdisjoint(r.frontier)
            or not inside_before.isdisjoint(r.before)
            or not inside_after.isdisjoint(r.after)
        )
    ]

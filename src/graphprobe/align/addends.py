"""Evidence 5, addends that share the rows of a value among them: the parts of an embedding that is split by words.

Each shard looks up the words that it has and holds zero for all others, and the sum is the value of the other side. So
a row of an addend is a row of that value, or zero. Which is which, the values say. Both are made plain in the graphs:
behind an addend stand its own rows and the rest, which is claimed to be zero, behind the value the rows of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Claim
from graphprobe.align.matching import Matching
from graphprobe.align.sketches import directions
from graphprobe.align.values import AGREE, AGREE_FINE
from graphprobe.align.wholes import Behind
from graphprobe.program import Program

_MOST = 64  # addends of one sum
aten = torch.ops.aten


@dataclass(frozen=True)
class _Share:
    """An addend, and which rows of the sum it brings."""

    node: Node
    rows: tuple[int, ...]
    sure: bool  # its values say so; else it is the only one that is left for them


def claim(matching: Matching) -> None:
    """Claim addends by the rows they bring. Both programs must be copies."""
    if matching.bound is None:
        return
    for side in ("after", "before"):
        sums = _sums(matching, side)
        matching.asked.update(sums)
        taken: set[Node] = set()
        for total, value, shares in _shared(matching, side, sums):
            if total not in taken and value not in taken:
                taken |= {total, value, *sums[total].inside}
                _insert(matching, side, total, value, shares)


@dataclass(frozen=True)
class _Sum:
    """What a value is the sum of, and the sums in between."""

    addends: tuple[Node, ...]
    inside: frozenset[Node]
    partners: tuple[Node, ...]  # what it may be on the other side


def _sums(matching: Matching, side: str) -> dict[Node, _Sum]:
    """List what is made of several unclaimed values of its shape, the latest first."""
    found = {}
    claims, other = matching.alignment.of(side), "before" if side == "after" else "after"
    open_: dict[Any, list[Node]] = defaultdict(list)
    for node in matching.unclaimed(other):
        open_[nodes.shape(node)].append(node)
    for total in reversed(matching.makers(side)):
        if total in matching.asked or not nodes.is_fixed(total) or len(nodes.fixed(total)) < 2:
            continue
        if claims.get(total):
            cuts = [c for c in claims[total] if c.cut and not c.view and total in (c.before, c.after)]
            partners = [c.before if side == "after" else c.after for c in cuts[:1]]
        else:
            partners = open_[nodes.shape(total)] if nodes.schema_name(total) == "aten::add" else []
        addends, inside = _addends(total, claims) if partners else ((), frozenset[Node]())
        if len(addends) > 1:
            found[total] = _Sum(addends, inside, tuple(partners[:_MOST]))
    return found


def _addends(total: Node, claims: Mapping[Node, list[Claim]]) -> tuple[tuple[Node, ...], frozenset[Node]]:
    addends, inside, stack = dict[Node, None](), set[Node](), list(reversed(total.all_input_nodes))
    while stack and len(addends) < _MOST:
        node = stack.pop()
        if claims.get(node) or not nodes.makes_values(node) or nodes.shape(node) != nodes.shape(total):
            continue
        if nodes.schema_name(node) == "aten::add":
            inside.add(node)
            stack.extend(reversed(node.all_input_nodes))
        else:
            addends[node] = None
    return tuple(addends), frozenset(inside)


def _shared(matching: Matching, side: str, sums: Mapping[Node, _Sum]) -> Iterator[tuple[Node, Node, list[_Share]]]:
    """Yield the sums whose addends share the rows of a value of the other side, that value, and which has which."""
    other = "before" if side == "after" else "after"
    here = matching.observed(side, list(dict.fromkeys(n for one in sums.values() for n in one.addends)), _read)
    there = matching.observed(other, list(dict.fromkeys(p for one in sums.values() for p in one.partners)), _read)
    agree = AGREE if matching.is_coarse() else AGREE_FINE
    for total, one in sums.items():
        held = {n: here[n] for n in one.addends if n in here}
        for value in one.partners if len(held) == len(one.addends) else ():
            truth = there.get(value) if value not in matching.sliced else None
            if truth is not None and all(truth.shape == mine.shape for mine in held.values()):
                shares = _shares(truth, held, agree)
                if shares:
                    yield total, value, shares
                    break


def _shares(truth: torch.Tensor, held: Mapping[Node, torch.Tensor], agree: float) -> list[_Share]:
    """Tell which rows each addend brings; one of them may hold others than it should."""
    near = agree * torch.linalg.vector_norm(truth, dim=1)
    free, shares, strange = set(range(len(truth))), list[_Share](), list[Node]()
    for node, value in held.items():
        zero = (value == 0).all(1)
        own = (torch.linalg.vector_norm(value - truth, dim=1) <= near) & ~zero
        rows = tuple(torch.nonzero(own).flatten().tolist())
        if bool((zero | own).all()) and free.issuperset(rows) and len(rows) < len(truth):
            free.difference_update(rows)
            shares.append(_Share(node, rows, True))
        else:
            strange.append(node)
    if len(strange) > 1 or not any(share.rows for share in shares) or (free and not strange):
        return []
    return [*shares, *(_Share(node, tuple(sorted(free)), False) for node in strange)]


def _read(_: Node, value: Any) -> torch.Tensor | None:
    """Return a few numbers for each row of the last dimension: [rows, 4] float64."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2 or not value.numel():
        return None
    rows = torch.nan_to_num(value.detach().reshape(-1, value.shape[-1]).double())
    found: torch.Tensor = rows @ directions(rows.shape[1]).to(rows.device)
    return found


# --- making claims plain ------------------------------------------------------------------------------------------


def _insert(matching: Matching, side: str, total: Node, value: Node, shares: list[_Share]) -> None:
    """Insert the rows of each addend on both sides and claim them, and the sum again as made of these rows."""
    other = "before" if side == "after" else "after"
    every = range(torch.Size(nodes.fixed(total)[:-1]).numel())
    theirs = _Rows(getattr(matching, other), value)
    claimed = [c for c in matching.alignment.of(other)[value] if value in (c.before, c.after)]
    own, nothing = list[tuple[tuple[int, ...], Node]](), list[Node]()
    pairs: list[tuple[Node, Node, str]] = []
    for share in shares:
        mine, rest = _Rows(getattr(matching, side), share.node), tuple(i for i in every if i not in set(share.rows))
        evidence = "slice" if share.sure else "slot"
        pieces = []
        for rows, is_own in ((share.rows, True), (rest, False)):
            if rows:
                part, taken = theirs.take(rows), mine.take(rows)
                pieces.append((rows, taken))
                if is_own:
                    own.append((rows, part))
                else:
                    nothing.append(part := theirs.zeros(part))
                pairs.append((part, taken, evidence))
        mine.put_together(pieces)
    whole = theirs.put_together(own, nothing)
    for claim in claimed:
        ends = (claim.before, whole) if other == "after" else (whole, claim.after)
        matching.alignment.move(claim, *ends)
    if not claimed:
        matching.alignment.add(Claim(*((whole, total) if side == "after" else (total, whole)), "slot", certain=False))
    for x, y, evidence in pairs:
        ends = (x, y) if side == "after" else (y, x)
        made = Claim(*ends, evidence, certain=False, view="rows")
        matching.alignment.add(made)
        matching.alignment.of(side)[nodes.shown(y)].append(made)
        matching.alignment.of(other)[value].append(made)
    for program in (matching.before, matching.after):
        program.refresh()
    matching.changed()


class _Rows:
    """Takes rows of one value, counted over all dimensions but the last, and puts it together from them again."""

    def __init__(self, program: Program, big: Node) -> None:
        self.program, self.big, self.users = program, big, list(big.users)
        self.shape = nodes.fixed(big)
        self.at = Behind(program, big, big)
        self.flat = self.at.call(aten.reshape.default, big, [-1, self.shape[-1]], shape=self._sizes(self.shape[:-1]))

    def _sizes(self, leading: tuple[int, ...]) -> tuple[int, ...]:
        return (int(torch.Size(leading).numel()), self.shape[-1])

    def take(self, rows: tuple[int, ...]) -> Node:
        """Insert what takes these rows."""
        index = self.at.constant(torch.tensor(rows, device=self.program.device_of(self.big)))
        taken = self.at.call(aten.index_select.default, self.flat, 0, index, shape=(len(rows), self.shape[-1]))
        taken.meta[nodes.PART] = True
        return taken

    def zeros(self, like: Node) -> Node:
        """Insert zeros of that shape."""
        return self.at.call(aten.zeros_like.default, like, shape=nodes.fixed(like))

    def put_together(self, pieces: list[tuple[tuple[int, ...], Node]], beside: Sequence[Node] = ()) -> Node:
        """Insert the value made of these rows, which are all; what used the value uses it. `beside` changes nothing."""
        rows = torch.tensor([i for rows, _ in pieces for i in rows])
        all_ = [*(n for _, n in pieces), *beside]
        size = sum(int((nodes.shape(n) or (0,))[0]) for n in all_)
        joined = self.at.call(aten.cat.default, all_, 0, shape=(size, self.shape[-1]))
        index = self.at.constant(rows.argsort().to(self.program.device_of(self.big)))
        sorted_ = self.at.call(aten.index_select.default, joined, 0, index, shape=self._sizes(self.shape[:-1]))
        whole = self.at.call(aten.reshape.default, sorted_, list(self.shape), shape=self.shape)
        self.program.take_over(self.big, whole, self.users)
        return whole

"""Weights in another order: rows (or columns) of one that are those of a weight of the other side, or of several.

A conversion re-orders weights: the halves of a rotary embedding become neighbours, queries, keys and values are joined
head by head, heads or hidden units change places. Rows are told apart by what they hold, so that any order is found.
What one of many equal layers does otherwise than the others is believed to be a mistake, and the others' order is
taken in its place.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from graphprobe import provenance

if TYPE_CHECKING:
    from graphprobe.align.weights import Leaves

_ROW = 16  # elements of a row that name it
_DISTINCT = 0.5  # of the rows must differ, or nothing is told by them
_FEWEST = 4  # rows

Index = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Row i of the weight `target` of the other side is row ``index[i]``."""

    target: str
    index: Index
    turned: bool  # its columns are meant


@dataclass(frozen=True)
class Ordered:
    """A weight whose rows (columns, if `axis` is 1) are those of other weights; each of them is there once."""

    axis: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class _Units:
    """The rows or columns of a weight, each as one number."""

    target: str
    axis: int
    numbers: torch.Tensor  # [units] int64


def reorder(held: Sequence[Mapping[str, torch.Tensor]], both: Sequence[Leaves], lone: Sequence[list[str]]) -> None:
    """Find what holds the weights of the other side in another order; it goes by no name, for it is no weight there."""
    alone = [{t: held[i][t] for t in lone[i] if t not in both[i].blocks} for i in (0, 1)]
    if not all(alone):
        return
    contents = [{t: name for t, (name, _) in one.names.items() if name[0] == "content"} for one in both]
    for i, found in enumerate(both):
        by_content = {name: t for t, name in contents[1 - i].items()}
        equal = {t: by_content[name] for t, name in contents[i].items() if name in by_content}
        vectors = shuffled(alone[i], alone[1 - i])
        found.orders = agreed(ordered(alone[i], alone[1 - i]) | vectors, equal)
    for i, found in enumerate(both):
        if i == 0:  # one weight for one is said of after's
            found.orders = {t: o for t, o in found.orders.items() if len(o.pieces) > 1}
        taken = {p.target for o in found.orders.values() for p in o.pieces}
        found.names |= {t: (("ordered", i, t), False) for t in found.orders}
        both[1 - i].names |= {t: (("ordered", 1 - i, t), False) for t in taken}


def ordered(held: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> dict[str, Ordered]:
    """Find the weights whose rows are those of others', in an order of their own. By key; both of weights alone."""
    tables: dict[tuple[int, int], list[_Units]] = defaultdict(list)
    for target, value in others.items():
        for units, width in _units(target, value):
            tables[value.dim(), width].append(units)
    joined = {key: _Table(members) for key, members in tables.items()}
    found: dict[str, Ordered] = {}
    same: dict[Index, Index] = {}  # equal orders are one object
    for target, value in held.items():
        for units, width in _units(target, value):
            table = joined.get((value.dim(), width))
            pieces = table.pieces(units, same) if table is not None and target not in found else ()
            if pieces:
                found[target] = Ordered(units.axis, pieces)
    return found


class _Table:
    """All units of one width of a program's weights, to be looked up."""

    def __init__(self, members: list[_Units]) -> None:
        self._members = members
        numbers = torch.cat([m.numbers for m in members])
        whose = torch.repeat_interleave(torch.tensor([len(m.numbers) for m in members]))
        self._numbers, order = numbers.sort(stable=True)
        self._whose = whose[order]

    def pieces(self, mine: _Units, same: dict[Index, Index]) -> tuple[Piece, ...]:
        """Return the weights whose units those of another are, every one once; () where that cannot be said."""
        at = torch.searchsorted(self._numbers, mine.numbers).clamp_(max=len(self._numbers) - 1)
        if not torch.equal(self._numbers[at], mine.numbers):
            return ()
        parts = [self._members[i] for i in torch.unique(self._whose[at]).tolist()]
        theirs = torch.cat([p.numbers for p in parts])
        if len(theirs) != len(mine.numbers) or len(torch.unique(theirs)) < _DISTINCT * len(theirs):
            return ()
        (values, here), (wanted, there) = mine.numbers.sort(stable=True), theirs.sort(stable=True)
        if not torch.equal(values, wanted):
            return ()
        index = torch.empty_like(here)
        index[there] = here
        if len(parts) == 1 and bool((index.diff() == 1).all()):
            return ()  # in its own order: it is alone because other numbers of it differ
        found = []
        for part, piece in zip(parts, torch.split(index, [len(p.numbers) for p in parts]), strict=True):
            order = tuple(piece.tolist())
            found.append(Piece(part.target, same.setdefault(order, order), part.axis != mine.axis))
        return tuple(found)


def _units(target: str, value: torch.Tensor) -> Iterator[tuple[_Units, int]]:
    """Yield a weight's rows and its columns, and how wide each is."""
    if value.dim() < 2 or value.device.type == "meta" or not value.dtype.is_floating_point:
        return
    for axis in (0, 1):
        rows = value.movedim(axis, 0).flatten(1)
        if len(rows) >= _FEWEST and rows.shape[1] >= _FEWEST:
            yield _Units(target, axis, _numbered(rows)), rows.shape[1]


def _numbered(rows: torch.Tensor) -> torch.Tensor:
    """Turn some elements of each row, rounded as bfloat16 would, into one number: [rows] int64 on the CPU."""
    step = max(1, rows.shape[1] // _ROW)
    picked = rows[:, ::step][:, :_ROW].to(torch.bfloat16).contiguous().view(torch.int16).cpu().long()
    drawn = torch.Generator().manual_seed(picked.shape[1])
    factors = torch.randint(1 << 62, (picked.shape[1],), generator=drawn) | 1
    found: torch.Tensor = ((picked + 1) * factors).sum(1)
    return found


def shuffled(held: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> dict[str, Ordered]:
    """Find the vectors that hold the numbers of one of the others' in another order: many are equal, which is not told.

    By key; the order is left open.
    """
    known = {_sorted(value): target for target, value in others.items() if _tells(value)}
    return {
        target: Ordered(0, (Piece(known[numbers], (), False),))
        for target, value in held.items()
        if _tells(value) and (numbers := _sorted(value)) in known
    }


def _tells(vector: torch.Tensor) -> bool:
    plain = vector.dim() == 1 and vector.device.type != "meta" and vector.dtype.is_floating_point
    return plain and len(torch.unique(vector)) >= 2 * _FEWEST


def _sorted(vector: torch.Tensor) -> bytes:
    numbers = vector.to(torch.bfloat16).sort().values.view(torch.int16)
    return bytes(str(numbers.tolist()), "ascii")


# --- what the other layers say ------------------------------------------------------------------------------------


def agreed(found: dict[str, Ordered], equal: Mapping[str, str]) -> dict[str, Ordered]:
    """Let most of the weights that play one part in repeated modules speak for all of them.

    `equal` are those that hold a weight of the other side as it is. One that most of them are not like gets their
    order, or none. The part is told by its name, and by that of what it stands for on the other side.
    """

    def partner(target: str) -> str:
        pieces = found[target].pieces if target in found else ()
        return pieces[0].target if len(pieces) == 1 else equal.get(target, target)

    out = _agreed(dict(found), found, equal, {t: t for t in (*found, *equal)})
    return _agreed(out, found, equal, {t: partner(t) for t in (*found, *equal)})


def _agreed(
    out: dict[str, Ordered], found: dict[str, Ordered], equal: Mapping[str, str], names: Mapping[str, str]
) -> dict[str, Ordered]:
    roles: dict[str, list[str]] = defaultdict(list)
    for target, name in names.items():
        roles[provenance.repeated(name)[0]].append(target)
    for members in roles.values():
        told = Counter(_signature(found.get(target)) for target in members)
        (most, count), *_ = told.most_common(1)
        if 2 * count <= len(members) or count < 2:
            continue
        example = next(found.get(target) for target in members if _signature(found.get(target)) == most)
        for target in members:
            if _signature(found.get(target)) != most:
                out.pop(target, None)
                taken = _as(example, found.get(target), equal.get(target)) if example is not None else None
                if taken is not None:
                    out[target] = taken
    return out


def _signature(one: Ordered | None) -> object:
    if one is None:
        return None
    return one.axis, tuple((provenance.repeated(p.target)[0], p.index, p.turned) for p in one.pieces)


def _as(example: Ordered, one: Ordered | None, equal: str | None) -> Ordered | None:
    """Return a weight as if it were ordered like another: of the same parts, each with the other's order."""
    parts = [p.target for p in one.pieces] if one is not None else [equal] if equal is not None else []
    by_role = {provenance.repeated(t)[0]: t for t in parts}
    wanted = [by_role.get(provenance.repeated(p.target)[0]) for p in example.pieces]
    if len(by_role) != len(wanted) or len(parts) != len(wanted):
        return None
    pieces = [replace(p, target=t) for p, t in zip(example.pieces, wanted, strict=True) if t is not None]
    return Ordered(example.axis, tuple(pieces)) if len(pieces) == len(wanted) else None


# --- parts of an order --------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def within(index: Index) -> dict[int, set[Index]]:
    """Split an order of heads times dimensions into the orders of either: by size, those that move something.

    ``index[h n + i] = base[h] + inner[i]`` for blocks of some size n: `inner` orders a dimension of that size, and the
    order of the bases one of blocks. Of a part of something larger, what counts is the order in which it is cut out.
    """
    found: dict[int, set[Index]] = defaultdict(set)
    whole, count = torch.tensor(index).argsort().argsort(), len(index)
    for size in (n for n in range(1, count + 1) if count % n == 0):
        blocks = whole.view(-1, size)
        base = blocks.min(1).values
        inner = blocks - base[:, None]
        if int(inner.max()) >= size:
            continue
        moving = inner[(inner.diff(dim=1) != 1).any(1)]  # rotary embedding may turn the first of some blocks alone
        first = moving[:1].expand_as(moving)
        orders = [*moving[:1], *([base.argsort().argsort()] if len(moving) in (0, len(inner)) else [])]
        for order in orders if torch.equal(moving, first) else ():
            if not bool((order.diff() == 1).all()):
                found[len(order)].add(tuple(order.tolist()))
    return found

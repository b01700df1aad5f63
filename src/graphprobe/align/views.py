"""Views: how a value is shown in another layout, and what undoes that."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphprobe.align.ordered import Index

_DIMENSIONS = 5  # more of them have too many orders
_MOST = 256  # views of one value that are tried

Shape = tuple[int, ...]
#: Size of a dimension -> the orders that it may be in -> the layers that have weights in this order.
Orders = Mapping[int, Mapping[Index, Collection[object]]]
Call = tuple[Any, tuple[Any, ...], Shape]  # an operator, its arguments behind the value, the shape that it makes


@dataclass(frozen=True)
class View:
    """``y.reshape(split).permute(order).reshape(joined)``, then ``index_select(dim, index)`` for each of `moves`."""

    split: Shape
    order: tuple[int, ...]
    joined: Shape
    moves: tuple[tuple[int, Index], ...] = ()

    def positions(self, where: torch.Tensor) -> torch.Tensor:
        """Return where in y, in flat order, lies what stands at these places of y in before's layout."""
        for dim, index in self.moves:
            step = math.prod(self.joined[dim + 1 :])
            at = where // step % self.joined[dim]
            where = where + (torch.tensor(index, device=where.device)[at] - at) * step
        strides = [math.prod(self.split[d + 1 :]) for d in range(len(self.split))]
        out, rest = torch.zeros_like(where), where
        for d in reversed(self.order):
            out, rest = out + rest % self.split[d] * strides[d], rest // self.split[d]
        return out

    def calls(self, shape: Shape) -> list[Call]:
        """List the operators that show a value of that shape."""
        found = _arranged(shape, self.split, self.order, self.joined)
        return [*found, *((torch.ops.aten.index_select.default, move, self.joined) for move in self.moves)]

    def calls_back(self, shape: Shape) -> list[Call]:
        """List the operators that turn what was shown into the value of that shape again."""
        undone = [(dim, inverse(index)) for dim, index in reversed(self.moves)]
        found = [(torch.ops.aten.index_select.default, move, self.joined) for move in undone]
        split, order = tuple(self.split[d] for d in self.order), inverse(self.order)
        return [*found, *_arranged(self.joined, split, order, shape)]

    def __str__(self) -> str:
        said = f"reshape {list(self.joined)}"
        if self.order != tuple(range(len(self.order))):
            said = f"reshape {list(self.split)}, permute {list(self.order)}, {said}"
        elif self.moves and self.split == self.joined:
            said = ""
        moved = [f"dimension {dim} in another order" for dim, _ in self.moves]
        return ", ".join([said, *moved] if said else moved)


def inverse(order: Index) -> Index:
    """Return the order that undoes one."""
    out = [0] * len(order)
    for place, i in enumerate(order):
        out[i] = place
    return tuple(out)


def _arranged(shape: Shape, split: Shape, order: tuple[int, ...], joined: Shape) -> list[Call]:
    aten, found = torch.ops.aten, list[Call]()
    if split != shape:
        found.append((aten.reshape.default, (list(split),), split))
    if order != tuple(range(len(order))):
        found.append((aten.permute.default, (list(order),), tuple(split[d] for d in order)))
    if tuple(split[d] for d in order) != joined:
        found.append((aten.reshape.default, (list(joined),), joined))
    return found


def views(x: Shape, y: Shape, orders: Orders) -> list[View]:
    """List the ways to show shape y as shape x that move something: dimensions of one side split the other's, and
    those of a known size may be in another order."""
    plain = _permuted(x, y)
    moved = (m for v in (View(y, tuple(range(len(y))), x), *plain) for m in _moved(v, orders))
    return [*plain, *itertools.islice(moved, _MOST)]


def _moved(view: View, orders: Orders) -> Iterator[View]:
    each = [(d, index) for d, size in enumerate(view.joined) for index in orders.get(size, ())]
    for move in each:
        yield replace(view, moves=(move,))
    for first, second in itertools.combinations(each, 2):
        if first[0] != second[0]:
            yield replace(view, moves=(first, second))


def _permuted(x: Shape, y: Shape) -> list[View]:
    fine_x, fine_y = tuple(d for d in x if d != 1), tuple(d for d in y if d != 1)
    found: dict[tuple[Any, ...], View] = {}
    if len(fine_x) <= _DIMENSIONS:
        for order in itertools.permutations(range(len(fine_x))):
            split = tuple(fine_x[d] for d in order)
            if _tiles(split, fine_y):
                back = tuple(order.index(d) for d in range(len(order)))
                found.setdefault((split, back), View(split, back, x))
    if len(fine_y) <= _DIMENSIONS:
        for order in itertools.permutations(range(len(fine_y))):
            if _tiles(tuple(fine_y[d] for d in order), fine_x):
                found.setdefault((fine_y, order), View(fine_y, order, x))
    return [view for view in found.values() if view.order != tuple(range(len(view.order)))]


def _tiles(fine: Shape, coarse: Shape) -> bool:
    """Whether neighbours of the one multiply to the other."""
    rest = list(fine)
    for size in coarse:
        product = 1
        while rest and product < size:
            product *= rest.pop(0)
        if product != size:
            return False
    return not rest

"""Which rows of one matrix are nearest to which rows of another: near-linear where there are many of them.

``| |a| - |b| | <= |a - b|``, and ``|<a - b, r>| <= |a - b|`` for a unit vector r: what is near has nearly the same norm
and lies near in every projection. So rows are sorted by norm, and each is compared with those of nearly its norm alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

TIE = 2.0  # what is less than so many times farther away makes the answer uncertain
SAME = 1.1  # distances that differ by less are one
FLOOR = 1e-6
_ROWS = 256  # rows that are compared at once
_PAIRS = 1 << 16  # pairs that are measured at once
_LOST = 1e-12  # what subtracting squares may lose
_DIRECTIONS = 6
_FINE = 2e-3  # up to here projections tell nearly all rows apart; beyond, products of all rows of one norm are quicker


@dataclass
class Near:
    """What is near to each row of b: (row of a, distance) pairs; and how far the nearest row of b is from each of a."""

    of_y: dict[int, list[tuple[int, float]]]
    nearest_y: torch.Tensor

    def is_mutual(self, row: int, distance: float) -> bool:
        """Whether no other row of b is nearer to that row of a."""
        return distance <= float(self.nearest_y[row]) * SAME + FLOOR


def nearest(a: torch.Tensor, b: torch.Tensor, agree: float) -> Near:
    """Find for each row of b the rows of a within `agree` that are about as near as the nearest: [xs, n], [ys, n].

    Distances are relative to the norm of the row of b. A row of b that nothing of a comes within `agree` of has none.
    """
    near = Near({}, torch.full((len(a),), float("inf"), dtype=torch.float64))
    if not len(a) or not len(b):
        return near
    a, b = a.double(), b.double()
    pairs = _projected if agree <= _FINE else _multiplied
    for rows, columns, distances in pairs(a, b, TIE * agree + 2 * FLOOR):
        near.nearest_y.scatter_reduce_(0, columns, distances, "amin")
        best = torch.full((len(b),), float("inf"), dtype=torch.float64).scatter_reduce_(0, rows, distances, "amin")
        best = best[rows]
        limit = torch.maximum(best.clamp(min=FLOOR) * TIE, best * SAME + FLOOR)
        keep = (distances <= limit) & (best <= agree)
        found = zip(rows[keep].tolist(), columns[keep].tolist(), distances[keep].tolist(), strict=True)
        for row, column, distance in found:
            near.of_y.setdefault(row, []).append((column, distance))
    return near


Pairs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # rows of b, rows of a, distances; a row of b in one piece


def _multiplied(a: torch.Tensor, b: torch.Tensor, reach: float) -> Iterator[Pairs]:
    """Compare rows of nearly one norm with one another."""
    norms_a, norms_b = _norms(a), _norms(b)
    order = norms_a.argsort()
    keys = norms_a[order]
    for rows in torch.split(norms_b.argsort(), _ROWS):
        norms = norms_b[rows, None]
        ends = torch.cat([norms[0] * (1 - reach), norms[-1] * (1 + reach)])
        low, high = torch.searchsorted(keys, ends).tolist()
        columns = order[low:high]
        squares = norms_a[columns].square() + norms.square() - 2 * b[rows] @ a[columns].T
        row, column = torch.nonzero(squares <= (reach * norms).square() + _LOST * norms.square(), as_tuple=True)
        yield _within(a, b, rows[row], columns[column], reach)


def _projected(a: torch.Tensor, b: torch.Tensor, reach: float) -> Iterator[Pairs]:
    """Compare rows that lie near in the first of some random directions, then in the others and in norm."""
    generator = torch.Generator().manual_seed(7)
    count = min(_DIRECTIONS, a.shape[1])
    directions = torch.linalg.qr(torch.randn(a.shape[1], count, generator=generator, dtype=torch.float64))[0]
    shown_a, shown_b = (torch.column_stack([v @ directions, _norms(v)]) for v in (a, b))
    room = reach * shown_b[:, -1]
    order = shown_a[:, 0].argsort()
    keys = shown_a[order, 0].contiguous()
    low = torch.searchsorted(keys, shown_b[:, 0] - room)
    counts = torch.searchsorted(keys, shown_b[:, 0] + room, right=True) - low
    for chunk in torch.split(torch.arange(len(b)), _ROWS):
        rows = torch.repeat_interleave(chunk, counts[chunk])
        first = counts[chunk].cumsum(0) - counts[chunk]
        columns = order[low[rows] + torch.arange(len(rows)) - torch.repeat_interleave(first, counts[chunk])]
        keep = ((shown_a[columns] - shown_b[rows]).abs() <= room[rows, None]).all(1)
        yield _within(a, b, rows[keep], columns[keep], reach)


def _norms(rows: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
    return found


def _within(a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, reach: float) -> Pairs:
    """Measure the distances of pairs and keep those within reach."""
    measured = [
        _norms(b[mine] - a[theirs]) / _norms(b[mine])
        for mine, theirs in zip(torch.split(rows, _PAIRS), torch.split(columns, _PAIRS), strict=True)
    ]
    distances = torch.cat(measured)
    keep = distances <= reach
    return rows[keep], columns[keep], distances[keep]

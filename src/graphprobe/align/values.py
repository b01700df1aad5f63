"""Evidence 5, values: run both graphs; nodes that hold the same numbers claim each other.

Two values agree where their sketches agree to a few percent (accumulated rounding stays below, anything else is far
above) and nothing else is nearly as near, on either side. What is constant, and what several unrelated nodes hold, is
never claimed on values alone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.matching import Matching, is_part, shown_as
from graphprobe.align.sketches import MOMENTS

AGREE = 0.05  # relative distance of two sketches that counts as equal, where something is computed in 16 bits or less
AGREE_FINE = 1e-3  # where nothing is
TIE = 2.0  # what is less than so many times farther away makes the answer uncertain
SAME = 1.1  # distances that differ by less are one
_FLOOR = 1e-6
_ROWS = 512  # distances are computed for so many values at once
_PAIRS = 4_000_000  # above so many pairs, near ones are looked for in sorted projections first
_TIGHT = 1e-3


def claim(matching: Matching) -> None:
    """Claim unclaimed nodes by what they hold when both graphs run on the same inputs."""
    left, right = matching.sketches("before"), matching.sketches("after")
    of_before, of_after = matching.alignment.of_before, matching.alignment.of_after
    groups: dict[Any, tuple[list[Node], list[Node]]] = defaultdict(lambda: ([], []))
    for column, (known, claimed) in enumerate(((left, of_before), (right, of_after))):
        for node, sketch in known.items():
            if not claimed.get(node):
                groups[_count(node), sketch.numel()][column].append(node)
    for xs, ys in groups.values():
        if xs and ys:
            a, b = (torch.stack([known[n][:-MOMENTS] for n in group]) for known, group in ((left, xs), (right, ys)))
            for x, y in _pairs(matching, xs, ys, a, b):
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


@dataclass
class _Near:
    """What is near to each y: (index of x, distance) pairs; and how far the nearest y is from each x."""

    of_y: dict[int, list[tuple[int, float]]]
    nearest_y: torch.Tensor


def _pairs(
    matching: Matching, xs: list[Node], ys: list[Node], a: torch.Tensor, b: torch.Tensor
) -> list[tuple[Node, Node]]:
    """Pair nodes that hold the same numbers; what is nearest on one side must be nearest on the other, too."""
    near = nearest(a, b, AGREE if matching.is_coarse() else AGREE_FINE)
    alike: dict[tuple[Node, ...], list[Node]] = defaultdict(list)  # what holds one value before -> what holds it after
    for row, found in near.of_y.items():
        best = min(d for _, d in found)
        same = [(i, d) for i, d in found if d <= best * SAME + _FLOOR]
        # where others are almost as near, or another y is nearer, it cannot be told
        if len(found) == len(same) and all(d <= float(near.nearest_y[i]) * SAME + _FLOOR for i, d in same):
            alike[tuple(xs[i] for i, _ in sorted(same))].append(ys[row])
    pairs = []
    for same_xs, same_ys in alike.items():
        pairs += _one_value(matching, list(same_xs), same_ys)
    return pairs


def nearest(a: torch.Tensor, b: torch.Tensor, agree: float = AGREE) -> _Near:
    """Find for each row of b the rows of a within `agree` that are about as near as the nearest: [xs, n], [ys, n]."""
    near = _Near({}, torch.full((len(a),), float("inf"), dtype=torch.float64))
    rows = torch.arange(len(b))
    if len(a) * len(b) > _PAIRS:
        rows = _from_projections(a, b, near)
    wide = a.double()
    squares = wide.square().sum(1)
    for chunk in torch.split(rows, _ROWS):
        mine = b[chunk].double()
        own = mine.square().sum(1, keepdim=True)
        distance = (squares + own - 2 * mine @ wide.T).clamp_(min=0).sqrt() / own.sqrt()
        near.nearest_y = torch.minimum(near.nearest_y, distance.amin(0))
        best = distance.amin(1)
        limit = torch.maximum(best.clamp(min=_FLOOR) * TIE, best * SAME + _FLOOR)
        for i, column in torch.nonzero((distance <= limit[:, None]) & (best <= agree)[:, None]).tolist():
            near.of_y.setdefault(int(chunk[i]), []).append((column, float(distance[i, column])))
    return near


def _from_projections(a: torch.Tensor, b: torch.Tensor, near: _Near) -> torch.Tensor:
    """Find very near pairs by their order along random directions; return the rows of b that have none.

    ``|<a - b, r>| <= |a - b|`` for a unit vector r, so what is near lies near in every projection.
    """
    generator = torch.Generator().manual_seed(7)
    directions = torch.linalg.qr(torch.randn(a.shape[1], min(6, a.shape[1]), generator=generator).double())[0]
    norms_a, norms_b = (torch.linalg.vector_norm(v.double(), dim=1, keepdim=True) for v in (a, b))
    shown_a, shown_b = (v.double() @ directions / n for v, n in ((a, norms_a), (b, norms_b)))
    order = shown_a[:, 0].argsort()
    keys = shown_a[order, 0].contiguous()
    reach = 4 * _TIGHT
    low = torch.searchsorted(keys, shown_b[:, 0] - reach)
    high = torch.searchsorted(keys, shown_b[:, 0] + reach)
    met = torch.zeros(len(b), dtype=torch.bool)
    for chunk in torch.split(torch.arange(len(b)), _ROWS):
        counts = (high - low)[chunk]
        row = torch.repeat_interleave(chunk, counts)
        offset = torch.arange(len(row)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        column = order[torch.repeat_interleave(low[chunk], counts) + offset]
        keep = ((shown_a[column] - shown_b[row]).abs() <= reach).all(1)
        keep &= (norms_a[column] - norms_b[row]).abs().squeeze(1) <= reach * norms_b[row].squeeze(1)
        row, column = row[keep], column[keep]
        distance = torch.linalg.vector_norm(a[column].double() - b[row].double(), dim=1) / norms_b[row].squeeze(1)
        near.nearest_y.scatter_reduce_(0, column, distance, "amin")
        best = torch.full((len(b),), float("inf"), dtype=torch.float64).scatter_reduce_(0, row, distance, "amin")
        limit = torch.maximum(best.clamp(min=_FLOOR) * TIE, best * SAME + _FLOOR)
        keep = (distance <= limit[row]) & (best[row] <= _TIGHT)
        for i, j, d in zip(row[keep].tolist(), column[keep].tolist(), distance[keep].tolist(), strict=True):
            near.of_y.setdefault(i, []).append((j, d))
            met[i] = True
    return torch.nonzero(~met).squeeze(1)


# --- one of several ---------------------------------------------------------------------------------------------


def _one_value(matching: Matching, xs: list[Node], ys: list[Node]) -> list[tuple[Node, Node]]:
    """Pair what all holds one value: in order where both sides hold it equally often, else as far as it can be told."""
    numbers = matching.numbers_before()
    if len({numbers[x] for x in xs}) > 1 and not _is_chain(xs):
        return []  # unrelated nodes hold the same: a tie
    if len(xs) == len(ys) and (len(xs) == 1 or _is_chain(ys)):
        order_x, order_y = matching.before.order, matching.after.order
        return list(zip(sorted(xs, key=order_x.__getitem__), sorted(ys, key=order_y.__getitem__), strict=True))
    pairs = []
    for y in ys:
        alike = [x for x in xs if provenance.target_name(x) == provenance.target_name(y)] or xs
        # a value that is handed on unchanged: the last of the chain
        pairs.append((max(alike, key=lambda n: len(_ancestors(n, xs))), y))
    return pairs


def _is_chain(group: list[Node]) -> bool:
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

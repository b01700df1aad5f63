"""Evidence 5, rows in another order: tokens that are gathered for their experts, of which the other side has more, or
has them sorted otherwise.

Which row goes where, the values decide while the graph runs: no input says it. So rows are looked for by what they
hold, and an order that is found for one value is tried for those whose rows are not all different.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align import slices
from graphprobe.align.forms import Form, Slice
from graphprobe.align.matching import Matching
from graphprobe.align.sketches import directions
from graphprobe.align.values import AGREE, AGREE_FINE

_WIDE = 4  # elements of a row that tell it from others
_CLEAR = 4e-3  # of the size of a row: so far apart are two that are rounded
_PAIRS = 1 << 12  # of values that are compared
_LARGEST = 1 << 22  # pairs of rows that are compared at once

Shape = tuple[int, ...]


def claim(matching: Matching) -> None:
    """Claim values whose rows are rows of a value of the other side. Both programs must be copies."""
    if matching.bound is None or not any(_gathers(n) for side in ("before", "after") for n in matching.makers(side)):
        return
    for side, other in (("after", "before"), ("before", "after")):
        pairs = _pairs(matching, side, other)
        if pairs:
            slices.insert(matching, side, pairs)


def _gathers(node: Node) -> bool:
    return nodes.schema_name(node) in ("aten::index", "aten::index_select", "aten::gather", "aten::sort")


def _pairs(matching: Matching, side: str, other: str) -> dict[Node, list[tuple[Node, Slice]]]:
    """Pair values with those that hold some of their rows; each small one with one big one."""
    found: dict[Node, list[tuple[Node, Slice]]] = defaultdict(list)
    taken: set[Node] = set()
    for stacked in (False, True):
        for small, big, cut in _found(matching, side, other, stacked):
            mine = [c for _, c in found[big]]
            if small not in taken and matching.is_open(big, cut) and not any(cut.meets(c) for c in mine):
                taken.add(small)
                found[big].append((small, cut))
    return {big: parts for big, parts in found.items() if parts}


def _found(matching: Matching, side: str, other: str, stacked: bool) -> Iterator[tuple[Node, Node, Slice]]:
    """Yield what may be rows of something, that, and which of them; those that are `stacked` are of one of many."""
    cut = [n for n in _open(matching, side) if matching.may_be_cut(side, n) and nodes.is_fixed(n)]
    leading = 1 + stacked
    bigs = {n: s for n in cut if (s := _shape(n)) and len(s) > leading}
    smalls = {n: s for n in _open(matching, other) if (s := _shape(n))}
    groups: dict[Shape, tuple[list[Node], list[Node]]] = defaultdict(lambda: ([], []))
    for node, shape in smalls.items():
        groups[shape[1:]][0].append(node)
    for node, shape in bigs.items():
        groups[shape[leading:]][1].append(node)
    groups = {k: g for k, g in groups.items() if all(g) and len(g[0]) * len(g[1]) <= _PAIRS}
    read = functools.partial(_read, leading=leading)
    here = matching.observed(side, [b for _, group in groups.values() for b in group], read)
    there = matching.observed(other, [s for group, _ in groups.values() for s in group], _read)
    agree = AGREE if matching.is_coarse() else AGREE_FINE
    known: dict[Form, None] = {}
    # what rows tell apart first: it says how those are ordered that hold a token twice
    for shape in sorted(groups, key=lambda k: -min(math.prod(k), _WIDE)):
        for small, big, form in _group(*groups[shape], there, here, side, shape, agree, known):
            found = _of_one(form, bigs[big], shape) if stacked else Slice(((0, form),))
            if found is not None:
                yield small, big, found


def _of_one(form: Form, whole: Shape, row: Shape) -> Slice | None:
    """Return the rows of one of those that are stacked, None where they are of several."""
    places = [divmod(i, whole[1]) for i in form.index]
    if len({which for which, _ in places}) != 1:
        return None
    rows = Form(form.side, whole[1], tuple(at for _, at in places))
    return Slice(((1, rows), (0, Form(form.side, whole[0], places[0][:1], left=(len(places), *row)))))


def _open(matching: Matching, side: str) -> list[Node]:
    claimed = matching.alignment.of(side)
    return [n for n in matching.makers(side) if not claimed.get(n) or n in matching.sliced]


def _shape(node: Node) -> Shape | None:
    value = nodes.tensor_val(node)
    if value is None or not value.dtype.is_floating_point or not value.dim():
        return None
    if not all(isinstance(d, int) for d in value.shape[1:]):
        return None
    rows = value.shape[0] if isinstance(value.shape[0], int) else -1  # how many, the values decide
    return (rows, *(int(d) for d in value.shape[1:]))


def _group(
    smalls: list[Node],
    bigs: list[Node],
    there: dict[Node, torch.Tensor],
    here: dict[Node, torch.Tensor],
    side: str,
    shape: Shape,
    agree: float,
    known: dict[Form, None],
) -> list[tuple[Node, Node, Form]]:
    """Pair the values of one group whose rows agree, where it can be told which are meant."""
    fits: dict[Node, list[tuple[Node, Form]]] = defaultdict(list)
    unsure = []
    for small in (s for s in smalls if s in there):
        for big in (b for b in bigs if b in here):
            mine, theirs = there[small], here[big]
            if len(mine) > len(theirs) or (len(mine) == len(theirs) and side == "before"):
                continue
            index = _order(mine, theirs, agree) if math.prod(shape) >= _WIDE else ()
            if index:
                form = Form(side, len(theirs), index)
                known.setdefault(form)
                fits[small].append((big, form))
            elif index is not None:
                unsure.append((small, big))
    for small, big in unsure:
        form_ = next((f for f in known if _fits(f, there[small], here[big], agree)), None)
        if form_ is not None:
            fits[small].append((big, form_))
    return [(small, *found[0]) for small, found in _single(fits)]


def _single(fits: dict[Node, list[tuple[Node, Form]]]) -> Iterable[tuple[Node, list[tuple[Node, Form]]]]:
    """Keep small values that fit one big value; where as many hold the same on both sides, one after another."""
    alike: dict[tuple[Node, ...], list[Node]] = defaultdict(list)
    for small, found in fits.items():
        alike[tuple(big for big, _ in found)].append(small)
    for bigs, members in alike.items():
        for place, small in enumerate(members):
            if len(bigs) == 1:
                yield small, fits[small]
            elif len(bigs) == len(members):
                yield small, [fits[small][place]]


def _order(mine: torch.Tensor, theirs: torch.Tensor, agree: float) -> tuple[int, ...] | None:
    """Return which row of `theirs` each row of `mine` is; () where several could be, None where some is not there."""
    if not len(mine) or len(mine) * len(theirs) > _LARGEST or not bool(theirs.any()):
        return None
    sizes = torch.linalg.vector_norm(theirs, dim=1)
    near = agree * sizes[sizes > 0].median()  # what is left out of a sum is zero
    if not float(torch.cdist(mine[:1], theirs).min()) <= near:
        return None
    apart = torch.cdist(mine, theirs)
    best, index = apart.min(1)
    if not bool((best <= near).all()):
        return None
    close = torch.minimum(4 * best + _CLEAR * near / agree, 4 * near)  # what is about as near might be meant, too
    if bool(((apart <= close[:, None]).sum(1) > 1).any()) or len(set(index.tolist())) < len(mine):
        return ()
    return tuple(index.tolist())


def _fits(form: Form, mine: torch.Tensor, theirs: torch.Tensor, agree: float) -> bool:
    if (form.big, len(form.index)) != (len(theirs), len(mine)) or mine.shape[1:] != theirs.shape[1:]:
        return False
    if len(torch.unique(mine, dim=0)) <= min(4, len(mine) - 1):
        return False
    shown = theirs[list(form.index)]
    return bool((shown - mine).norm() <= agree * mine.norm())


def _read(_: Node, value: Any, leading: int = 1) -> torch.Tensor | None:
    """Return a few numbers for each row, counted over the leading dimensions: [rows, 4] float64."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.dim() or not value.numel():
        return None
    rows = torch.nan_to_num(value.detach().reshape(math.prod(value.shape[:leading]), -1).double())
    found: torch.Tensor = rows @ directions(rows.shape[1]).to(rows.device)
    return found

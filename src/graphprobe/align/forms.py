"""Which slices of a value there may be: what the inputs of the two sides, and the parts they cut out of them, say."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.matching import Matching

OTHER = "after:"  # before the path of an input that the two sides are given different values for
_MOST = 64  # ways to slice one value that are tried


@dataclass(frozen=True)
class Form:
    """Where one side has `big` of something, `index` says which of them are the other side's."""

    side: str  # the side that has more
    big: int
    index: tuple[int, ...]
    part: bool = False  # one of the parts that make up the value: the other side computes the others, too
    left: tuple[int, ...] | None = None  # the dimension goes, and only a value of this shape is meant

    def is_run(self) -> bool:
        """Whether the places follow each other."""
        return self.index == tuple(range(self.index[0], self.index[0] + len(self.index)))


@dataclass(frozen=True)
class Slice:
    """Which elements of a value are meant, dimension by dimension."""

    dims: tuple[tuple[int, Form], ...]

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """Take the slice of a value."""
        for dim, form in self.dims:
            if form.left is not None:
                return value.select(dim, form.index[0])
            value = value.index_select(dim, torch.tensor(form.index, device=value.device))
        return value

    def put(self, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """Return the value with `part` in the place of the slice."""
        places = [torch.arange(size, device=whole.device) for size in whole.shape]
        for dim, form in self.dims:
            places[dim] = torch.tensor(form.index, device=whole.device)
        return whole.index_put(torch.meshgrid(*places, indexing="ij"), part.to(whole))

    def meets(self, other: Slice) -> bool:
        """Whether the two have elements in common, or cannot be put into one value after each other."""
        mine, theirs = dict(self.dims), dict(other.dims)
        kinds = [[(d, f.part, f.left is None) for d, f in dims.items()] for dims in (mine, theirs)]
        return kinds[0] != kinds[1] or all(set(f.index) & set(theirs[d].index) for d, f in mine.items())

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the slice of a value of that shape."""
        sizes = list(whole)
        for dim, form in self.dims:
            if form.left is not None:
                return form.left
            sizes[dim] = len(form.index)
        return tuple(sizes)

    def __str__(self) -> str:
        return ", ".join(f"dimension {dim}: {_shown(form.index)} of {form.big}" for dim, form in self.dims)


def _shown(index: tuple[int, ...]) -> str:
    if len(index) == 1:
        return str(index[0])
    steady = index == tuple(range(index[0], index[0] + len(index)))
    return f"{index[0]} to {index[-1]}" if steady else f"{len(index)} places"


def forms(matching: Matching) -> list[Form]:
    """List the slices that the inputs speak of: inputs of another shape, and parts that one side cuts out of them; then
    what else one side cuts out, or holds together."""
    return list(dict.fromkeys([*of_tokens(matching), *_told_by_weights(matching)]))


def of_outputs(matching: Matching) -> list[Form]:
    """List those slices that an output may be of: what else a graph cuts off would change what its user gets."""
    return list(dict.fromkeys([*_told_by_inputs(matching), *_told_by_weights(matching)]))


def of_tokens(matching: Matching) -> list[Form]:
    """List those slices that are of tokens: they hold for all that is computed of these."""
    return list(dict.fromkeys([*_told_by_inputs(matching), *_of_cuts(matching)]))


def _told_by_inputs(matching: Matching) -> list[Form]:
    found = by_inputs(matching)
    found += _joined_dimensions(found, [(tuple(x.shape), tuple(y.shape)) for x, y in _inputs_apart(matching)])
    return found + _of_parts(matching, "after") + _of_parts(matching, "before")


def _told_by_weights(matching: Matching) -> list[Form]:
    found = _of_joined(matching, "after") + _of_joined(matching, "before")
    return found + _of_stacks(matching, "after") + _of_stacks(matching, "before")


def by_inputs(matching: Matching) -> list[Form]:
    """List the slices that inputs of another shape speak of: of the rest the smaller side knows nothing."""
    return list(dict.fromkeys(f for x, y in _inputs_apart(matching) for f in _of_inputs(x, y)))


def _inputs_apart(matching: Matching) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    bound = matching.bound or {}
    for path in matching.before.inputs:
        x, y = bound.get(path), bound.get(OTHER + path)
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.dim() == y.dim() and x.shape != y.shape:
            yield x, y


def moved_along(inputs: Iterable[str], bound: Mapping[str, Any]) -> str:
    """Say what it means where one side has the other's tokens further along and is not told at which positions."""
    if any("position" in path for path in inputs):
        return ""
    for path in inputs:
        x, y = bound.get(path), bound.get(OTHER + path)
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or x.dim() != y.dim():
            continue
        for form in _of_inputs(x, y) if x.shape != y.shape else ():
            if len(form.index) > 1 and form.index[0] > 0:
                return (
                    f"the tokens that both sides share begin at place {form.index[0]} of {path} in {form.side}, and no "
                    "input says at which positions they stand: what is computed from positions differs, as it would "
                    "without any bug, and all that depends on it is judged in one piece. Give position_ids to both"
                )
    return ""


def _of_inputs(x: torch.Tensor, y: torch.Tensor) -> Iterator[Form]:
    """Find the one place where the smaller of two inputs lies in the larger."""
    differing = [d for d in range(x.dim()) if x.shape[d] != y.shape[d]]
    sides = {"after" if x.shape[d] < y.shape[d] else "before" for d in differing}
    if len(sides) != 1:
        return
    side = sides.pop()
    big, small = (y, x) if side == "after" else (x, y)
    places: list[tuple[int, ...]] = [()]
    for d in differing:
        places = [(*p, at) for p in places for at in range(big.shape[d] - small.shape[d] + 1)]
        if len(places) > 1 << 16:
            return
    fitting = []
    for place in places:
        part = big
        for d, at in zip(differing, place, strict=True):
            part = part.narrow(d, at, small.shape[d])
        if torch.equal(part.to(small.dtype), small):
            fitting.append(place)
    if len(fitting) == 1:  # a mask of ones fits everywhere and says nothing
        for d, first in zip(differing, fitting[0], strict=True):
            yield Form(side, int(big.shape[d]), tuple(range(first, first + int(small.shape[d]))))


def _joined_dimensions(found: list[Form], sizes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Form]:
    """Add the forms of [batch, tokens] in one dimension."""
    out = []
    for x, y in sizes:
        if len(x) < 2:
            continue
        for side, whole, part in (("after", y, x), ("before", x, y)):
            rows, columns = (_index(found, side, whole[d], part[d]) for d in (0, 1))
            if rows is not None and columns is not None and whole[0] > 1 and (whole[:2] != part[:2]):
                index = tuple(r * whole[1] + c for r in rows for c in columns)
                out.append(Form(side, whole[0] * whole[1], index))
    return out


def _index(found: list[Form], side: str, whole: int, part: int) -> tuple[int, ...] | None:
    if whole == part:
        return tuple(range(whole))
    return next((f.index for f in found if f.side == side and f.big == whole and len(f.index) == part), None)


def _of_parts(matching: Matching, side: str) -> list[Form]:
    """A side that cuts a part out of an input works on that part; with a cache it goes on with all up to there."""
    out: list[Form] = []
    other = "before" if side == "after" else "after"
    terms = matching.terms(side)
    for node in terms.of:
        root, steps = terms.root(node)
        if root.op != "placeholder" or len(steps) != 1 or steps[0][0] != "part":
            continue
        _, shape, dim, start, stop, stride = steps[0]
        if stride == 1 and 0 <= start < stop <= shape[dim]:
            out.append(Form(other, shape[dim], tuple(range(start, stop))))
            if start > 0 and stop < shape[dim]:
                out.append(Form(other, shape[dim], tuple(range(stop))))
    return out


def _of_cuts(matching: Matching) -> list[Form]:
    """What one side cuts out of a value and goes on with, where the other goes on with all of it."""
    cut = {side: _cuts(matching, side) for side in ("before", "after")}
    return [
        Form(other, size, tuple(range(start, stop)), part)
        for side, other in (("after", "before"), ("before", "after"))
        for (size, start, stop), part in cut[side].items()
        if (size, start, stop) not in cut[other]
    ]


def _cuts(matching: Matching, side: str) -> dict[tuple[int, int, int], bool]:
    """Map (size, start, stop) of what is cut out of computed values to whether such parts make up all of a value."""
    terms = matching.terms(side)
    found: dict[tuple[Node, int], list[tuple[int, int, int]]] = defaultdict(list)
    for node, term in terms.of.items():
        if not term.step or term.step[0] != "part" or terms.root(node)[0].op != "call_function":
            continue
        _, shape, dim, start, stop, stride = term.step
        if stride == 1 and isinstance(shape[dim], int) and 0 <= start < stop <= shape[dim]:
            found[term.operands[0], dim].append((int(shape[dim]), start, stop))
    out: dict[tuple[int, int, int], bool] = {}
    for places in found.values():
        ends = sorted({(start, stop) for _, start, stop in places})
        tiled = [start for start, _ in ends[1:]] == [stop for _, stop in ends[:-1]]
        all_of_it = tiled and ends[0][0] == 0 and ends[-1][1] == places[0][0]
        for place in places:
            out[place] = out.get(place, False) or all_of_it
    return out


def _of_joined(matching: Matching, side: str) -> list[Form]:
    """What is computed with weights that were put together falls into the parts that belong to each."""
    out: list[Form] = []
    for blocks in matching.leaves(side).blocks.values():
        total = max(b.stop for b in blocks)
        out += [Form(side, total, tuple(range(b.start, b.stop)), True) for b in blocks]
    return out


def _of_stacks(matching: Matching, side: str) -> list[Form]:
    """Where one side has many values of one shape, the other may compute them at once: experts, heads, steps."""
    other = "before" if side == "after" else "after"
    shapes = Counter(s for n in matching.unclaimed(other) if (s := _fixed_shape(n)) is not None)
    out: list[Form] = []
    for shape in dict.fromkeys(_fixed_shape(n) for n in matching.unclaimed(side)):
        for d, size in enumerate(shape or ()):
            assert shape is not None
            left = (*shape[:d], *shape[d + 1 :])
            if 1 < size <= _MOST and shapes[left] >= size:
                out += [Form(side, size, (i,), True, left) for i in range(size)]
    return out


def _fixed_shape(node: Node) -> tuple[int, ...] | None:
    shape = nodes.shape(node)
    if shape is None or not all(isinstance(d, int) for d in shape):
        return None
    return nodes.fixed(node)


def windows(known: Sequence[Form], bigs: Iterable[Sequence[int]], smalls: Iterable[Sequence[int]]) -> list[Form]:
    """List the last so many of all up to there: what a sliding window keeps in its cache."""
    ends: dict[tuple[str, int], set[int]] = defaultdict(set)
    for f in known:
        if _is_run(f):
            ends[f.side, f.big].add(f.index[-1] + 1)
    sizes = {(f.side, f.big, len(f.index)) for f in known}  # of these the inputs say where they lie
    wanted, found = {tuple(s) for s in smalls}, dict[Form, None]()
    for whole in {tuple(b) for b in bigs}:
        for small in wanted:
            differing = [d for d, size in enumerate(whole) if len(small) == len(whole) and size != small[d]]
            if len(differing) != 1:
                continue
            big, size = whole[differing[0]], small[differing[0]]
            for (side, of), stops in ends.items():
                if of == big and (side, big, size) not in sizes:
                    found |= {Form(side, big, tuple(range(e - size, e))): None for e in sorted(stops) if 0 < size <= e}
    return list(found)


def _is_run(f: Form) -> bool:
    return not f.part and f.left is None and f.is_run()


def slices_of(shape: Sequence[int], known: Sequence[Form], shapes: Iterable[Any]) -> list[Slice]:
    """List the ways to take slices of one of `shapes` of a value of that shape."""
    whole, out = tuple(shape), dict[Slice, None]()
    for small in shapes:
        if small is None or not all(isinstance(d, int) for d in small):
            continue
        for d in range(len(whole) if len(small) == len(whole) - 1 else 0):
            if small == (*whole[:d], *whole[d + 1 :]):
                out |= {Slice(((d, f),)): None for f in known if f.big == whole[d] and f.left == small}
        if len(small) != len(whole):
            continue
        differing = [d for d, size in enumerate(whole) if small[d] != size]
        fitting = [[(d, f) for f in _fitting(known, whole[d], small[d])] for d in differing]
        if differing and math.prod(len(f) for f in fitting) <= _MOST * _MOST:
            out |= {Slice(dims): None for dims in itertools.product(*fitting) if _belong_together([f for _, f in dims])}
    return list(out)[: 2 * _MOST]


def _fitting(known: Sequence[Form], big: int, small: int) -> list[Form]:
    """Return the forms of one dimension: the dimension may be one that is known, joined with another."""
    own = [f for f in known if f.left is None]
    found = [f for f in own if f.big == big] or [j for f in own for j in _joined(f, big)]
    found += [s for f in own if (s := _scaled(f, big)) is not None]
    return list(dict.fromkeys(f for f in found if len(f.index) == small))


def _scaled(f: Form, size: int) -> Form | None:
    """Return the same part of a dimension of another size: the heads that a part of all channels makes up."""
    if not f.part or f.big == size or not f.is_run():
        return None
    ends = [divmod(at * size, f.big) for at in (f.index[0], f.index[-1] + 1)]
    if any(rest for _, rest in ends):
        return None
    (start, _), (stop, _) = ends
    return Form(f.side, size, tuple(range(start, stop)), True) if start < stop else None


def _belong_together(forms: Sequence[Form]) -> bool:
    one = len(forms) == 1 or not any(f.part for f in forms)
    return one and all(_together(f, g) for f, g in itertools.combinations(forms, 2))


def _together(f: Form, g: Form) -> bool:
    """Whether rows `f` and columns `g` make a table: the same places, or more of them up to the last."""
    return f == g or f.big != g.big or (g.index[-1] == f.index[-1] and len(g.index) >= len(f.index))


def _joined(f: Form, size: int) -> list[Form]:
    """Return the form of a dimension that `f`'s has been joined with another into: before it, or behind it."""
    times, rest = divmod(size, f.big)
    if f.part or rest or not 1 < times <= _MOST:
        return []
    outer = tuple(i * times + j for i in f.index for j in range(times))
    inner = tuple(j * f.big + i for j in range(times) for i in f.index)
    return [Form(f.side, size, index) for index in dict.fromkeys((outer, inner))]

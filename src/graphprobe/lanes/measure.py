"""What is measured where two lanes meet. Every number goes into one row of a device buffer, read once at the end.

`lanes.elements` says which elements count as numbers; those that nobody cares about are counted as left out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, overload

import torch

from graphprobe.lanes.elements import Bounds, count, is_plain, keep, real, summed, work_dtype
from graphprobe.lanes.norms import bitwise, norm, worst_slice

Tensor = torch.Tensor


class Column(IntEnum):
    """The columns of a row; sums are sums of squares in float64 over the elements that count."""

    COUNT = 0
    LEFT_OUT = 1  # don't-care elements
    BEFORE = 2  # sum b^2
    FREE = 3  # sum (f - b)^2
    FREE_MAX = 4  # max |f - b|
    FREE_CLASS = 5  # elements of different class (NaN against number, ...)
    FREE_EQUAL = 6  # 1 where f is bitwise b
    FORCED = 7  # sum (r - b)^2
    FORCED_CLASS = 8
    FORCED_EQUAL = 9
    BEFORE_NONFINITE = 10
    FORCED_NONFINITE = 11
    EXACT_DONE = 12  # 1 where the exact lanes ran
    EXACT_BEFORE = 13  # sum xb^2
    EXACT = 14  # sum (xa - xb)^2
    EXACT_SLICE = 15  # worst relative difference of one slice along any dimension
    EXACT_CLASS = 16
    BEFORE_ERROR = 17  # sum (b - xb)^2
    FORCED_ERROR = 18  # sum (r - xb)^2
    NATIVE_DONE = 19
    EXACT_MAX = 20  # max |xa - xb|


WIDTH = len(Column)
Found = dict[Column, Any]  # numbers, or tensors that hold one, on their way into a row
#: So many rows are made complete at once; on the CPU they always are.
JOINED = 64


def buffers(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the buffer of all rows, and room for partial results (where nothing fuses them: for one difference)."""
    slots = torch.zeros(rows, WIDTH, dtype=torch.float64, device=device)
    if device.type != "cuda" or not triton_works():
        return slots, slots.new_empty(0)
    return slots, _kernels().new_partials(device)


def _is_fused(partials: Tensor) -> bool:
    return partials.is_cuda and partials.numel() > 0


def _room(partials: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """Return memory on the CPU that every row uses again: fresh pages cost more than the arithmetic on them."""
    if partials.is_cuda:
        return None
    wanted = -(-shape.numel() * dtype.itemsize // partials.itemsize)
    if partials.numel() < wanted:
        partials.resize_(wanted)
    return partials[:wanted].view(dtype)[: shape.numel()].view(shape)


@functools.cache
def triton_works() -> bool:
    """Whether kernels can be compiled here."""
    from torch.utils._triton import has_triton_package

    return bool(has_triton_package())


def _kernels() -> Any:
    from graphprobe.lanes.fused import launching  # late: Triton is not installed everywhere

    return launching


def join(slots: Tensor, partials: Tensor, first: int, rows: int) -> None:
    """Make the rows ``first .. first + rows`` of `slots` complete; at most `JOINED` of them."""
    if _is_fused(partials):
        _kernels().join(slots, partials, first, rows)


def take(slots: Tensor, row: int, source: int) -> None:
    """Tell the free lane's numbers of one row by those of another."""
    slots[row, : Column.FREE_EQUAL + 1].copy_(slots[source, : Column.FREE_EQUAL + 1])
    slots[row, Column.NATIVE_DONE].copy_(slots[source, Column.NATIVE_DONE])


def native(
    slots: Tensor,
    partials: Tensor,
    row: int,
    b: Tensor,
    f: Tensor | None,
    r: Tensor | None,
    moved: Tensor | None,
    bounds: Bounds,
) -> None:
    """Measure the free and the forced lane against before; a lane that is None may be measured by another call."""
    if _is_fused(partials) and _kernels().compare_native(partials, row, b, f, r, moved, bounds):
        return
    f, r, moved = _beside(b, f), _beside(b, r), _beside(b, moved)
    out: Found = {Column.NATIVE_DONE: 1, Column.COUNT: b.numel()}
    if moved is not None:
        out[Column.LEFT_OUT] = moved.sum()
    same = (False, False) if b.is_cuda else bitwise(b, f, r)
    free = Column.FREE, Column.FREE_CLASS, Column.FREE_EQUAL
    equal_f = _pair(out, partials, b, f, moved, bounds, free, Column.FREE_MAX, same[0])
    forced = Column.FORCED, Column.FORCED_CLASS, Column.FORCED_EQUAL
    equal_r = _pair(out, partials, b, r, moved, bounds, forced, None, same[1])
    if not (equal_f and equal_r) and r is not None and (b.is_cuda or out.get(Column.FORCED_CLASS, 0) > 0):
        out[Column.BEFORE_NONFINITE] = _nonfinite(b, moved)
        out[Column.FORCED_NONFINITE] = _nonfinite(r, moved)
    _write(slots, row, out)


def _write(slots: Tensor, row: int, found: Found) -> None:
    """Write what was found into a row; on the CPU all at once, for every access to a tensor costs as much."""
    if slots.is_cuda:
        out = slots[row]
        for column, value in found.items():
            out[column] = value
    else:
        values = torch.tensor([float(value) for value in found.values()], dtype=slots.dtype)
        slots[row].index_copy_(0, torch.tensor([int(column) for column in found]), values)


def native_several(
    slots: Tensor,
    partials: Tensor,
    rows: Sequence[int],
    b: Sequence[Tensor],
    f: Sequence[Tensor],
    r: Sequence[Tensor | None],
    bounds: Sequence[Bounds],
) -> None:
    """Measure several small values, each as `native` does; on a GPU in few launches."""
    places: Iterable[int] = range(len(rows))
    if _is_fused(partials):
        places = _kernels().compare_several(partials, rows, b, f, r, bounds)
    for k in places:
        native(slots, partials, rows[k], b[k], f[k], r[k], None, bounds[k])


@overload
def _beside(x: Tensor, other: Tensor) -> Tensor: ...
@overload
def _beside(x: Tensor, other: None) -> None: ...
def _beside(x: Tensor, other: Tensor | None) -> Tensor | None:
    """Bring a value to where the other one is: a graph on a GPU may hold numbers on the CPU."""
    return other if other is None or other.device == x.device else other.to(x.device)


def _pair(
    out: Found,
    partials: Tensor,
    b: Tensor,
    y: Tensor | None,
    moved: Tensor | None,
    bounds: Bounds,
    columns: tuple[Column, ...],
    top: Column | None,
    same: bool,
) -> bool:
    """Measure one lane against before; whether it holds before's bits (on the CPU that is known: `same`)."""
    if y is None or y.shape != b.shape:
        return True
    squared, wrong_class, equal = columns
    if same:
        out[equal] = 1
        return True
    if b.is_cuda and b.dtype == y.dtype:
        mine, theirs = (t.float() if t.dtype.itemsize == 1 and t.is_floating_point() else t for t in (b, y))
        same_bits = mine == theirs
        out[equal] = (same_bits | (mine.isnan() & theirs.isnan()) if mine.is_floating_point() else same_bits).all()
    work = work_dtype(b, y)
    left, right = keep(moved, real(b).to(work), real(y).to(work))
    room = _room(partials, left.shape, work)
    difference, _, wrong, out[squared], out[Column.BEFORE] = summed(left, right, bounds, room=room)
    out[wrong_class] = count(wrong)
    if top is not None and difference.numel():
        out[top] = difference.abs().amax()
    return False


def _nonfinite(x: Tensor, moved: Tensor | None) -> Tensor:
    if not (x.dtype.is_floating_point or x.is_complex()):
        return torch.zeros((), device=x.device)
    bad = ~torch.isfinite(x)
    return (bad if moved is None or moved.shape != bad.shape else bad & ~moved).sum()


def exact(
    slots: Tensor,
    partials: Tensor,
    row: int,
    b: Tensor,
    r: Tensor | None,
    xb: Tensor,
    xa: Tensor,
    moved: Tensor | None,
    bounds: Bounds,
) -> None:
    """Measure the two exact lanes against each other, and both native lanes against the exact before."""
    if _is_fused(partials) and _kernels().compare_exact(partials, row, b, r, xb, xa, moved, bounds):
        return
    r, xb, xa, moved = _beside(b, r), _beside(b, xb), _beside(b, xa), _beside(b, moved)
    out: Found = {Column.EXACT_DONE: 1}
    if xa.shape != xb.shape:
        out[Column.EXACT_CLASS] = max(xb.numel(), 1)
        _write(slots, row, out)
        return
    mine = bounds[0], bounds[0]
    truth, other = keep(moved, real(xb).double(), real(xa).double())
    size = None if b.is_cuda else norm(truth)
    if size is not None and float(size) < bounds[0] and torch.equal(truth, other):
        out[Column.EXACT_BEFORE] = size.square()
    else:
        room = _room(partials, truth.shape, truth.dtype)
        difference, kept, wrong, out[Column.EXACT], out[Column.EXACT_BEFORE] = summed(truth, other, bounds, size, room)
        out[Column.EXACT_CLASS] = count(wrong)
        if difference.numel():
            out[Column.EXACT_MAX] = difference.abs().amax()
            out[Column.EXACT_SLICE] = worst_slice(difference.square(), kept.square())
    out[Column.BEFORE_ERROR] = _error(partials, truth, b, moved, mine, size)
    if r is not None and r.shape == b.shape:
        equal = not b.is_cuda and bitwise(r, b)[0]
        out[Column.FORCED_ERROR] = (
            out[Column.BEFORE_ERROR] if equal else _error(partials, truth, r, moved, bounds, size)
        )
    _write(slots, row, out)


def _error(
    partials: Tensor, truth: Tensor, value: Tensor, moved: Tensor | None, bounds: Bounds, size: Tensor | None
) -> Tensor:
    """Return the sum of (value - truth)^2; `size` is the norm of truth where it is known."""
    room = _room(partials, truth.shape, truth.dtype) if moved is None and size is not None else None
    if room is not None and size is not None and value.shape == truth.shape:
        top = norm(room.copy_(value).sub_(truth))
        if is_plain(top, size, bounds):
            return top.square()
    (given,) = keep(moved, real(value).double())
    return summed(truth, given, bounds, size)[3]

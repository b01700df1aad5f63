"""The two exact lanes against each other, and both native lanes against the exact before: `measure.exact` in one pass;
and the kernel that joins all partial results.

The worst slice needs sums along every dimension. A ratio of sums is never larger than the largest of the ratios that
were summed, so the worst of smaller pieces bounds it from above: columns of SPAN rows for slices along the innermost
dimension, rows of ACROSS elements for those along all others. What is too small to be worth a second look in pieces is
so as a whole.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from graphprobe.lanes.fused import common
from graphprobe.lanes.fused.common import classes, head, highest, offset, total, write
from graphprobe.lanes.fused.float8 import decoded
from graphprobe.lanes.measure import Column
from graphprobe.lanes.norms import FLOOR

_RING, _GROUP = tl.constexpr(common.RING), tl.constexpr(common.GROUP)
_GROUPS = tl.constexpr(common.GROUPS)
#: A slice without a reference is set against this share of the tensor's mean square.
_FLOOR = tl.constexpr(FLOOR)

_COUNT, _LEFT_OUT, _NATIVE_DONE = (tl.constexpr(int(c)) for c in (Column.COUNT, Column.LEFT_OUT, Column.NATIVE_DONE))
_BEFORE, _FREE, _FREE_MAX = (tl.constexpr(int(c)) for c in (Column.BEFORE, Column.FREE, Column.FREE_MAX))
_FREE_CLASS, _FREE_EQUAL = (tl.constexpr(int(c)) for c in (Column.FREE_CLASS, Column.FREE_EQUAL))
_FORCED, _FORCED_CLASS = (tl.constexpr(int(c)) for c in (Column.FORCED, Column.FORCED_CLASS))
_FORCED_EQUAL, _EXACT_DONE = (tl.constexpr(int(c)) for c in (Column.FORCED_EQUAL, Column.EXACT_DONE))
_BEFORE_NONFINITE = tl.constexpr(int(Column.BEFORE_NONFINITE))
_FORCED_NONFINITE = tl.constexpr(int(Column.FORCED_NONFINITE))
_EXACT_BEFORE, _EXACT = (tl.constexpr(int(c)) for c in (Column.EXACT_BEFORE, Column.EXACT))
_EXACT_SLICE, _EXACT_CLASS = (tl.constexpr(int(c)) for c in (Column.EXACT_SLICE, Column.EXACT_CLASS))
_EXACT_MAX, _BEFORE_ERROR = (tl.constexpr(int(c)) for c in (Column.EXACT_MAX, Column.BEFORE_ERROR))
_FORCED_ERROR = tl.constexpr(int(Column.FORCED_ERROR))


@triton.jit
def _ratio(over, under, floor):
    ratio = over / (under + floor + 1e-300)
    return tl.where(ratio == ratio, ratio, float("inf"))


@triton.jit
def _load(value, at, along, inside, sizes, strides, KIND: tl.constexpr):
    """Return [rows, columns] of a tensor in float64; what lies outside is zero."""
    n1, n2, n3 = sizes
    place = offset(at, n1, n2, n3, 1, strides[0], strides[1], strides[2], strides[3], 0) + along * strides[4]
    return decoded(tl.load(value + place, mask=inside, other=0), KIND).to(tl.float64)


@triton.jit
def _share(
    xb, xa, b, r, m, rows, width, sizes, xs, ys, bs, rs, ms, BOUND: tl.constexpr, OTHER: tl.constexpr,
    HAS_R: tl.constexpr, HAS_M: tl.constexpr, LONG: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr,
    SPAN: tl.constexpr, STAGES: tl.constexpr, CAREFUL: tl.constexpr, B8: tl.constexpr, R8: tl.constexpr,
):  # fmt: skip
    """Measure the units of this program.

    Returns the sums of x^2, d^2, (b - x)^2, (r - x)^2, the largest |d|, slice and row of x^2, and the wrong classes.
    Without CAREFUL every element counts: right if all sums are finite and no row reaches the sentinel bound.
    """
    kind: tl.constexpr = tl.int64 if LONG else tl.int32
    across = tl.cdiv(width, ACROSS)
    units = across * tl.cdiv(rows, SPAN)
    line, flat = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS, ACROSS], tl.float64)
    kept, worst, largest, squares = line, line, line, line
    error, forced_error, top = flat, flat, flat
    wrong = tl.zeros([ROWS], tl.int32)
    for number in range(tl.program_id(0), units, tl.num_programs(0)):
        unit = units - 1 - number  # from the end, which was written last and may still be in the cache
        first, start = (unit % across) * ACROSS, (unit // across) * SPAN
        column = first + tl.arange(0, ACROSS)[None, :]
        # of what this program has seen so far: never above the share of the whole tensor
        floor = tl.sum(kept, axis=0) / rows / width * _FLOOR
        over, under = flat, flat
        for step in tl.range(0, SPAN, ROWS, num_stages=STAGES):
            row = start + step + tl.arange(0, ROWS)[:, None]
            inside = (row < rows) & (column < width)
            at, along = row.to(kind), column.to(kind)
            x, y = _load(xb, at, along, inside, sizes, xs, 0), _load(xa, at, along, inside, sizes, ys, 0)
            p = _load(b, at, along, inside, sizes, bs, B8)
            q = _load(r, at, along, inside, sizes, rs, R8) if HAS_R else p
            if CAREFUL:
                if HAS_M:
                    w = _load(m, at, along, inside, sizes, ms, 0) != 0
                    x, y, p, q = tl.where(w, 0.0, x), tl.where(w, 0.0, y), tl.where(w, 0.0, p), tl.where(w, 0.0, q)
                e, f = classes(x, p, BOUND, BOUND)[0], classes(x, q, BOUND, OTHER)[0]
                d, x, differs = classes(x, y, BOUND, OTHER)
                wrong += tl.sum(differs.to(tl.int32), axis=1)
            else:
                d, e, f = y - x, p - x, q - x
            d2, x2 = d * d, x * x
            over += d2
            under += x2
            error += e * e
            if HAS_R:
                forced_error += f * f
            top = tl.maximum(top, tl.abs(d))
            row_over, row_under = tl.sum(d2, axis=1), tl.sum(x2, axis=1)
            worst = tl.maximum(worst, _ratio(row_over, row_under, floor * tl.minimum(width - first, ACROSS)))
            squares += row_over
            kept += row_under
            largest = tl.maximum(largest, row_under)
        column_floor = floor * tl.minimum(rows - start, SPAN)
        ratio = _ratio(tl.sum(over, axis=0), tl.sum(under, axis=0), column_floor)
        worst = tl.maximum(worst, tl.max(ratio, axis=0))
    return (
        tl.sum(kept, axis=0), tl.sum(squares, axis=0), tl.sum(tl.sum(error, axis=1), axis=0),
        tl.sum(tl.sum(forced_error, axis=1), axis=0), tl.max(tl.max(top, axis=1), axis=0), tl.max(worst, axis=0),
        tl.max(largest, axis=0), tl.sum(wrong, axis=0).to(tl.float64),
    )  # fmt: skip


@triton.jit
def _write(cells, rows, found):
    head(cells, rows, tl.num_programs(0))
    write(cells, 1, found[0])
    write(cells, 2, found[1])
    write(cells, 3, found[7])
    write(cells, 4, found[2])
    write(cells, 5, found[3])
    write(cells, 6, found[4])
    write(cells, 7, found[5])


@triton.jit(do_not_specialize=["place", "rows"])
def compare_exact(
    xb, xa, b, r, m, partials, place, rows, width,
    n1, n2, n3, x0, x1, x2, x3, x4, a0, a1, a2, a3, a4, b0, b1, b2, b3, b4, r0, r1, r2, r3, r4, m0, m1, m2, m3, m4,
    BOUND: tl.constexpr, OTHER: tl.constexpr, HAS_R: tl.constexpr, HAS_M: tl.constexpr, LONG: tl.constexpr,
    ROWS: tl.constexpr, ACROSS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, B8: tl.constexpr,
    R8: tl.constexpr,
):  # fmt: skip
    """Compare [rows, width]; a unit of work is SPAN rows of ACROSS elements. Every program writes one slot."""
    sizes, xs, ys = (n1, n2, n3), (x0, x1, x2, x3, x4), (a0, a1, a2, a3, a4)
    bs, rs, ms = (b0, b1, b2, b3, b4), (r0, r1, r2, r3, r4), (m0, m1, m2, m3, m4)
    cells = partials + place + 2 * _GROUP
    again = True
    if not HAS_M:
        found = _share(
            xb, xa, b, r, m, rows, width, sizes, xs, ys, bs, rs, ms,
            BOUND, OTHER, HAS_R, HAS_M, LONG, ROWS, ACROSS, SPAN, STAGES, False, B8, R8,
        )  # fmt: skip
        again = ((found[0] + found[1] + found[2] + found[3] < float("inf")) & (found[6] < BOUND * BOUND)) == 0
        if again == 0:
            _write(cells, rows, found)
    if again:
        careful = _share(
            xb, xa, b, r, m, rows, width, sizes, xs, ys, bs, rs, ms,
            BOUND, OTHER, HAS_R, HAS_M, LONG, ROWS, ACROSS, SPAN, 1, True, B8, R8,
        )  # fmt: skip
        _write(cells, rows, careful)


@triton.jit(do_not_specialize=["first"])
def join(slots, partials, first, WIDTH: tl.constexpr):
    """Join the partial results of one row a program, and mark them as read."""
    row = first + tl.program_id(0)
    out = slots + row * WIDTH
    free = partials + (row % _RING) * (_GROUPS * _GROUP)
    forced, exact = free + _GROUP, free + 2 * _GROUP
    used = tl.load(free).to(tl.int32)
    if used > 0:
        _join_native(out, free, used)
        tl.store(out + _FREE, total(free, 3, used))
        tl.store(out + _FREE_CLASS, total(free, 4, used))
        tl.store(out + _FREE_MAX, highest(free, 5, used))
        tl.store(out + _FREE_EQUAL, 1.0 - highest(free, 6, used))
        tl.store(free, 0.0)
    used = tl.load(forced).to(tl.int32)
    if used > 0:
        _join_native(out, forced, used)
        tl.store(out + _FORCED, total(forced, 3, used))
        tl.store(out + _FORCED_CLASS, total(forced, 4, used))
        tl.store(out + _FORCED_EQUAL, 1.0 - highest(forced, 5, used))
        tl.store(out + _BEFORE_NONFINITE, total(forced, 6, used))
        tl.store(out + _FORCED_NONFINITE, total(forced, 7, used))
        tl.store(forced, 0.0)
    used = tl.load(exact).to(tl.int32)
    if used > 0:
        tl.store(out + _EXACT_DONE, 1.0)
        tl.store(out + _EXACT_BEFORE, total(exact, 1, used))
        tl.store(out + _EXACT, total(exact, 2, used))
        tl.store(out + _EXACT_CLASS, total(exact, 3, used))
        tl.store(out + _BEFORE_ERROR, total(exact, 4, used))
        tl.store(out + _FORCED_ERROR, total(exact, 5, used))
        tl.store(out + _EXACT_MAX, highest(exact, 6, used))
        tl.store(out + _EXACT_SLICE, tl.sqrt(highest(exact, 7, used)))
        tl.store(exact, 0.0)


@triton.jit
def _join_native(out, cells, used):
    tl.store(out + _NATIVE_DONE, 1.0)
    tl.store(out + _COUNT, tl.load(cells + 1))
    tl.store(out + _LEFT_OUT, total(cells, 1, used))
    tl.store(out + _BEFORE, total(cells, 2, used))

"""One value against another in every way of `lanes.details`, each read once; and the worst slice along any dimension.

A program goes through blocks of columns of its share of the rows. It writes its own slot of the scalars, what its rows
sum up to in each block, and what its columns do; `slices` adds these up along every dimension. Nothing is summed by
atomics, so that it does not depend on which program ran first.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from graphprobe.lanes.details import Detail
from graphprobe.lanes.fused.common import SLOTS, highest, offset, total
from graphprobe.lanes.fused.float8 import decoded
from graphprobe.lanes.norms import FLOOR

#: Columns of the partial results of one value, numbered as in `Detail`. The first holds how many programs wrote, and
#: how many shares of dimensions were looked at for their worst slice.
COLUMNS = len(Detail)
#: Most shares in which the slices of one dimension are looked at, and dimensions.
SHARES, DIMS = 64, 5

_SLOTS = tl.constexpr(SLOTS)
_FLOOR = tl.constexpr(FLOOR)
_LEFT_OUT, _BEFORE, _AFTER = (tl.constexpr(int(c)) for c in (Detail.LEFT_OUT, Detail.BEFORE, Detail.AFTER))
_SQUARES, _DOT = tl.constexpr(int(Detail.SQUARES)), tl.constexpr(int(Detail.DOT))
_MAX_ABS, _MAX_ULP = tl.constexpr(int(Detail.MAX_ABS)), tl.constexpr(int(Detail.MAX_ULP))
_MISMATCHED, _CLASSES = tl.constexpr(int(Detail.MISMATCHED)), tl.constexpr(int(Detail.CLASSES))
_BEFORE_NONFINITE = tl.constexpr(int(Detail.BEFORE_NONFINITE))
_AFTER_NONFINITE = tl.constexpr(int(Detail.AFTER_NONFINITE))
_SLICE, _SLICE_DIM = tl.constexpr(int(Detail.SLICE)), tl.constexpr(int(Detail.SLICE_DIM))
_SLICE_INDEX, _COUNT = tl.constexpr(int(Detail.SLICE_INDEX)), tl.constexpr(int(Detail.COUNT))


@triton.jit
def _place(x, BITS: tl.constexpr, LOWEST: tl.constexpr):
    """Return the place of x >= 0 among the numbers of a grid, see `lanes.details`."""
    FIRST: tl.constexpr = (1022 + LOWEST) * 4503599627370496
    normal = (x.to(tl.int64, bitcast=True) - FIRST).to(tl.float64) * (2.0 ** (BITS - 53))
    return tl.where(x >= 2.0**LOWEST, normal, x * (2.0 ** (BITS - 1 - LOWEST)))


@triton.jit
def _magnitude(x):
    """Return the bits of a value but its sign, which are its place among the numbers of its own type."""
    if x.dtype.primitive_bitwidth == 64:
        found = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    elif x.dtype.primitive_bitwidth == 32:
        found = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        found = x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    return found


@triton.jit
def _ulps(x, y, v, w, BITS: tl.constexpr, LOWEST: tl.constexpr, ALIKE: tl.constexpr):
    """Return the distance of x and y, v and w as numbers, in numbers of the grid; uint32 for one type up to 32 bits."""
    if BITS == 0:
        found = tl.abs(w - v)
    else:
        apart = (v < 0) != (w < 0)
        if ALIKE:
            left, right = _magnitude(x), _magnitude(y)
            steps = tl.where(right > left, right - left, left - right)
            if x.dtype.primitive_bitwidth == 64:
                found = tl.where(apart, left.to(tl.float64) + right.to(tl.float64), steps.to(tl.float64))
            else:
                found = tl.where(apart, left.to(tl.uint32) + right.to(tl.uint32), steps.to(tl.uint32))
        else:
            left, right = _place(tl.abs(v.to(tl.float64)), BITS, LOWEST), _place(tl.abs(w.to(tl.float64)), BITS, LOWEST)
            found = tl.where(apart, left + right, tl.abs(right - left))
    return found


@triton.jit
def _load(value, at, along, inside, sizes, strides):
    """Return [rows, columns] of a tensor; what lies outside is zero."""
    n1, n2, n3 = sizes
    place = offset(at, n1, n2, n3, 1, strides[0], strides[1], strides[2], strides[3], 0) + along * strides[4]
    return tl.load(value + place, mask=inside, other=0)


@triton.jit
def _planes(rows, width, blocks, shares):
    """Return how many sums of rows and of columns there are of either kind."""
    return rows.to(tl.int64) * blocks, width.to(tl.int64) * shares


@triton.jit
def _all(tile):
    return tl.sum(tl.sum(tile, axis=1), axis=0).to(tl.float64)


@triton.jit
def _most(tile):
    return tl.max(tl.max(tile, axis=1), axis=0).to(tl.float64)


@triton.jit(do_not_specialize=["place", "rows", "width", "chunk"])
def compare(
    x, y, m, partials, sums, place, rows, width, chunk,
    n1, n2, n3, x0, x1, x2, x3, x4, y0, y1, y2, y3, y4, m0, m1, m2, m3, m4,
    X: tl.constexpr, Y: tl.constexpr, BOUND: tl.constexpr, OTHER: tl.constexpr, HAS_M: tl.constexpr,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr, BITS: tl.constexpr, LOWEST: tl.constexpr,
    LONG: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Compare [rows, width]: program (c, r) takes every so many-th block of columns of `chunk` rows.

    `sums` holds those of rows [2, rows, blocks], then those of columns [2, programs r, width]: squares of the
    difference, and of x. What is not WIDE is classed in float32; differences and sums are float64 in any case.
    """
    kind: tl.constexpr = tl.int64 if LONG else tl.int32
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    sizes = (n1, n2, n3)
    blocks, share = tl.cdiv(width, ACROSS), tl.program_id(1)
    first = share * chunk
    end = tl.minimum(first + chunk, rows)
    row_plane, column_plane = _planes(rows, width, blocks, tl.num_programs(1))
    counted, summed = tl.zeros([ROWS, ACROSS], tl.int32), tl.zeros([ROWS, ACROSS], tl.float64)
    left_out, mismatched, classes, odd_x, odd_y = counted, counted, counted, counted, counted
    after, dot, top = summed, summed, summed
    kept, squares = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    ulp = tl.zeros([ROWS, ACROSS], tl.float64 if WIDE or not ALIKE else tl.uint32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        column = block * ACROSS + tl.arange(0, ACROSS)
        over, under = tl.zeros([ROWS, ACROSS], tl.float64), tl.zeros([ROWS, ACROSS], tl.float64)
        for start in range(first, end, ROWS):
            row = start + tl.arange(0, ROWS)
            inside = (row[:, None] < end) & (column[None, :] < width)
            at, along = row[:, None].to(kind), column[None, :].to(kind)
            xs = _load(x, at, along, inside, sizes, (x0, x1, x2, x3, x4))
            ys = _load(y, at, along, inside, sizes, (y0, y1, y2, y3, y4))
            xs, ys = decoded(xs, X), decoded(ys, Y)
            v, w = xs.to(real), ys.to(real)
            fine_x, fine_y = tl.abs(v) < float("inf"), tl.abs(w) < float("inf")
            masked = (tl.abs(v) >= BOUND) & (tl.abs(w) >= OTHER) & ((v > 0) == (w > 0))
            if WHOLE:  # noqa: SIM108 - numbers of 64 bits are no numbers of float64
                same = masked | (xs == ys)
            else:
                same = masked | (v == w) | ((v != v) & (w != w))
            cares = inside
            if HAS_M:
                moved = _load(m, at, along, inside, sizes, (m0, m1, m2, m3, m4)) != 0
                left_out += (inside & moved).to(tl.int32)
                cares = inside & (moved == 0)
            mismatched += (cares & (same == 0)).to(tl.int32)
            classes += (cares & (((fine_x & fine_y) | same) == 0)).to(tl.int32)
            odd_x += (cares & (fine_x == 0)).to(tl.int32)
            odd_y += (cares & (fine_y == 0)).to(tl.int32)
            counts = cares & fine_x & fine_y & (masked == 0)
            steps = _ulps(xs, ys, v, w, BITS, LOWEST, ALIKE)
            ulp = tl.maximum(ulp, tl.where(counts, steps, 0).to(ulp.dtype))
            v, w = tl.where(counts, v, 0.0), tl.where(counts, w, 0.0)
            v, w = v.to(tl.float64), w.to(tl.float64)
            d = w - v
            d2, v2 = d * d, v * v
            top = tl.maximum(top, tl.abs(d))
            after += w * w
            dot += v * w
            over += d2
            under += v2
            cells = row.to(tl.int64) * blocks + block
            tl.store(sums + cells, tl.sum(d2, axis=1), mask=row < end)
            tl.store(sums + row_plane + cells, tl.sum(v2, axis=1), mask=row < end)
        cells = 2 * row_plane + share.to(tl.int64) * width + column
        columns_over, columns_under = tl.sum(over, axis=0), tl.sum(under, axis=0)
        tl.store(sums + cells, columns_over, mask=column < width)
        tl.store(sums + column_plane + cells, columns_under, mask=column < width)
        squares += tl.sum(columns_over, axis=0)
        kept += tl.sum(columns_under, axis=0)
    cells = partials + place
    slot = cells + share * tl.num_programs(0) + tl.program_id(0)
    tl.store(slot + _LEFT_OUT * _SLOTS, _all(left_out))
    tl.store(slot + _BEFORE * _SLOTS, kept)
    tl.store(slot + _AFTER * _SLOTS, _all(after))
    tl.store(slot + _SQUARES * _SLOTS, squares)
    tl.store(slot + _DOT * _SLOTS, _all(dot))
    tl.store(slot + _MAX_ABS * _SLOTS, _most(top))
    tl.store(slot + _MAX_ULP * _SLOTS, _most(ulp))
    tl.store(slot + _MISMATCHED * _SLOTS, _all(mismatched))
    tl.store(slot + _CLASSES * _SLOTS, _all(classes))
    tl.store(slot + _BEFORE_NONFINITE * _SLOTS, _all(odd_x))
    tl.store(slot + _AFTER_NONFINITE * _SLOTS, _all(odd_y))
    if (share == 0) & (tl.program_id(0) == 0):
        tl.store(cells, (tl.num_programs(0) * tl.num_programs(1)).to(tl.float64))
        tl.store(cells + _COUNT * _SLOTS, rows.to(tl.float64) * width.to(tl.float64))


_SETTLED = ["place", "rows", "width", "shares", *(f"n{k}" for k in range(4)), *(f"d{k}" for k in range(5))]


@triton.jit
def _of(k, x0, x1, x2, x3, x4):
    return tl.where(k == 0, x0, tl.where(k == 1, x1, tl.where(k == 2, x2, tl.where(k == 3, x3, x4))))


@triton.jit(do_not_specialize=_SETTLED)
def slices(
    partials, sums, place, rows, width, shares, n0, n1, n2, n3, d0, d1, d2, d3, d4,
    ACROSS: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Find the worst of a share of the slices along one dimension: program (dimension, share) writes its slot.

    The slices of dimension k are [high, n, low] sums, over high and low.
    """
    k, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    blocks = tl.cdiv(width, ACROSS)
    row_plane, column_plane = _planes(rows, width, blocks, shares)
    cells = partials + place
    used = tl.load(cells).to(tl.int32)
    n, dim = _of(k, n0, n1, n2, n3, width), _of(k, d0, d1, d2, d3, d4)
    high = _of(k, 1, n0, n0 * n1, n0 * n1 * n2, shares)
    low = _of(k, n1 * n2 * n3, n2 * n3, n3, 1, 1) * tl.where(k == 4, 1, blocks)
    sums += tl.where(k == 4, 2 * row_plane, 0)
    plane = tl.where(k == 4, column_plane, row_plane)
    elements = rows.to(tl.float64) * width.to(tl.float64)
    floor = total(cells, _BEFORE, used) / elements * _FLOOR * (elements / n.to(tl.float64))
    worst, where = tl.full([], -1.0, tl.float64), tl.full([], 0, tl.int32)
    for start in range(part * SIDE, tl.where(n > 1, n, 0), parts * SIDE):
        i = start + tl.arange(0, SIDE)
        over, under = tl.zeros([SIDE, DEPTH], tl.float64), tl.zeros([SIDE, DEPTH], tl.float64)
        for begin in range(0, high * low, DEPTH):
            j = begin + tl.arange(0, DEPTH)
            inside = (i[:, None] < n) & (j[None, :] < high * low)
            at = ((j // low)[None, :] * n + i[:, None]).to(tl.int64) * low + (j % low)[None, :]
            over += tl.load(sums + at, mask=inside, other=0.0)
            under += tl.load(sums + plane + at, mask=inside, other=0.0)
        ratio = tl.sum(over, axis=1) / (tl.sum(under, axis=1) + floor + 1e-300)
        ratio = tl.where(ratio == ratio, ratio, float("inf"))
        ratio = tl.where(i < n, ratio, -1.0)
        here = tl.max(ratio, axis=0)
        index = tl.min(tl.where(ratio == here, i, 2147483647), axis=0)
        where = tl.where(here > worst, index, where)
        worst = tl.maximum(worst, here)
    slot = cells + k * parts + part
    tl.store(slot + _SLICE * _SLOTS, worst)
    tl.store(slot + _SLICE_DIM * _SLOTS, dim.to(tl.float64))
    tl.store(slot + _SLICE_INDEX * _SLOTS, where.to(tl.float64))
    if (k == 0) & (part == 0):
        tl.store(cells + 1, (tl.num_programs(0) * parts).to(tl.float64))


@triton.jit
def _first(cells, dims, places, worst, ratio, slot):
    """Return dimension and index of the worst slice, of several equal ones the first."""
    dim = tl.where(ratio == worst, tl.load(cells + dims + slot), 1e9)
    lowest = tl.min(dim, axis=0)
    index = tl.where((ratio == worst) & (dim == lowest), tl.load(cells + places + slot), 1e18)
    return lowest, tl.min(index, axis=0)


@triton.jit(do_not_specialize=["first"])
def join(rows, partials, first, WIDTH: tl.constexpr, RING: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Join the partial results of one row a program, and mark them as read."""
    row = first + tl.program_id(0)
    out = rows + row * WIDTH
    cells = partials + (row % RING) * GROUP
    used = tl.load(cells).to(tl.int32)
    if used > 0:
        tl.store(out, 1.0)
        tl.store(out + _COUNT, tl.load(cells + _COUNT * _SLOTS))
        tl.store(out + _LEFT_OUT, total(cells, _LEFT_OUT, used))
        tl.store(out + _BEFORE, total(cells, _BEFORE, used))
        tl.store(out + _AFTER, total(cells, _AFTER, used))
        tl.store(out + _SQUARES, total(cells, _SQUARES, used))
        tl.store(out + _DOT, total(cells, _DOT, used))
        tl.store(out + _MAX_ABS, highest(cells, _MAX_ABS, used))
        tl.store(out + _MAX_ULP, highest(cells, _MAX_ULP, used))
        tl.store(out + _MISMATCHED, total(cells, _MISMATCHED, used))
        tl.store(out + _CLASSES, total(cells, _CLASSES, used))
        tl.store(out + _BEFORE_NONFINITE, total(cells, _BEFORE_NONFINITE, used))
        tl.store(out + _AFTER_NONFINITE, total(cells, _AFTER_NONFINITE, used))
        slot = tl.arange(0, BLOCK)
        ratio = tl.load(cells + _SLICE * _SLOTS + slot, mask=slot < tl.load(cells + 1).to(tl.int32), other=-1.0)
        worst = tl.max(ratio, axis=0)
        dim, index = _first(cells, _SLICE_DIM * _SLOTS, _SLICE_INDEX * _SLOTS, worst, ratio, slot)
        tl.store(out + _SLICE, tl.sqrt(tl.maximum(worst, 0.0)))
        tl.store(out + _SLICE_DIM, tl.where(worst > 0, dim, -1.0))
        tl.store(out + _SLICE_INDEX, tl.where(worst > 0, index, -1.0))
        tl.store(cells, 0.0)

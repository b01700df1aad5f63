"""The kernels of `triton_stats`: statistics of the share of one block."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from graphprobe.lanes.fused.float8 import decoded
from graphprobe.taps import checksum, columns

#: The jitted functions read the layout of a row as compile-time constants.
_MIN, _MAX, _MEAN, _RMS = (tl.constexpr(c) for c in (columns.MIN, columns.MAX, columns.MEAN, columns.RMS))
_NAN, _INF, _ZEROS = (tl.constexpr(c) for c in (columns.NAN, columns.INF, columns.ZEROS))
_COUNT, _SLOTS, _CHECKSUM = (tl.constexpr(c) for c in (columns.COUNT, columns.SLOTS, columns.CHECKSUM))
_PLACE, _MIX, _UPPER = (tl.constexpr(c) for c in (checksum.PLACE, checksum.MIX, checksum.UPPER))
#: Squares of float32 numbers below this may vanish.
_FAINT = tl.constexpr(2.0**-40)
#: Squares of float64 values beyond these are summed scaled by 2**-600 and 2**600, sums beyond 2**960 by 2**-64.
_BIG, _SMALL, _UP, _DOWN = (tl.constexpr(2.0**e) for e in (500, -500, 600, -600))
_HUGE, _UP_SUM, _DOWN_SUM = (tl.constexpr(2.0**e) for e in (960, 64, -64))


@triton.jit
def _walk(at, sizes, strides):
    """Return where the element `at` of a walk through five dimensions lies."""
    n1, n2, n3, n4 = sizes
    offset = (at % n4) * strides[4]
    rest = at // n4
    offset += (rest % n3) * strides[3]
    rest = rest // n3
    offset += (rest % n2) * strides[2]
    rest = rest // n2
    return offset + (rest % n1) * strides[1] + (rest // n1) * strides[0]


@triton.jit
def _load(value, tile, count, sizes, strides, steps, DENSE: tl.constexpr, WHOLE: tl.constexpr, LONG: tl.constexpr,
          MASKED: tl.constexpr, CHECK: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr):  # fmt: skip
    """Return one step [ROWS, ACROSS], rows within a thread, which of its elements there are, and their places.

    `steps` are the strides of the places in logical order. With WHOLE no row goes beyond the innermost dimension.
    """
    row, across = tl.arange(0, ROWS)[:, None] * ACROSS, tl.arange(0, ACROSS)[None, :]
    kind: tl.constexpr = tl.int64 if LONG else tl.int32
    base = tl.full([], tile, kind) * (ROWS * ACROSS)
    at = base + (row + across)
    inside = at < count
    place = at
    if DENSE:
        found = value + base + (row + across)
    elif WHOLE:
        found = value + (_walk(base + row, sizes, strides) + across * strides[4])
        if CHECK:
            place = _walk(base + row, sizes, steps) + across * steps[4]
    else:
        found = value + _walk(at, sizes, strides)
        if CHECK:
            place = _walk(at, sizes, steps)
    if MASKED:
        return tl.load(found, mask=inside, other=0), inside, place
    return tl.load(found), inside, place


@triton.jit
def _hashed(x, place, inside):
    """Return the terms of the checksum, see `checksum`."""
    if x.dtype.primitive_bitwidth == 64:
        bits = x.to(tl.uint64, bitcast=True)
        word = bits.to(tl.uint32) ^ ((bits >> 32).to(tl.uint32) * _UPPER)
    elif x.dtype.primitive_bitwidth == 32:
        word = x.to(tl.uint32, bitcast=True)
    elif x.dtype.primitive_bitwidth == 16:
        word = x.to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        word = x.to(tl.uint8, bitcast=True).to(tl.uint32)
    h = word ^ (place.to(tl.uint32) * _PLACE)
    h = (h ^ (h >> 16)) * _MIX
    h = h ^ (h >> 13)
    return tl.where(inside, h, 0).to(tl.uint32)


@triton.jit
def _add_fast(state, x, inside, MASKED: tl.constexpr):
    """Add one step in float32."""
    low, high, total, squares, zeros = state
    v = x.to(tl.float32)
    zero = v == 0
    if MASKED:
        low = tl.minimum(low, tl.min(tl.where(inside, v, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(inside, v, float("-inf")), axis=1))
        zero = zero & inside
    else:
        low = tl.minimum(low, tl.min(v, axis=1))
        high = tl.maximum(high, tl.max(v, axis=1))
    total += tl.sum(v, axis=1).to(tl.float64)
    squares += tl.sum(v * v, axis=1).to(tl.float64)
    zeros += tl.sum(zero.to(tl.int32), axis=1)
    return low, high, total, squares, zeros


@triton.jit
def _start(WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Return (low, high, sum, sum of huge, squares, of big, of small, nans, infs, zeros), each per row of a step."""
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    low = tl.full([ROWS], float("inf"), kind)
    real = tl.zeros([ROWS], tl.float64)
    whole = tl.zeros([ROWS], tl.int64)
    return low, -low, real, real, real, real, real, whole, whole, whole


@triton.jit
def _add(state, x, mask, DOUBLE: tl.constexpr, WIDE: tl.constexpr, FLOATING: tl.constexpr):
    """Add one step, element by element."""
    low, high, total, huge, squares, big, small, nans, infs, zeros = state
    v = x.to(tl.float64) if WIDE else x.to(tl.float32)
    good = mask
    if FLOATING:
        nan = v != v
        inf = tl.abs(v) == float("inf")
        good = mask & ((nan | inf) == 0)
        nans += tl.sum((mask & nan).to(tl.int32), axis=1)
        infs += tl.sum((mask & inf).to(tl.int32), axis=1)
    zeros += tl.sum((mask & (v == 0)).to(tl.int32), axis=1)
    low = tl.minimum(low, tl.min(tl.where(good, v, float("inf")), axis=1))
    high = tl.maximum(high, tl.max(tl.where(good, v, float("-inf")), axis=1))
    d = tl.where(good, v, 0.0).to(tl.float64)
    if DOUBLE:
        size = tl.abs(d)
        total += tl.sum(tl.where(size > _HUGE, 0.0, d), axis=1)
        huge += tl.sum(tl.where(size > _HUGE, d * _DOWN_SUM, 0.0), axis=1)
        squares += _square(tl.where((size > _BIG) | (size < _SMALL), 0.0, d))
        big += _square(tl.where(size > _BIG, d * _DOWN, 0.0))
        small += _square(tl.where(size < _SMALL, d * _UP, 0.0))
    else:
        total += tl.sum(d, axis=1)
        squares += _square(d)
    return low, high, total, huge, squares, big, small, nans, infs, zeros


@triton.jit
def _square(d):
    return tl.sum(d * d, axis=1)


@triton.jit
def _write(cells, low, high, mean, rms, nan, inf, zero, seen, blocks, repeat):
    none = seen == nan + inf
    tl.store(cells + _MIN, tl.where(none, float("nan"), low.to(tl.float64)))
    tl.store(cells + _MAX, tl.where(none, float("nan"), high.to(tl.float64)))
    tl.store(cells + _MEAN, tl.where(none, float("nan"), mean))
    tl.store(cells + _RMS, tl.where(none, float("nan"), rms))
    tl.store(cells + _NAN, (nan * repeat).to(tl.float64))
    tl.store(cells + _INF, (inf * repeat).to(tl.float64))
    tl.store(cells + _ZEROS, (zero * repeat).to(tl.float64))
    tl.store(cells + _COUNT, (seen * repeat).to(tl.float64))
    tl.store(cells + _SLOTS, blocks.to(tl.float64))


@triton.jit
def _finish(state, cells, seen, blocks, repeat, DOUBLE: tl.constexpr):
    """Join the rows of a block that was careful, and write its slot."""
    low, high, total, huge, squares, big, small, nans, infs, zeros = state
    nan, inf, zero = tl.sum(nans, axis=0), tl.sum(infs, axis=0), tl.sum(zeros, axis=0)
    finite = (seen - nan - inf).to(tl.float64)
    mean = tl.sum(total, axis=0) / finite
    square = tl.sum(squares, axis=0)
    if DOUBLE:
        mean += tl.sum(huge, axis=0) / finite * _UP_SUM
        large, tiny = tl.sum(big, axis=0), tl.sum(small, axis=0)
        middle = tl.sqrt((square + tiny * _DOWN * _DOWN) / finite)
        upper = tl.sqrt((large + square * _DOWN * _DOWN) / finite) * _UP
        lower = tl.sqrt(tiny / finite) * _DOWN
        rms = tl.where(large > 0, upper, tl.where(square > 0, middle, lower))
    else:
        rms = tl.sqrt(square / finite)
    _write(cells, tl.min(low, axis=0), tl.max(high, axis=0), mean, rms, nan, inf, zero, seen, blocks, repeat)


@triton.jit
def _block(
    value, cells, count, block, blocks, repeat, sizes, strides, steps, FAST: tl.constexpr, DOUBLE: tl.constexpr,
    WIDE: tl.constexpr, FLOATING: tl.constexpr, DENSE: tl.constexpr, WHOLE: tl.constexpr, LONG: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """Measure every `blocks`-th step of a value and write slot `block` of its row."""
    STEP: tl.constexpr = ROWS * ACROSS
    CHECK: tl.constexpr = WIDTH > _CHECKSUM
    tiles, full = tl.cdiv(count, STEP), count // STEP
    cells += block * WIDTH
    seen_steps = (full - block + blocks - 1) // blocks  # full ones of this block
    last = (full < tiles) & (full % blocks == block)
    seen = seen_steps.to(tl.int64) * STEP + tl.where(last, count - full * STEP, 0)
    again = True
    bits = tl.zeros([ROWS], tl.uint32)
    if FAST:
        real = tl.zeros([ROWS], tl.float64)
        low = tl.full([ROWS], float("inf"), tl.float32)
        state = (low, -low, real, real, tl.zeros([ROWS], tl.int32))
        for tile in range(block, full, blocks):  # from the end, which was written last and may still be in the cache
            x, inside, place = _load(
                value, full - 1 - tile, count, sizes, strides, steps, DENSE, WHOLE, LONG, False, CHECK, ROWS, ACROSS
            )
            state = _add_fast(state, decoded(x, EIGHT), inside, False)
            if CHECK:
                bits += tl.sum(_hashed(x, place, inside), axis=1)
        for tile in range(tl.where(last, full, tiles), tiles, 1):
            x, inside, place = _load(
                value, tile, count, sizes, strides, steps, DENSE, WHOLE, LONG, True, CHECK, ROWS, ACROSS
            )
            state = _add_fast(state, decoded(x, EIGHT), inside, True)
            if CHECK:
                bits += tl.sum(_hashed(x, place, inside), axis=1)
        least, most, square = tl.min(state[0], axis=0), tl.max(state[1], axis=0), tl.sum(state[3], axis=0)
        top = tl.maximum(tl.abs(least), tl.abs(most))
        again = ((square < float("inf")) == 0) | ((top > 0) & (top < _FAINT)) | (seen == 0)
        if again == 0:
            n, zero = seen.to(tl.float64), tl.sum(state[4].to(tl.int64), axis=0)
            mean, rms = tl.sum(state[2], axis=0) / n, tl.sqrt(square / n)
            _write(cells, least, most, mean, rms, zero * 0, zero * 0, zero, seen, blocks, repeat)
    if again:
        careful = _start(WIDE, ROWS)
        for number in range(block, tiles, blocks):
            tile = tl.where(number < full, full - 1 - number, number)  # the same ones as above
            x, inside, place = _load(
                value, tile, count, sizes, strides, steps, DENSE, WHOLE, LONG, True, CHECK, ROWS, ACROSS
            )
            careful = _add(careful, decoded(x, EIGHT), inside, DOUBLE, WIDE, FLOATING)
            if CHECK and not FAST:
                bits += tl.sum(_hashed(x, place, inside), axis=1)
        _finish(careful, cells, seen, blocks, repeat, DOUBLE)
    if CHECK:
        tl.store(cells + _CHECKSUM, tl.sum(bits, axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["place", "count", "repeat"])
def measure(
    value, stats, place, count, repeat, n1, n2, n3, n4, s0, s1, s2, s3, s4, p0, p1, p2, p3, p4,
    FAST: tl.constexpr, DOUBLE: tl.constexpr, WIDE: tl.constexpr, FLOATING: tl.constexpr, DENSE: tl.constexpr,
    WHOLE: tl.constexpr, LONG: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr,
    EIGHT: tl.constexpr,
):  # fmt: skip
    """Measure one value; every program writes one slot of its row, which begins at ``stats[place]``."""
    _block(
        value, stats + place, count, tl.program_id(0), tl.num_programs(0), repeat, (n1, n2, n3, n4),
        (s0, s1, s2, s3, s4), (p0, p1, p2, p3, p4), FAST, DOUBLE, WIDE, FLOATING, DENSE, WHOLE, LONG, WIDTH, ROWS,
        ACROSS, EIGHT,
    )  # fmt: skip


#: Values that `measure_several` takes in one launch.
SEVERAL = 16
_NAMES = [f"{kind}{index}" for kind in "vcp" for index in range(SEVERAL)]


@triton.jit
def _pick(k, choices, MANY: tl.constexpr):
    found = choices[0]
    for index in tl.static_range(1, MANY):
        found = tl.where(k == index, choices[index], found)
    return found


@triton.jit(do_not_specialize=_NAMES)
def measure_several(
    stats, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15,
    c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15,
    p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15,
    KIND: tl.constexpr, FAST: tl.constexpr, DOUBLE: tl.constexpr, WIDE: tl.constexpr, FLOATING: tl.constexpr,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr, MANY: tl.constexpr,
    EIGHT: tl.constexpr,
):  # fmt: skip
    """Measure dense values of one dtype: v are addresses (multiples of 16), c counts, p places of rows in stats."""
    k = tl.program_id(1)
    address = _pick(k, (v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15), MANY)
    count = _pick(k, (c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15), MANY)
    place = _pick(k, (p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15), MANY)
    value = tl.multiple_of(address, 16).to(tl.pointer_type(KIND))
    blocks = tl.minimum(tl.cdiv(count, ROWS * ACROSS), SLOTS)
    if tl.program_id(0) < blocks:
        _block(
            value, stats + place, count, tl.program_id(0), blocks, 1, (1, 1, 1, 1), (0, 0, 0, 0, 1),
            (0, 0, 0, 0, 1), FAST, DOUBLE, WIDE, FLOATING, True, False, False, WIDTH, ROWS, ACROSS,
            EIGHT,
        )  # fmt: skip

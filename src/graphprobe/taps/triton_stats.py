"""Statistics on CUDA: one launch per value, one pass over it, no atomics, no synchronisation.

Every block writes one partial row into its own slot of ``stats[row]``; whoever reads the taps joins the slots in a
fixed order (`columns.merge`). So the result does not depend on which block ran first. Sums run in float64, element by
element: float32 squares of bfloat16 values would overflow. A value that is dense in memory, however permuted, is read
as it lies.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from graphprobe.taps import columns, layout

#: Threads of a block are _WARPS * 32; each reads 16 bytes at a time, so many rows of 16 bytes per step.
_ROWS, _WARPS = 512, 8
#: Dimensions of stride that the kernel follows; a value that collapses to more is copied first.
_DIMS = 5
#: Read as they are; complex and float8 values are turned into float32 or float64 first, bool is read as uint8.
_READABLE = {torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64}
#: Of these, exact in float32; the others are compared in float64.
_NARROW = {torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int8, torch.int16, torch.uint16}
_READABLE |= _NARROW

#: The jitted functions read the layout of a row as compile-time constants.
_MIN, _MAX, _MEAN, _RMS = (tl.constexpr(c) for c in (columns.MIN, columns.MAX, columns.MEAN, columns.RMS))
_NAN, _INF, _ZEROS = (tl.constexpr(c) for c in (columns.NAN, columns.INF, columns.ZEROS))
_COUNT, _SLOTS, _WIDTH = (tl.constexpr(c) for c in (columns.COUNT, columns.SLOTS, columns.COLUMNS))
#: Squares of float64 values beyond these are summed scaled by 2**-600 and 2**600, sums beyond 2**960 by 2**-64.
_BIG, _SMALL, _UP, _DOWN = (tl.constexpr(2.0**e) for e in (500, -500, 600, -600))
_HUGE, _UP_SUM, _DOWN_SUM = (tl.constexpr(2.0**e) for e in (960, 64, -64))


def supports(value: torch.Tensor) -> bool:
    """Whether `write_row` can read this dtype."""
    return value.dtype in _READABLE or value.dtype is torch.bool or value.is_complex() or _is_float8(value)


def write_row(value: torch.Tensor, stats: torch.Tensor, row: int) -> None:
    """Write partial statistics of `value` into ``stats[row]``; `stats` is [rows, slots, COLUMNS] float64 beside it."""
    rows, slots, width = stats.shape
    if not (0 <= row < rows and width == columns.COLUMNS and stats.is_contiguous() and stats.dtype is torch.float64):
        raise IndexError(f"row {row} is not in a contiguous float64 statistics buffer [rows, slots, {columns.COLUMNS}]")
    if value.is_cuda and value.device.index != torch.cuda.current_device():
        with torch.cuda.device(value.device):
            _launch(_readable(value), stats, row * slots * width, slots)
    else:
        _launch(_readable(value), stats, row * slots * width, slots)


def _launch(value: torch.Tensor, stats: torch.Tensor, offset: int, slots: int) -> None:
    sizes, strides, repeat = [value.numel()], [1], 1
    if not value.is_contiguous():
        sizes, strides, repeat = layout.collapse(value)
        if len(sizes) > _DIMS:
            value = value.contiguous()
            sizes, strides, repeat = [value.numel()], [1], 1
    count = value.numel() // repeat if repeat else 0
    across = 16 // value.element_size()
    grid = (max(1, min(slots, -(-count // (_ROWS * across)))),)
    kind: dict[str, Any] = {
        "DOUBLE": value.dtype is torch.float64,
        "WIDE": value.dtype not in _NARROW,
        "FLOATING": value.is_floating_point(),
        "ROWS": _ROWS,
        "ACROSS": across,
        "num_warps": _WARPS,
    }
    if len(sizes) == 1 and strides[0] == 1:
        _dense[grid](value, stats, offset, count, repeat, **kind)
        return
    missing = _DIMS - len(sizes)
    sizes, strides = [1] * missing + sizes, [0] * missing + strides
    _strided[grid](value, stats, offset, count, repeat, *sizes[1:], *strides, **kind)


def _readable(value: torch.Tensor) -> torch.Tensor:
    if value.is_complex():
        return value.abs()
    if value.dtype is torch.bool:
        return value.view(torch.uint8)
    return value.float() if _is_float8(value) else value


def _is_float8(value: torch.Tensor) -> bool:
    return value.is_floating_point() and value.element_size() == 1


@triton.jit  # type: ignore[untyped-decorator]
def _start(WIDE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return (low, high, sum, sum of huge, squares, of big, of small, nans, infs, zeros), each per row of a step."""
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    low = tl.full([ROWS], float("inf"), kind)
    real = tl.zeros([ROWS], tl.float64)
    whole = tl.zeros([ROWS], tl.int64)
    return low, -low, real, real, real, real, real, whole, whole, whole


@triton.jit  # type: ignore[untyped-decorator]
def _add(state, x, mask, DOUBLE: tl.constexpr, WIDE: tl.constexpr, FLOATING: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add one step [ROWS, ACROSS]; rows lie within a thread, so that nothing is exchanged before `_finish`."""
    low, high, total, huge, squares, big, small, nans, infs, zeros = state
    v = x.to(tl.float64) if WIDE else x.to(tl.float32)
    good = mask
    if FLOATING:
        nan = v != v
        inf = tl.abs(v) == float("inf")
        good = mask & ~(nan | inf)
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
def _square(d):  # type: ignore[no-untyped-def]
    return tl.sum(d * d, axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _finish(state, cells, seen, repeat, DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Join the rows of a block and write its slot."""
    low, high, total, huge, squares, big, small, nans, infs, zeros = state
    block, blocks = tl.program_id(0), tl.num_programs(0)
    cells += block * _WIDTH
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
    none = finite == 0
    tl.store(cells + _MIN, tl.where(none, float("nan"), tl.min(low, axis=0)))
    tl.store(cells + _MAX, tl.where(none, float("nan"), tl.max(high, axis=0)))
    tl.store(cells + _MEAN, tl.where(none, float("nan"), mean))
    tl.store(cells + _RMS, tl.where(none, float("nan"), rms))
    tl.store(cells + _NAN, (nan * repeat).to(tl.float64))
    tl.store(cells + _INF, (inf * repeat).to(tl.float64))
    tl.store(cells + _ZEROS, (zero * repeat).to(tl.float64))
    tl.store(cells + _COUNT, (seen * repeat).to(tl.float64))
    tl.store(cells + _SLOTS, blocks.to(tl.float64))


@triton.jit(do_not_specialize=["offset", "repeat"])  # type: ignore[untyped-decorator]
def _dense(  # type: ignore[no-untyped-def]
    value,
    stats,
    offset,
    count,
    repeat,
    DOUBLE: tl.constexpr,
    WIDE: tl.constexpr,
    FLOATING: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
):
    state = _start(WIDE, ROWS)
    step = ROWS * ACROSS
    lane = tl.arange(0, ROWS)[:, None] * ACROSS + tl.arange(0, ACROSS)[None, :]
    first = tl.program_id(0).to(tl.int64) * step
    seen = first * 0
    for _ in range(tl.program_id(0), tl.cdiv(count, step), tl.num_programs(0)):
        at = first + lane
        x = tl.load(value + at, mask=at < count, other=0)
        state = _add(state, x, at < count, DOUBLE, WIDE, FLOATING)
        seen += tl.minimum(count - first, step)
        first += tl.num_programs(0) * step
    _finish(state, stats + offset, seen, repeat, DOUBLE)


@triton.jit(do_not_specialize=["offset", "repeat"])  # type: ignore[untyped-decorator]
def _strided(  # type: ignore[no-untyped-def]
    value,
    stats,
    offset,
    count,
    repeat,
    n1,
    n2,
    n3,
    n4,
    s0,
    s1,
    s2,
    s3,
    s4,
    DOUBLE: tl.constexpr,
    WIDE: tl.constexpr,
    FLOATING: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
):
    state = _start(WIDE, ROWS)
    step = ROWS * ACROSS
    lane = tl.arange(0, ROWS)[:, None] * ACROSS + tl.arange(0, ACROSS)[None, :]
    first = tl.program_id(0).to(tl.int64) * step
    seen = first * 0
    for _ in range(tl.program_id(0), tl.cdiv(count, step), tl.num_programs(0)):
        at = first + lane
        place = (at % n4) * s4
        rest = at // n4
        place += (rest % n3) * s3
        rest = rest // n3
        place += (rest % n2) * s2
        rest = rest // n2
        place += (rest % n1) * s1 + (rest // n1) * s0
        x = tl.load(value + place, mask=at < count, other=0)
        state = _add(state, x, at < count, DOUBLE, WIDE, FLOATING)
        seen += tl.minimum(count - first, step)
        first += tl.num_programs(0) * step
    _finish(state, stats + offset, seen, repeat, DOUBLE)

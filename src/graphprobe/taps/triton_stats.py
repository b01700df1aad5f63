"""Statistics on CUDA: one launch per value or for several small ones, one pass, no atomics, no synchronisation.

Every block writes one partial row into its own slot of ``stats[row]``; whoever reads the taps joins the slots in a
fixed order (`columns.merge`). So the result does not depend on which block ran first. A value that is dense in memory,
however permuted, is read as it lies.

Floating numbers are summed in float32 over the few elements that a thread reads at once, then in float64. What is not
finite, or so large or small that its square leaves float32's range, shows in the sum of squares or in the extremes; a
block that sees it goes over its share again, element by element and in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from graphprobe import launches
from graphprobe.lanes.fused import float8
from graphprobe.lanes.fused.joint import joint
from graphprobe.taps import columns, layout, triton_kernels

#: Threads of a block are _WARPS * 32; each reads 16 bytes at a time, so many rows of 16 bytes per step.
_ROWS, _WARPS = 1024, 4
#: Rows per step where strides are followed: what that computes would not fit into the registers for more.
_STRIDED_ROWS = 128
#: The same where several values are read together: they are small.
_SEVERAL_ROWS, _SEVERAL_WARPS = 512, 8
_LAUNCHES = launches.Launches()
#: Dimensions of stride that the kernel follows; a value that collapses to more is copied first.
_DIMS = 5
#: Summed in float32 at first.
_FAST = {torch.float16, torch.bfloat16, torch.float32, *float8.KINDS}
#: Exact in float32; the others are compared in float64.
_NARROW = {*_FAST, torch.uint8, torch.int8, torch.int16, torch.uint16}
#: Read as they lie in memory, bool as uint8; of complex values the magnitudes are made first.
_READABLE = {torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64, *_NARROW}


def supports(value: torch.Tensor, stats: torch.Tensor) -> bool:
    """Whether `write_row` can read this dtype for a row of such a buffer: a checksum needs the bits as they are."""
    if value.is_complex():
        return not columns.has_checksum(stats)
    return value.dtype in _READABLE or value.dtype is torch.bool


def write_row(value: torch.Tensor, stats: torch.Tensor, row: int) -> None:
    """Write partial statistics of `value` into ``stats[row]``; `stats` is [rows, slots, width] float64 beside it."""
    columns.check(stats, row)
    if value.is_cuda and value.device.index != torch.cuda.current_device():
        with torch.cuda.device(value.device):
            _launch(_readable(value), stats, row)
    else:
        _launch(_readable(value), stats, row)


def write_rows(values: Sequence[torch.Tensor], stats: torch.Tensor, rows: Sequence[int]) -> None:
    """Write partial statistics of several values into their rows, in as few launches as dtypes and layouts allow."""
    if stats.is_cuda and stats.device.index != torch.cuda.current_device():
        with torch.cuda.device(stats.device):
            write_rows(values, stats, rows)
        return
    together: dict[torch.dtype, list[tuple[torch.Tensor, int]]] = {}
    for value, row in zip(values, rows, strict=True):
        columns.check(stats, row)
        value = _readable(value)
        dense = _is_dense(value.shape, value.stride()) and (value.is_contiguous() or not columns.has_checksum(stats))
        if dense and value.device == stats.device and value.data_ptr() % 16 == 0:
            together.setdefault(value.dtype, []).append((value, row))
        else:
            write_row(value, stats, row)
    for dtype, group in together.items():
        for start in range(0, len(group), triton_kernels.SEVERAL):
            _launch_several(group[start : start + triton_kernels.SEVERAL], dtype, stats)


def _launch(value: torch.Tensor, stats: torch.Tensor, row: int) -> None:
    _, slots, width = stats.shape
    place = row * slots * width
    key = (launches.kind(value), slots, width, stats.data_ptr() & 15, launches.is_wide(place))
    known = _LAUNCHES.get(key)
    if known is None:
        walk = _walk(value, columns.has_checksum(stats))
        if walk is None:
            _launch(value.contiguous(), stats, row)
            return
        known = _LAUNCHES.note(key, _prepared(value.dtype, slots, width, walk))
    grid, launch = known
    launch(grid, (float8.raw(value), stats), (place,))


class _Walk(NamedTuple):
    """How a kernel goes through a value: sizes and strides [_DIMS], and the strides of the places in logical order."""

    elements: int
    repeat: int  # so often every element is seen
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    steps: tuple[int, ...]
    dense: bool


def _walk(value: torch.Tensor, ordered: bool) -> _Walk | None:
    """Return the way through a value, None where it takes too many dimensions. Statistics need no order."""
    if ordered:
        found = joint((value, torch.empty(value.shape, device="meta")), inner=False)
        if found is None:
            return None
        return _Walk(found.numel, 1, found.sizes, found.strides[0], found.strides[1], found.dense)
    sizes, strides, repeat = _collapsed(value.shape, value.stride())
    missing = _DIMS - len(sizes)
    if missing < 0:
        return None
    count = value.numel() // repeat if repeat else 0
    dense = sizes == (count,) and strides == (1,)
    return _Walk(count, repeat, (1,) * missing + sizes, (0,) * missing + strides, (0,) * _DIMS, dense)


def _prepared(dtype: torch.dtype, slots: int, width: int, walk: _Walk) -> tuple[launches.Grid, launches.Launch]:
    across = 16 // dtype.itemsize
    rows = _ROWS if walk.dense else _STRIDED_ROWS
    reach = max(walk.elements, sum((n - 1) * s for n, s in zip(walk.sizes, walk.strides, strict=True)))
    settled = (walk.elements, walk.repeat, *walk.sizes[1:], *walk.strides, *walk.steps)
    constants = {
        **_kind(dtype), "DENSE": walk.dense, "WHOLE": walk.sizes[-1] % across == 0, "LONG": reach >= 2**30,
        "WIDTH": width, "ROWS": rows, "ACROSS": across,
    }  # fmt: skip
    grid = (max(1, min(slots, -(-walk.elements // (rows * across)))), 1)
    return grid, launches.Launch(triton_kernels.measure, settled, constants, _WARPS)


def _launch_several(group: list[tuple[torch.Tensor, int]], dtype: torch.dtype, stats: torch.Tensor) -> None:
    _, slots, width = stats.shape
    across = 16 // dtype.itemsize
    spare = triton_kernels.SEVERAL - len(group)  # filled with the last value again, which no block looks at
    addresses = [value.data_ptr() for value, _ in group]
    counts = [value.numel() for value, _ in group]
    places = [row * slots * width for _, row in group]
    blocks = min(slots, -(-max(counts) // (_SEVERAL_ROWS * across)))
    key = (dtype, slots, width, stats.data_ptr() & 15, stats.device.index, launches.is_wide(*places))
    launch = _LAUNCHES.get(key)
    if launch is None:
        kind = torch.uint8 if dtype in float8.KINDS else dtype
        constants = {
            "KIND": getattr(tl, str(kind).removeprefix("torch.")), **_kind(dtype), "SLOTS": slots, "WIDTH": width,
            "ROWS": _SEVERAL_ROWS, "ACROSS": across, "MANY": triton_kernels.SEVERAL,
        }  # fmt: skip
        launch = _LAUNCHES.note(key, launches.Launch(triton_kernels.measure_several, (), constants, _SEVERAL_WARPS))
    varying = [number for column in (addresses, counts, places) for number in column + column[-1:] * spare]
    launch((blocks, len(group)), (stats,), varying)


def _kind(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "FAST": dtype in _FAST,
        "DOUBLE": dtype is torch.float64,
        "WIDE": dtype not in _NARROW,
        "FLOATING": dtype.is_floating_point,
        "EIGHT": float8.KINDS.get(dtype, 0),
    }


@functools.lru_cache(4096)
def _collapsed(shape: torch.Size, strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    sizes, steps, repeat = layout.collapse(torch.empty_strided(shape, strides, device="meta"))
    return tuple(sizes), tuple(steps), repeat


@functools.lru_cache(4096)
def _is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    sizes, steps, repeat = _collapsed(shape, strides)
    return len(sizes) == 1 and steps == (1,) and repeat == 1 and 0 < sizes[0] < 2**30


def _readable(value: torch.Tensor) -> torch.Tensor:
    if value.is_complex():
        return value.abs()
    if value.dtype is torch.bool:
        return value.view(torch.uint8)
    return value

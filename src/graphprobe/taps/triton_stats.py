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
from collections.abc import Callable, Hashable, Sequence
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
_NARROW = {*_FAST, torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16}
#: Read as they lie in memory; of complex values the magnitudes are made first.
_READABLE = {torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64, *_NARROW}


class _Known(NamedTuple):
    """How values of one kind are read: as they lie, by a launch, or as what `made` makes of them."""

    grid: launches.Grid
    launch: launches.Launch | None
    made: Callable[[torch.Tensor], torch.Tensor] | None


class _Group(NamedTuple):
    """Values that one launch reads: their places in the list, how many elements each has, with fillers at the end."""

    places: list[int]
    counts: list[int]
    grid: launches.Grid
    launch: launches.Launch


def write_row(value: torch.Tensor, stats: torch.Tensor, row: int) -> bool:
    """Write partial statistics of `value` into ``stats[row]``; False where no kernel can read it for such a row.

    `stats` is [rows, slots, width] float64 on the value's device. A checksum needs the bits as they are, and of complex
    values the kernels see the magnitudes.
    """
    if _elsewhere(stats):
        with torch.cuda.device(stats.device):
            return write_row(value, stats, row)
    place = row * stats.stride(0)
    key = (launches.kind(value), launches.kind(stats), launches.is_wide(place))
    known: _Known | bool | None = _LAUNCHES.get(key)
    if known is None:
        known = _LAUNCHES.note(key, _known(value, stats))
    if not isinstance(known, _Known):
        return False
    if not 0 <= row < stats.shape[0]:
        columns.check(stats, row)
    if known.made is not None:
        return write_row(known.made(value), stats, row)
    assert known.launch is not None
    known.launch(known.grid, (value, stats), (place,))
    return True


def write_rows(values: Sequence[torch.Tensor], stats: torch.Tensor, rows: Sequence[int]) -> list[int]:
    """Write partial statistics of several values into their rows, in as few launches as dtypes and layouts allow.

    Returns the places of those that no kernel can read.
    """
    if _elsewhere(stats):
        with torch.cuda.device(stats.device):
            return write_rows(values, stats, rows)
    for row in rows:
        if not 0 <= row < stats.shape[0]:
            columns.check(stats, row)
    step = stats.stride(0)
    beside = (launches.kind(stats), launches.is_wide(max(rows, default=0) * step))
    key = (beside, *map(launches.kind, values))
    known = _LAUNCHES.get(key)
    if known is None:
        known = _LAUNCHES.note(key, _grouped(values, stats, beside))
    groups, alone = known
    for group in groups:
        addresses = [values[k].data_ptr() for k in group.places]
        group.launch(group.grid, (stats,), [*addresses, *group.counts, *(rows[k] * step for k in group.places)])
    return [k for k in alone if not write_row(values[k], stats, rows[k])]


def _elsewhere(stats: torch.Tensor) -> bool:
    device = stats.get_device()
    return device >= 0 and device != torch.cuda.current_device()


def _known(value: torch.Tensor, stats: torch.Tensor) -> _Known | bool:
    columns.check(stats, 0)
    if value.layout is not torch.strided or value.device != stats.device:
        return False
    if value.is_complex():
        return not columns.has_checksum(stats) and _Known((0, 0), None, lambda value: value.detach().abs())
    if value.dtype not in _READABLE:
        return False
    walk = _walk(value, columns.has_checksum(stats))
    if walk is None:
        return _Known((0, 0), None, lambda value: value.detach().contiguous())
    _, slots, width = stats.shape
    return _prepared(value.dtype, slots, width, walk)


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


def _prepared(dtype: torch.dtype, slots: int, width: int, walk: _Walk) -> _Known:
    across = 16 // dtype.itemsize
    rows = _ROWS if walk.dense else _STRIDED_ROWS
    reach = max(walk.elements, sum((n - 1) * s for n, s in zip(walk.sizes, walk.strides, strict=True)))
    settled = (walk.elements, walk.repeat, *walk.sizes[1:], *walk.strides, *walk.steps)
    constants = {
        **_kind(dtype), "DENSE": walk.dense, "WHOLE": walk.sizes[-1] % across == 0, "LONG": reach >= 2**30,
        "WIDTH": width, "ROWS": rows, "ACROSS": across,
    }  # fmt: skip
    grid = (max(1, min(slots, -(-walk.elements // (rows * across)))), 1)
    return _Known(grid, launches.Launch(triton_kernels.measure, settled, constants, _WARPS), None)


def _grouped(values: Sequence[torch.Tensor], stats: torch.Tensor, beside: Hashable) -> tuple[list[_Group], list[int]]:
    """Sort values by what a variant of the kernel is compiled for, and say which must be read alone."""
    columns.check(stats, 0)
    together: dict[torch.dtype, list[int]] = {}
    alone = []
    for k, value in enumerate(values):
        if _fits(value, stats):
            together.setdefault(value.dtype, []).append(k)
        else:
            alone.append(k)
    groups = []
    _, slots, width = stats.shape
    for dtype, places in together.items():
        key = (dtype, beside)
        launch = _LAUNCHES.get(key) or _LAUNCHES.note(key, _several(dtype, slots, width))
        step = _SEVERAL_ROWS * 16 // dtype.itemsize
        for start in range(0, len(places), triton_kernels.SEVERAL):
            chosen = places[start : start + triton_kernels.SEVERAL]
            counts = [values[k].numel() for k in chosen]
            grid = (min(slots, -(-max(counts) // step)), len(chosen))
            spare = triton_kernels.SEVERAL - len(chosen)  # the last value again, which no block looks at
            groups.append(_Group(chosen + chosen[-1:] * spare, counts + counts[-1:] * spare, grid, launch))
    return groups, alone


def _fits(value: torch.Tensor, stats: torch.Tensor) -> bool:
    if value.layout is not torch.strided or value.device != stats.device or value.dtype not in _READABLE:
        return False
    in_order = value.is_contiguous() or not columns.has_checksum(stats)
    return in_order and value.data_ptr() % 16 == 0 and _is_dense(value.shape, value.stride())


def _several(dtype: torch.dtype, slots: int, width: int) -> launches.Launch:
    kind = torch.uint8 if dtype in (torch.bool, *float8.KINDS) else dtype
    constants = {
        "KIND": getattr(tl, str(kind).removeprefix("torch.")), **_kind(dtype), "SLOTS": slots, "WIDTH": width,
        "ROWS": _SEVERAL_ROWS, "ACROSS": 16 // dtype.itemsize, "MANY": triton_kernels.SEVERAL,
    }  # fmt: skip
    return launches.Launch(triton_kernels.measure_several, (), constants, _SEVERAL_WARPS)


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

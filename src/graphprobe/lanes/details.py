"""Everything that two values can be told apart by, measured where somebody asks for it: `diff(details=True)`.

What `lanes.measure` does not need to judge costs a second look at both values: dot product and cosine, the distance in
representable numbers (ulp), how many elements differ, the worst slice along any dimension and where it is. Every number
goes into one row of a buffer of its own. A GPU reads each value once (`fused.details`); this is the definition.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from graphprobe.lanes import elements, measure
from graphprobe.lanes.elements import Bounds
from graphprobe.lanes.norms import slices
from graphprobe.records import Comparison

Tensor = torch.Tensor


class Detail(IntEnum):
    """The columns of a row; sums are float64 over the elements that count. The first is 1 where it was measured."""

    DONE = 0
    COUNT = 1
    LEFT_OUT = 2
    BEFORE = 3  # sum x^2
    AFTER = 4  # sum y^2
    SQUARES = 5  # sum (y - x)^2
    DOT = 6  # sum x y
    MAX_ABS = 7
    MAX_ULP = 8
    MISMATCHED = 9
    CLASSES = 10
    BEFORE_NONFINITE = 11
    AFTER_NONFINITE = 12
    SLICE = 13
    SLICE_DIM = 14
    SLICE_INDEX = 15


WIDTH = len(Detail)


class Grid(NamedTuple):
    """The numbers of a floating type: bits of the significand, and the exponent of the smallest normal one."""

    bits: int
    lowest: int


#: finfo says other things of some types of 8 bits.
_GRIDS = {
    "float8_e4m3fn": Grid(4, -6), "float8_e5m2": Grid(3, -14), "float8_e4m3fnuz": Grid(4, -7),
    "float8_e5m2fnuz": Grid(3, -15), "float8_e8m0fnu": Grid(1, -127),
}  # fmt: skip
_DOUBLE = Grid(53, -1022)


def grid_of(*dtypes: torch.dtype) -> Grid | None:
    """Return the coarser of the grids, None where all are whole numbers."""
    found = [_grid(dtype) for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    return min(found, key=lambda grid: (grid.bits, -grid.lowest)) if found else None


def _grid(dtype: torch.dtype) -> Grid:
    known = _GRIDS.get(str(dtype).removeprefix("torch."))
    if known is not None:
        return known
    info = torch.finfo(dtype)
    return Grid(1 - round(math.log2(info.eps)), round(math.log2(info.smallest_normal)))


def buffers(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the buffer of all rows, and room for partial results where kernels write them."""
    found = torch.zeros(rows, WIDTH, dtype=torch.float64, device=device)
    fused = device.type == "cuda" and measure.triton_works()
    return found, _kernels().new_partials(device) if fused else found.new_empty(0)


def _kernels() -> Any:
    from graphprobe.lanes.fused import detailing  # late: Triton is not installed everywhere

    return detailing


def compare(
    rows: Tensor, partials: Tensor, row: int, x: Tensor, y: Tensor, moved: Tensor | None, bounds: Bounds
) -> None:
    """Measure y against x into one row of the buffer, complete once `join` was called."""
    if partials.numel() and _kernels().compare(partials, row, x, y, moved, bounds):
        return
    y = y.to(x.device)
    rows[row] = measured(x, y, None if moved is None else moved.to(x.device), bounds)


def join(rows: Tensor, partials: Tensor, first: int, count: int) -> None:
    """Make the rows ``first .. first + count`` complete; at most `measure.JOINED` of them."""
    if partials.numel():
        _kernels().join(rows, partials, first, count)


def measured(before: Tensor, after: Tensor, moved: Tensor | None, bounds: Bounds) -> Tensor:
    """Return the row [WIDTH] float64 of two values of one shape, in plain torch and without synchronising."""
    row = torch.zeros(WIDTH, dtype=torch.float64, device=before.device)
    row[Detail.DONE], row[Detail.SLICE_DIM], row[Detail.SLICE_INDEX] = 1, -1, -1
    raw = elements.real(before), elements.real(after)
    x, y = (side.double() for side in raw)
    row[Detail.COUNT] = x.numel()
    if not x.numel() or x.shape != y.shape:
        return row
    cares = torch.ones_like(x, dtype=torch.bool)
    if moved is not None and moved.shape == x.shape:
        cares = ~moved
        row[Detail.LEFT_OUT] = moved.sum()
    finite = x.isfinite() & y.isfinite()
    masked = (x.abs() >= bounds[0]) & (y.abs() >= bounds[1]) & (x.signbit() == y.signbit())
    whole = raw[0].dtype == raw[1].dtype and not before.dtype.is_floating_point and not before.is_complex()
    equal = raw[0] == raw[1] if whole else (x == y) | (x.isnan() & y.isnan())
    same, counts = masked | equal, finite & ~masked & cares
    row[Detail.MISMATCHED] = (~same & cares).sum()
    row[Detail.CLASSES] = (~(finite | same) & cares).sum()
    row[Detail.BEFORE_NONFINITE] = (~x.isfinite() & cares).sum()
    row[Detail.AFTER_NONFINITE] = (~y.isfinite() & cares).sum()
    x, y = torch.where(counts, x, 0.0), torch.where(counts, y, 0.0)
    difference = y - x
    row[Detail.MAX_ABS] = difference.abs().amax()
    row[Detail.MAX_ULP] = ulps(x, y, grid_of(before.dtype, after.dtype)).amax()
    row[Detail.DOT] = torch.dot(x.flatten(), y.flatten())
    row[Detail.AFTER] = torch.dot(y.flatten(), y.flatten())
    squares, kept = difference.square_(), x.square()
    row[Detail.BEFORE], row[Detail.SQUARES] = kept.sum(), squares.sum()
    row[Detail.SLICE :] = worst_slice(squares, kept)
    return row


def ulps(x: Tensor, y: Tensor, grid: Grid | None) -> Tensor:
    """Return how many numbers of a grid lie between x and y, finite and float64; |y - x| for whole numbers.

    The numbers of a floating type are counted from 0 upwards, and downwards below it: what lies between two of them
    has a part of a step, so that y may be finer than the grid.
    """
    if grid is None:
        return (y - x).abs()
    apart = (x < 0) != (y < 0)
    if grid == _DOUBLE:  # its bits are its place; as float64 the places would be rounded
        left, right = x.abs().view(torch.int64), y.abs().view(torch.int64)
        return torch.where(apart, left.double() + right.double(), (right - left).abs().double())
    left, right = _place(x.abs(), grid), _place(y.abs(), grid)
    return torch.where(apart, left + right, (right - left).abs())


def _place(x: Tensor, grid: Grid) -> Tensor:
    """Return the place of x >= 0 among the numbers of a grid, by the exponent and the mantissa of its float64 bits."""
    normal = (x.view(torch.int64) - ((1022 + grid.lowest) << 52)).double() * 2.0 ** (grid.bits - 53)
    return torch.where(x >= 2.0**grid.lowest, normal, x * 2.0 ** (grid.bits - 1 - grid.lowest))


def worst_slice(difference: Tensor, scale: Tensor) -> Tensor:
    """Return (largest ||d|| / ||x|| of a slice, its dimension, its index) as float64 [3]; both are given as squares."""
    worst = torch.zeros(3, dtype=torch.float64, device=difference.device)
    worst[1:] = -1
    for dim, ratio in slices(difference, scale):
        ratio = torch.where(ratio.isnan(), math.inf, ratio)
        top, index = ratio.max(0)
        here = torch.stack([top.sqrt(), torch.full_like(top, dim), index.double()])
        worst = torch.where(here[0] > worst[0], here, worst)
    return worst


def read(row: Tensor) -> Comparison | None:
    """Turn one row, on the CPU, into a record; None where it was not measured."""
    c = row.tolist()
    if not c[Detail.DONE]:
        return None
    before, after = math.sqrt(c[Detail.BEFORE]), math.sqrt(c[Detail.AFTER])
    cosine = c[Detail.DOT] / before / after if 0 < before < math.inf and 0 < after < math.inf else math.nan
    return Comparison(
        elements=int(c[Detail.COUNT]),
        left_out=int(c[Detail.LEFT_OUT]),
        mismatched=int(c[Detail.MISMATCHED]),
        classes=int(c[Detail.CLASSES]),
        nonfinite_before=int(c[Detail.BEFORE_NONFINITE]),
        nonfinite_after=int(c[Detail.AFTER_NONFINITE]),
        max_abs=c[Detail.MAX_ABS],
        relative=_ratio(math.sqrt(c[Detail.SQUARES]), before, c[Detail.MAX_ABS] == 0),
        dot=c[Detail.DOT],
        cosine=max(-1.0, min(1.0, cosine)) if not math.isnan(cosine) else cosine,
        max_ulp=c[Detail.MAX_ULP],
        worst_slice=c[Detail.SLICE],
        worst_dim=int(c[Detail.SLICE_DIM]),
        worst_index=int(c[Detail.SLICE_INDEX]),
    )


def _ratio(over: float, under: float, same: bool) -> float:
    """Return over / under; NaN where squares of numbers near the ends of float64 cannot tell it."""
    if same:
        return 0.0
    if over == 0 or math.isinf(over):
        return math.nan
    return over / under if under > 0 else math.inf

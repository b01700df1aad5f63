"""Statistics in plain torch: right for every dtype and range, on every device, without synchronising, not fast."""

from __future__ import annotations

import math

import torch

from graphprobe.taps import checksum, columns

#: Packed or bitwise dtypes that torch cannot turn into numbers: such values get a count and no statistics.
OPAQUE = frozenset(
    getattr(torch, name)
    for name in ("float4_e2m1fn_x2", "bits1x8", "bits2x4", "bits4x2", "bits8", "bits16", "quint4x2", "quint2x4")
    if hasattr(torch, name)
)


def row_of(value: torch.Tensor, width: int) -> torch.Tensor:
    """Return one row [width] float64 on value's device, with a checksum where there is room for it."""
    row = measure(value)
    return row if width == columns.COLUMNS else torch.cat([row, checksum.of(value).double()[None]])


def measure(value: torch.Tensor) -> torch.Tensor:
    """Return one row [COLUMNS] float64 on value's device; complex values count by magnitude, bool as 0 and 1.

    Sums run in float64 over values divided by the largest magnitude, so nothing overflows and subnormals count.
    """
    count = value.numel()
    row = torch.full((columns.COLUMNS,), math.nan, dtype=torch.float64, device=value.device)
    row[columns.NAN : columns.COUNT] = 0.0
    row[columns.COUNT] = count  # filled, not made from a list: copying that to a device would synchronise
    row[columns.SLOTS] = 1.0
    if count == 0 or value.dtype in OPAQUE:
        return row
    if value.is_quantized:
        value = value.dequantize()
    x = value.abs() if value.is_complex() else value
    if x.is_floating_point() and x.element_size() == 1:
        x = x.float()  # float8 has no other way up
    x = x.double()
    nan, finite = x.isnan(), x.isfinite()
    number = finite.sum()
    lowest = torch.where(finite, x, math.inf).amin()
    highest = torch.where(finite, x, -math.inf).amax()
    kept = torch.where(finite, x, 0.0)
    largest = torch.maximum(highest, -lowest)
    scale = torch.where((number > 0) & (largest > 0), largest, 1.0)
    scaled = kept / scale
    mean = scaled.sum() / number * scale
    rms = (scaled * scaled).sum().div(number).sqrt() * scale
    numbers = torch.stack([lowest, highest, mean, rms])
    row[: columns.NAN] = torch.where(number > 0, numbers, math.nan)
    row[columns.NAN] = nan.sum()
    row[columns.INF] = count - number - row[columns.NAN]
    row[columns.ZEROS] = (x == 0).sum()
    return row

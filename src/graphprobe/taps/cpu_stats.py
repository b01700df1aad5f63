"""Statistics on the CPU in the fewest passes that torch allows.

Of torch's reductions ``dot`` (BLAS), ``sum`` and ``aminmax`` run at memory speed; ``count_nonzero`` takes twice as long
as ``sign`` and ``dot`` together, ``std_mean`` twenty times. Values are taken in chunks that stay in the cache, in
float32 where the dtype fits, and the chunks are joined in float64. A chunk that holds NaN, infinities, or numbers
whose squares leave float32's range shows in its sum of squares, and is measured again the slow way. What float32 sums
of so few elements lose is about 1e-6 of the rms.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch

from graphprobe.taps import checksum, columns, layout, torch_stats

#: Elements per chunk: half a megabyte of float32. Below 2**24, so that counting in float32 is exact.
_CHUNK = 1 << 17
#: Dtypes that are raised to float32 without loss; all others but float32 go to float64.
_NARROW = {torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16}
_NARROW |= {dtype for name, dtype in vars(torch).items() if name.startswith("float8_")}
#: Compared faster as they are than in float32.
_HALVES = {torch.float16, torch.bfloat16}
#: A mean square below this may have lost squares to underflow.
_FAINT = {torch.float32: 1e-30, torch.float64: 1e-290}


def write_row(value: torch.Tensor, stats: torch.Tensor, row: int) -> None:
    """Write the statistics of `value` into ``stats[row]``; `stats` is [rows, slots, width] float64 on the CPU."""
    columns.check(stats, row)
    tail = [float(checksum.of(value))] if columns.has_checksum(stats) else []
    _store(stats, row, [*_cells(value)[: columns.SLOTS], 1.0, *tail])


def _cells(value: torch.Tensor) -> Sequence[float]:
    """Return [min, max, mean, rms, nan, inf, zeros, count]."""
    count = value.numel()
    if count == 0 or value.dtype in torch_stats.OPAQUE or value.is_quantized:
        found: list[float] = torch_stats.measure(value).tolist()
        return found
    repeat = 1
    if not value.is_contiguous():
        sizes, strides, repeat = layout.collapse(value)
        value = value.as_strided(sizes, strides)
    if count <= _CHUNK:
        cells: Sequence[float] = _measure(value if value.dim() == 1 else value.reshape(-1))
    else:
        cells = _merge([_measure(part) for part in layout.chunks(value, _CHUNK)])
    if repeat > 1:
        cells = [*cells[: columns.NAN], *(cell * repeat for cell in cells[columns.NAN :])]
    return cells


def _measure(x: torch.Tensor) -> list[float]:
    """Measure one chunk [n], n > 0: [min, max, mean, rms, nan, inf, zeros, n]."""
    if x.is_complex():
        x = x.abs()
    wide = x
    if x.dtype not in _FAINT:
        wide = x.to(torch.float32 if x.dtype in _NARROW else torch.float64)
    n = x.numel()
    squares: float = torch.dot(wide, wide).item()
    if not n * _FAINT[wide.dtype] < squares < math.inf:
        return torch_stats.measure(x).tolist()[: columns.SLOTS]
    total: float = wide.sum().item()
    low, high = torch.aminmax(x if x.dtype in _HALVES else wide)
    signs = wide.sign() if wide is x else wide.sign_()
    zeros = n - torch.dot(signs, signs).item()
    return [low.item(), high.item(), total / n, math.sqrt(squares / n), 0.0, 0.0, zeros, float(n)]


def _merge(parts: list[list[float]]) -> list[float]:
    """Join chunks like `columns.merge`, in plain floats: for a few rows that is ten times as fast."""
    out = [math.inf, -math.inf, 0.0, 0.0, *(sum(part[c] for part in parts) for c in range(columns.NAN, columns.SLOTS))]
    total = out[columns.COUNT] - out[columns.NAN] - out[columns.INF]
    if total == 0:
        return [math.nan] * columns.NAN + out[columns.NAN :]
    largest = max((part[columns.RMS] for part in parts if part[columns.RMS] > 0), default=1.0)
    for part in parts:
        share = (part[columns.COUNT] - part[columns.NAN] - part[columns.INF]) / total
        if share:
            out[columns.MIN] = min(out[columns.MIN], part[columns.MIN])
            out[columns.MAX] = max(out[columns.MAX], part[columns.MAX])
            out[columns.MEAN] += share * part[columns.MEAN]
            out[columns.RMS] += share * (part[columns.RMS] / largest) ** 2
    out[columns.RMS] = largest * math.sqrt(out[columns.RMS])
    return out


def _store(stats: torch.Tensor, row: int, cells: Sequence[float]) -> None:
    # a tensor made from the numbers and copied into place would cost a fifth of the tap
    _, slots, width = stats.shape
    place = stats.data_ptr() + row * slots * width * 8
    (ctypes.c_double * width).from_address(place)[:] = [*cells]

"""The layout of a statistics buffer: ``[rows, slots, width]`` float64, and how partial rows become one.

A row belongs to one tap, a slot to one of the partial results that a parallel kernel writes for it. Partials hold
means, not sums, so that joining them cannot overflow; counts are exact up to 2**53. The width is COLUMNS, or
WITH_CHECKSUM: whoever writes a row sees by that whether a checksum is wanted.
"""

from __future__ import annotations

import math

import torch

#: NaN and infinities are left out of the first four. ``SLOTS`` (in slot 0): how many slots are in use; 0: never run.
MIN, MAX, MEAN, RMS, NAN, INF, ZEROS, COUNT, SLOTS = range(9)
COLUMNS = 9

#: The checksum, where there is room for it; and how wide a row then is.
CHECKSUM = 9
WITH_CHECKSUM = 10

#: Slots per row by device type: the most blocks that write partial results of one value.
_SLOTS = {"cuda": 264}


def new_stats(rows: int, device: torch.device, checksum: bool = False) -> torch.Tensor:
    """Return an empty statistics buffer [rows, slots, width] float64 for values on `device`."""
    width = WITH_CHECKSUM if checksum else COLUMNS
    with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
        return torch.zeros(rows, _SLOTS.get(device.type, 1), width, dtype=torch.float64, device=device)


def has_checksum(stats: torch.Tensor) -> bool:
    """Whether the rows of a buffer have room for a checksum."""
    return stats.shape[-1] == WITH_CHECKSUM


def check(stats: torch.Tensor, row: int) -> None:
    """Raise IndexError where a row cannot be written."""
    rows, _, width = stats.shape
    fits = width in (COLUMNS, WITH_CHECKSUM) and stats.is_contiguous() and stats.dtype is torch.float64
    if not (0 <= row < rows and fits):
        raise IndexError(f"row {row} is not in a contiguous float64 statistics buffer [rows, slots, {COLUMNS}]")


def merge(stats: torch.Tensor) -> torch.Tensor:
    """Join partial rows: [..., slots, width] to [..., width], without synchronising.

    With n_i the finite count of slot i and N their sum: mean = sum(n_i/N mean_i), rms = sqrt(sum(n_i/N rms_i^2)).
    """
    slots = torch.arange(stats.shape[-2], device=stats.device)
    used = stats[..., :1, SLOTS]
    stats = torch.where((slots < used).unsqueeze(-1), stats, 0.0)
    finite = stats[..., COUNT] - stats[..., NAN] - stats[..., INF]  # [..., slots]
    total = finite.sum(-1, keepdim=True)
    none = total.squeeze(-1) == 0
    share = finite / total
    out = stats.sum(-2)  # right for the counts
    out[..., MIN] = torch.where(finite > 0, stats[..., MIN], math.inf).amin(-1)
    out[..., MAX] = torch.where(finite > 0, stats[..., MAX], -math.inf).amax(-1)
    out[..., MEAN] = torch.where(finite > 0, share * stats[..., MEAN], 0.0).sum(-1)
    rms = torch.where(finite > 0, stats[..., RMS], 0.0)
    scale = rms.amax(-1, keepdim=True)
    ratio = torch.where(scale > 0, rms / scale, rms)  # keeps the squares in range
    out[..., RMS] = scale.squeeze(-1) * (share * ratio * ratio).sum(-1).sqrt()
    out[..., :NAN] = torch.where(none.unsqueeze(-1), math.nan, out[..., :NAN])
    out[..., SLOTS] = used.squeeze(-1)
    if has_checksum(stats):
        out[..., CHECKSUM] = out[..., CHECKSUM].remainder(2.0**32)  # each slot's is below 2**32: their sum is exact
    return out

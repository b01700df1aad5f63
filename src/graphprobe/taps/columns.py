"""The layout of a statistics buffer: ``[rows, slots, COLUMNS]`` float64, and how partial rows become one.

A row belongs to one tap, a slot to one of the partial results that a parallel kernel writes for it. Partials hold
means, not sums, so that joining them cannot overflow; counts are exact up to 2**53.
"""

from __future__ import annotations

import math

import torch

#: NaN and infinities are left out of the first four. ``SLOTS`` (in slot 0): how many slots are in use; 0: never run.
MIN, MAX, MEAN, RMS, NAN, INF, ZEROS, COUNT, SLOTS = range(9)
COLUMNS = 9

#: Slots per row by device type: the most blocks that write partial results of one value.
_SLOTS = {"cuda": 264}


def new_stats(rows: int, device: torch.device) -> torch.Tensor:
    """Return an empty statistics buffer [rows, slots, COLUMNS] float64 for values on `device`."""
    with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
        return torch.zeros(rows, _SLOTS.get(device.type, 1), COLUMNS, dtype=torch.float64, device=device)


def merge(stats: torch.Tensor) -> torch.Tensor:
    """Join partial rows: [..., slots, COLUMNS] to [..., COLUMNS], without synchronising.

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
    return out

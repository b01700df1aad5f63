"""Rule 1: do the two regions compute the same function?

``S = rms(exact_after - exact_before) / F``, with ``F`` the region's own float64 noise: the largest change, over both
sides, when every floating result and constant is multiplied by ``1 + 2 u64 xi``, ``xi ~ U(-1, 1)``. Benign rewrites
measure 0 to some tens, real defects 1e9 and more; the bound lies between. Besides the whole tensor, the worst slice
along every dimension (row, channel, head, token) is asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from graphprobe import nodes
from graphprobe.lanes import measure
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import U64, Replay

BOUND = 1e4
_DRAWS = 2


@dataclass(frozen=True)
class Sameness:
    """The answer of rule 1 for one region."""

    same: bool | None  # None where it could not be evaluated
    spread: float  # S, the larger of whole tensor and worst slice
    where: str = ""  # "dim 1 index 17": the worst slice, where it decides
    wrong_class: int = 0
    reason: str = ""


def same_function(replay: Replay, region: Region) -> Sameness:
    """Evaluate both pieces exactly, then again under noise, and compare the difference with the noise."""
    moved = replay.mask(region.claim.before, region.claim.after)
    try:
        truth = replay.exact("before", region)
        other = replay.exact("after", region)
    except Exception as error:
        return Sameness(None, math.nan, reason=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    if not isinstance(truth, torch.Tensor) or not isinstance(other, torch.Tensor):
        return Sameness(truth == other, 0.0 if truth == other else math.inf)
    if truth.shape != other.shape:
        return Sameness(False, math.inf, where="shape")
    difference, kept, wrong = _difference(region, truth, other, moved)
    if wrong is not None and bool(wrong.any()):
        return Sameness(False, math.inf, wrong_class=int(wrong.sum()), where=_first(wrong))
    if not bool(difference.any()):
        return Sameness(True, 0.0)
    noises = [(2 * U64 / 3**0.5) * kept]  # rounding of the result itself
    for draw in range(_DRAWS):
        generator = torch.Generator(device=truth.device).manual_seed(draw)
        for side, plain in (("before", truth), ("after", other)):
            noisy = replay.exact(side, region, noise=generator)
            noises.append(_difference(region, plain, noisy, moved)[0])
    return _judge(difference, noises)


def _difference(
    region: Region, truth: torch.Tensor, other: torch.Tensor, moved: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    value = nodes.tensor_val(region.claim.before)
    bound = measure.sentinel_bound(value.dtype if value is not None else truth.dtype)
    x, y = measure.keep(moved, measure.real(truth).double(), measure.real(other).double())
    return measure.compared(x, y, bound)


def _judge(difference: torch.Tensor, noises: list[torch.Tensor]) -> Sameness:
    whole = rms(difference) / max(rms(n) for n in noises) if any(bool(n.any()) for n in noises) else math.inf
    spread, where = whole, ""
    for dim in range(difference.dim()):
        if difference.shape[dim] < 2:
            continue
        ratio = _slices(difference, dim) / torch.stack([_slices(n, dim) for n in noises]).amax(0)
        ratio = torch.nan_to_num(ratio, nan=0.0, posinf=math.inf)  # 0/0: no difference and no noise
        top = float(ratio.amax())
        if top > spread:
            spread, where = top, f"dim {dim} index {int(ratio.argmax())}"
    return Sameness(spread <= BOUND, spread, where if whole <= BOUND else "")


def rms(x: torch.Tensor) -> float:
    """Return the root mean square of a tensor."""
    return float(torch.linalg.vector_norm(x)) / math.sqrt(max(x.numel(), 1))


def _slices(x: torch.Tensor, dim: int) -> torch.Tensor:
    others = [d for d in range(x.dim()) if d != dim]
    return torch.linalg.vector_norm(x, dim=others) if others else x.abs()


def _first(mask: torch.Tensor) -> str:
    return f"element {tuple(int(i) for i in mask.nonzero()[0])}"

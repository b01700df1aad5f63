"""Rule 5, noise: does what is below a group of claims depend on its values, by as much as they differ, or at all?

Noise of random sign is put on the group's values in ``exact_before``. In a value of few elements all of it may happen
to point from one version's value to the other's, which is no noise where the two compensate; so it is put on with the
opposite sign, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.fx import Node

from graphprobe.judge.masked import hides
from graphprobe.lanes.references import MASKED
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

Tensor = torch.Tensor
_UNDERFLOW = 746.0  # exp(-746) is 0 in float64


def moves(replay: Replay, own: list[Region], below: list[Region], as_value: bool) -> bool:
    """Whether noise on the values of `own` moves any region below; as large as the values, or as their difference."""
    noised = _noised(replay, own, below, as_value)
    return noised is None or any(_moved(replay, below, values) for values in noised)


def carried(replay: Replay, own: list[Region], region: Region) -> float:
    """Return how far noise as large as the difference of `own` moves a region below: relative L2, inf if unknown."""
    noised = _noised(replay, own, [region], as_value=False)
    if noised is None:
        return math.inf
    plain = replay.exact("before", region)
    moved = [replay.exact("before", region, override=values) for values in noised]
    if any(m.shape != plain.shape for m in moved) or not plain.dtype.is_floating_point:
        return math.inf
    size = torch.linalg.vector_norm(torch.nan_to_num(plain))
    return max(float(torch.linalg.vector_norm(torch.nan_to_num(m - plain)) / size) for m in moved)


def _noised(replay: Replay, own: list[Region], below: list[Region], as_value: bool) -> list[dict[Node, Tensor]] | None:
    """Return the values of `own` with noise of either sign; None where no noise can be put on them."""
    replay.fetch_frontiers([*own, *below])
    plain: dict[Node, Tensor] = {}
    noise: dict[Node, Tensor] = {}
    for region in own:
        truth, other = replay.exact("before", region), replay.exact("after", region)
        if not truth.dtype.is_floating_point or truth.shape != other.shape:
            return None  # integers: the difference itself is taken as moving
        sign = torch.randint(0, 2, truth.shape, generator=torch.Generator().manual_seed(7)).to(truth) * 2 - 1
        size = _size(region, truth, other, as_value)
        if not bool((size > 0).any()):
            continue  # withdrawn with the rest, but it agrees: it takes the noise of what feeds it
        # an infinite mask moves from there as the largest number would, else nothing could be put on it
        plain[region.claim.before], noise[region.claim.before] = torch.nan_to_num(truth), sign * size
    return [{n: plain[n] + way * noise[n] for n in plain} for way in (1, -1)]


def _moved(replay: Replay, below: Iterable[Region], replaced: dict[Node, Tensor]) -> bool:
    for region in below:
        plain, noisy = replay.exact("before", region), replay.exact("before", region, override=replaced)
        if plain.shape != noisy.shape or _differs(plain, noisy):
            return True
    return False


def _size(region: Region, truth: Tensor, other: Tensor, as_value: bool) -> Tensor:
    """Return how much noise every element takes."""
    difference = torch.nan_to_num((other - truth).abs())
    if not as_value:
        return difference
    size = _as_value(truth, other)
    if hides(region.claim.before) and hides(region.claim.after):
        # what both versions hide before a softmax stays hidden, whatever number they write for it
        size = torch.where(_hidden(truth) & _hidden(other), difference, size)
    return size


def _hidden(scores: Tensor) -> Tensor:
    """Return what a softmax makes nothing of: a mask's number, or so far below its row's largest that exp gives 0."""
    hidden = scores <= MASKED
    return hidden | (scores <= scores.amax(-1, keepdim=True) - _UNDERFLOW) if scores.dim() else hidden


def _as_value(truth: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return noise as large as the value where the sides differ: what agrees is no one's concern."""
    size = torch.nan_to_num(truth.abs(), posinf=0.0)
    typical = torch.linalg.vector_norm(size) / max(truth.numel(), 1) ** 0.5
    same = torch.isclose(other, truth, rtol=1e-12, atol=0.0, equal_nan=True)
    return torch.where(same, 0.0, torch.maximum(size, typical))


def _differs(plain: torch.Tensor, noisy: torch.Tensor) -> bool:
    if not plain.dtype.is_floating_point:
        return not torch.equal(plain, noisy)
    change = torch.nan_to_num(noisy - plain)
    return bool(torch.linalg.vector_norm(change) > 1e-11 * torch.linalg.vector_norm(torch.nan_to_num(plain)))

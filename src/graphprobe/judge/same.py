"""Rule 1: do the two regions compute the same function?

``S = rms(exact_after - exact_before) / F``, with ``F`` the region's own float64 noise: the largest change, over both
sides, when every floating result and constant is multiplied by ``1 + 2 u64 xi``, ``xi ~ U(-1, 1)``. Benign rewrites
measure 0 to some tens, real defects 1e9 and more; the bound lies between. Besides the whole tensor, the worst slice
along every dimension (row, channel, head, token) is asked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphprobe.execute import Values
from graphprobe.lanes import elements, exact
from graphprobe.lanes.noise import U64, Noise
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

BOUND = 1e4
RULE = "1 same function"
_DRAWS = 2
_CLEAR = 1e3  # so far above the bound no other draw can decide otherwise: draws differ by a small factor
_HOPELESS = 1e8  # above the bound, in units of the rounding of the result itself


@dataclass(frozen=True)
class Sameness:
    """The answer of rule 1 for one region."""

    same: bool | None  # None where it could not be evaluated
    spread: float  # S, the larger of whole tensor and worst slice
    where: str = ""  # "dim 1 index 17": the worst slice, where it decides
    wrong_class: int = 0
    reason: str = ""
    rule: str = RULE  # the rule that decided
    kind: str = ""  # a verdict that follows at once: "quantization", "rounding", "nonfinite"
    note: str = ""
    better: str | None = None
    left_out: int = 0  # elements of fully masked rows
    exact: float | None = None  # relative difference left after a substitution


@dataclass(frozen=True, eq=False)
class Variant:
    """How the exact lanes are evaluated: nodes that take other values, and nodes that do not round to codes."""

    override: Mapping[Node, torch.Tensor] = dataclasses.field(default_factory=dict)
    relaxed: Collection[Node] = ()

    def exact(self, replay: Replay, side: str, region: Region) -> tuple[Any, Values]:
        """Evaluate one piece; return its result and the decisions taken on the way."""
        values = replay.exact_values(side, region, override=self.override, relaxed=self.relaxed)
        taken = [n for n in getattr(region, side) if n in values and n not in self.relaxed and exact.decides(n)]
        return replay.result(side, region, values, self.override), {n: values[n] for n in taken}

    def noisy(self, replay: Replay, side: str, region: Region, decisions: Values, draw: int) -> torch.Tensor:
        """Evaluate one piece under float64 noise, with the decisions held: a flip on a tie is no rounding noise."""
        return replay.exact(side, region, Noise(draw), override={**decisions, **self.override}, relaxed=self.relaxed)


PLAIN = Variant()


@dataclass(frozen=True, eq=False)
class Compared:
    """Both exact values of a region and their difference, don't-care elements and equal classes set to zero."""

    truth: torch.Tensor
    other: torch.Tensor
    difference: torch.Tensor
    kept: torch.Tensor
    wrong: torch.Tensor
    decisions: tuple[Values, Values]  # of before, of after

    @property
    def relative(self) -> float:
        """Return ||after - before|| / ||before||."""
        top, bottom = rms(self.difference), rms(self.kept)
        return top / bottom if bottom > 0 else (0.0 if top == 0 else math.inf)


def ask(
    replay: Replay, region: Region, variant: Variant = PLAIN, hasty: bool = False, most: float = math.inf
) -> Sameness:
    """Evaluate both pieces exactly, then again under noise, and compare the difference with the noise.

    `hasty` takes a difference that only a condition of 1e8 and more could make harmless for one, without asking. A
    relative difference of more than `most` is a no, without asking for noise either.
    """
    try:
        found = compare(replay, region, variant)
        if not isinstance(found, Compared):
            return found
        if bool(found.wrong.any()):
            return Sameness(False, math.inf, wrong_class=int(found.wrong.sum()), where=_first(found.wrong))
        if found.relative > most:
            return Sameness(False, math.inf, exact=found.relative)
        return judge_difference(replay, region, found, variant, hasty)
    except Exception as error:
        return Sameness(None, math.nan, reason=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


def judge_difference(
    replay: Replay, region: Region, found: Compared, variant: Variant = PLAIN, hasty: bool = False
) -> Sameness:
    """Set the difference against the region's float64 noise; elements of different class are not looked at."""
    if not bool(found.difference.any()):
        return Sameness(True, 0.0, exact=0.0)
    noises = [(2 * U64 / math.sqrt(3)) * found.kept]  # rounding of the result itself
    spread, where = worst_ratio(found.difference, noises)
    for draw in range(0 if hasty and spread > _HOPELESS * BOUND else _DRAWS):
        for side, plain, taken in zip(("before", "after"), (found.truth, found.other), found.decisions, strict=True):
            if spread <= BOUND:
                break  # more noise only makes it smaller
            noisy = variant.noisy(replay, side, region, taken, draw)
            noises.append(difference(replay, region, plain, noisy)[0])
            spread, where = worst_ratio(found.difference, noises)
        if not BOUND < spread <= _CLEAR * BOUND:
            break
    return Sameness(spread <= BOUND, spread, where, exact=found.relative)


def compare(replay: Replay, region: Region, variant: Variant = PLAIN) -> Compared | Sameness:
    """Evaluate both pieces exactly; a Sameness where they hold no tensors of equal shape."""
    truth, decided = variant.exact(replay, "before", region)
    other, decided_after = variant.exact(replay, "after", region)
    if not isinstance(truth, torch.Tensor) or not isinstance(other, torch.Tensor):
        return Sameness(truth == other, 0.0 if truth == other else math.inf)
    if truth.shape != other.shape:
        return Sameness(False, math.inf, where="shape")
    return Compared(truth, other, *difference(replay, region, truth, other), (decided, decided_after))


def difference(
    replay: Replay, region: Region, truth: torch.Tensor, other: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (other - truth, truth, where the class differs); don't-care elements and equal classes are zero."""
    moved = replay.mask(region.claim.before, region.claim.after)
    bounds = elements.sentinel_bounds(region.claim.before, region.claim.after)
    x, y = elements.keep(moved, elements.real(truth).double(), elements.real(other).double())
    change, kept, wrong = elements.compared(x, y, bounds)
    return change, kept, torch.zeros_like(x, dtype=torch.bool) if wrong is None else wrong


def whole_ratio(change: torch.Tensor, noises: list[torch.Tensor]) -> float:
    """Return rms(change) / rms(noise) over the whole tensor; infinite without noise."""
    noise = max((rms(n) for n in noises), default=0.0)
    return rms(change) / noise if noise > 0 else math.inf


def worst_ratio(change: torch.Tensor, noises: list[torch.Tensor]) -> tuple[float, str]:
    """Return the largest rms(change) / rms(noise) over the tensor and all slices, and the slice that has it."""
    whole = whole_ratio(change, noises)
    spread, where = whole, ""
    for dim in range(change.dim()):
        if change.shape[dim] < 2:
            continue
        ratio = slices(change, dim) / torch.stack([slices(n, dim) for n in noises]).amax(0)
        ratio = torch.nan_to_num(ratio, nan=0.0, posinf=math.inf)  # 0/0: no difference and no noise
        top = float(ratio.amax())
        if top > spread:
            spread, where = top, f"dim {dim} index {int(ratio.argmax())}"
    return spread, where if whole <= BOUND else ""


def rms(x: torch.Tensor) -> float:
    """Return the root mean square of a tensor."""
    return float(torch.linalg.vector_norm(x)) / math.sqrt(max(x.numel(), 1))


def slices(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the L2 norm of every slice along one dimension."""
    others = [d for d in range(x.dim()) if d != dim]
    return torch.linalg.vector_norm(x, dim=others) if others else x.abs()


def _first(mask: torch.Tensor) -> str:
    return f"element {tuple(int(i) for i in mask.nonzero()[0])}"

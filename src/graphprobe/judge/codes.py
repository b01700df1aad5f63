"""Rule 4, the numbers: is a tensor what another one becomes when it is rounded to codes?

``W'`` must lie within half a step of ``W`` for 99 % of the elements of every row or group (plus the rounding of the
scale and of the division by it), the rest clipped; and its rms error must be at most 4 times that of round-to-nearest
at the same bits and group size, else a scale that is 16 times too coarse would obey its own half step.

Weights that were chosen to keep ``W x`` rather than ``W`` (GPTQ, Frantar et al. 2022) exceed half a step. They pass
where ``rms((W' - W) x) <= 1.5 rms((RTN - W) x)``, with at most 3 times the rms error of round-to-nearest and without a
bias.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from graphprobe.judge.packing import flip, nearest_level

Tensor = torch.Tensor
HALF = 0.5 * (1 + 1e-6)
INSIDE = 0.99
COARSEST = 4.0
_CHOSEN, _CHOSEN_OUTPUT, _BIAS = 3.0, 1.5, 0.25


@dataclass(frozen=True)
class Fit:
    """How well a tensor obeys the bound of rule 4."""

    holds: bool
    why: str = ""  # what it violates
    inside: float = 1.0  # share of elements within half a step
    ratio: float = 0.0  # worst rms error of a group over that of round-to-nearest
    nearest: bool = True  # False where the codes were chosen otherwise


@dataclass(frozen=True)
class Grid:
    """The codes' own geometry: their step at every element, their bits, how many columns share a scale.

    Where few codes stand for values at uneven distances (e2m1, NF4), `levels` holds these, ascending and at most 1 in
    magnitude, and `step` what they are multiplied with. `top` is what the largest 8-bit float stands for.
    """

    step: Tensor  # [rows, columns] float64, > 0
    bits: int  # 8 also for 8-bit floats
    float8: torch.dtype | None = None
    rounding: float = 0.0  # unit roundoff of the scale and of the division by it
    levels: Tensor | None = None
    top: Tensor | None = None

    @property
    def group(self) -> int:
        """Return how many neighbouring columns have one step (all of them for fp8, whose step follows the value)."""
        columns = self.step.shape[1]
        if self.float8 is not None:
            return columns
        same = torch.isclose(self.step[:, 1:], self.step[:, :-1], rtol=1e-9, atol=0.0).all(0)
        changes = (~same).nonzero().flatten() + 1
        size = columns
        for change in changes.tolist():
            size = math.gcd(size, change)
        return size

    def half(self, wanted: Tensor, held: Tensor) -> Tensor:
        """Return half the distance of `held` from the next code towards `wanted`."""
        # with scales that are powers of two the largest code stands for its whole binade, up to where the next begins
        beyond = 2.0 if self.is_binary else 0.5
        if self.levels is None:
            half = self.step * HALF
            if self.top is None:
                return half
            return torch.where((held.abs() >= self.top * (1 - 1e-9)), half * 2 * beyond, half)
        gaps = self.levels.diff()
        gaps = torch.cat([gaps[:1] * beyond * 2, gaps, gaps[-1:] * beyond * 2])  # gaps[i] lies below level i
        code = nearest_level(held / self.step, self.levels)
        return torch.where(wanted > held, gaps[code + 1], gaps[code]) * self.step * HALF

    @property
    def is_binary(self) -> bool:
        """Whether all scales are powers of two (times one factor), as microscaling formats have them."""
        scale = self.step if self.top is None else self.top
        if self.levels is None and self.top is None:
            return False
        ratio = torch.log2(scale / scale.reshape(-1)[0])
        return bool(((ratio - ratio.round()).abs() < 1e-9).all()) and bool((ratio != 0).any())

    @property
    def turned(self) -> Grid:
        """Return the geometry with rows and columns exchanged."""
        return dataclasses.replace(self, step=self.step.t(), top=None if self.top is None else self.top.t())

    def gathered(self) -> Tensor | None:
        """Return an order of the columns in which those with one scale are neighbours; None where they are already."""
        if self.float8 is not None or self.group > 1:
            return None
        signature = torch.round(torch.log2(self.step) * 2**20)
        _, belongs = torch.unique(signature, dim=1, return_inverse=True)
        return torch.argsort(belongs, stable=True)

    def ordered(self, columns: Tensor) -> Grid:
        """Return the geometry with its columns in another order."""
        return dataclasses.replace(self, step=self.step[:, columns])


def fit(wanted: Tensor, held: Tensor, grid: Grid, x: Tensor | None = None) -> Fit:
    """Ask the bound of rule 4 of [rows, columns] float64 tensors; `x` [tokens, columns] is what the weight meets."""
    size = grid.group
    if size == 1 and grid.turned.group > 1:  # one scale per column
        wanted, held, grid, x = wanted.t(), held.t(), grid.turned, None
        size = grid.group
    columns = grid.gathered()
    if columns is not None:  # groups of columns that are not neighbours
        wanted, held, grid = wanted[:, columns], held[:, columns], grid.ordered(columns)
        x, size = None if x is None else x[:, columns], grid.group
    error = held - wanted
    outside = error.abs() > grid.half(wanted, held) + held.abs() * 3 * grid.rounding
    if grid.top is not None:
        outermost = held.abs() >= grid.top * (1 - 1e-6)
    else:
        outermost = (_groups(held.abs(), size) >= _top(held, size) * (1 - 1e-6)).reshape(held.shape)
    clipped = outside & (wanted.abs() > held.abs()) & outermost
    inside = 1.0 - float(outside.double().mean())
    nearest_rms = _nearest(wanted, grid, size)
    rms = _groups(error, size).square().mean(-1).sqrt()
    ratios = torch.nan_to_num(rms / nearest_rms, nan=0.0, posinf=math.inf)
    ratio = float(ratios.amax())
    ends = clipped | (outermost & (wanted.abs() > held.abs()) & (error.abs() > grid.step * HALF))  # they say no scale
    shown, erring = torch.where(ends, 0.0, held), torch.where(ends, 0.0, error)
    off = _off_scale(shown, erring, grid) or _off_column(shown, erring, grid)
    bad_rows = outside.sum(1) > max(1.0, (1 - INSIDE) * wanted.shape[1])
    if (
        off is None
        and not bool(bad_rows.any())
        and not bool((outside & ~clipped).sum(1).gt(1).any())
        and ratio <= COARSEST
    ):
        return Fit(True, "", inside, ratio)
    if off is None and grid.float8 is None and grid.levels is None and _chosen(error, wanted, grid, ratios, x):
        return Fit(True, "", inside, ratio, nearest=False)
    if off is not None:
        return Fit(False, off, inside, ratio)
    if ratio > COARSEST:
        row = int(ratios.amax(1).argmax())
        return Fit(False, f"row {row} is {ratio:.1f} times coarser than round-to-nearest", inside, ratio)
    row = int(outside.sum(1).argmax())
    share = 100 * float(outside[row].double().mean())
    return Fit(False, f"{share:.0f} % of row {row} lies farther than half a step from the weight", inside, ratio)


def _off_scale(held: Tensor, error: Tensor, grid: Grid) -> str | None:
    """Say which row is systematically too large or too small: more than rounding the scale and the codes explains."""
    slope, rest, excess = _slopes(held, error, grid)
    row = int(excess.argmax())
    if float(excess[row]) > 0:
        return f"row {row} is {100 * abs(float(slope[row])):.1f} % too {_sign(float(slope[row]))}"
    # what no row shows alone they may show together: rounded scales err in both directions
    size = held.square().sum().clamp(min=1e-300)
    scales = max(int(torch.unique(grid.step[:, 0]).numel()), 1)
    whole = float((error * held).sum() / size)
    bound = 1.05 * grid.rounding * min(1.0, 2.0 / math.sqrt(scales))
    bound += 5 * float((rest * held.square()).sum().sqrt() / size) + 2 * float(rest.sum() / size)
    return f"the rows together are {100 * abs(whole):.1f} % too {_sign(whole)}" if abs(whole) > bound else None


def _off_column(held: Tensor, error: Tensor, grid: Grid) -> str | None:
    """Say which column is: the gain of a channel that was moved into the weight, and not as it should."""
    slope, _, excess = _slopes(held.t(), error.t(), grid.turned)
    column = int(excess.argmax())
    if float(excess[column]) <= 0:
        return None
    return f"column {column} is {100 * abs(float(slope[column])):.1f} % too {_sign(float(slope[column]))}"


def _slopes(held: Tensor, error: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Return of every row the slope of its error over its value, [rows]; the squared error around that slope, [rows,
    columns]; and by how much the slope exceeds what rounding explains, [rows]."""
    size = held.square().sum(1).clamp(min=1e-300)
    slope = (error * held).sum(1) / size
    rest = (error - slope.unsqueeze(1) * held).square()
    # of the slope: what is large errs more where codes are floats. A row of few elements fits its own errors, so these
    # are not believed to be smaller than rounding to nearest makes them: evenly spread over a step
    rest = torch.maximum(rest, grid.half(held - error, held).square() / 3)
    noise = (rest * held.square()).sum(1).sqrt() / size
    # where numbers grow rarer outwards, those of one code lie nearer to zero than the code: Delta^2 / 12 sigma^2
    lean = 2 * rest.sum(1) / size
    return slope, rest, slope.abs() - 1.05 * grid.rounding - 5 * noise - lean


def _sign(slope: float) -> str:
    return "large" if slope > 0 else "small"


def _groups(x: Tensor, size: int) -> Tensor:
    return x.reshape(x.shape[0], -1, size)


def _top(x: Tensor, size: int) -> Tensor:
    return _groups(x.abs(), size).amax(-1, keepdim=True)


def _nearest(wanted: Tensor, grid: Grid, size: int) -> Tensor:
    """Return the rms error of round-to-nearest, [rows, groups]."""
    top = _top(wanted, size)
    if grid.float8 is None and grid.levels is None:
        step: Tensor = top.squeeze(-1) / max(2 ** (grid.bits - 1) - 1, 1)
        return step / math.sqrt(12)
    nearest = (_groups(_rounded(wanted, grid, size) - wanted, size)).square().mean(-1).sqrt()
    if grid.float8 is None:
        return nearest
    # its own scale holds a row's largest element exactly, by which a short row errs less than floats do: |w| eps / 4
    # on either side at least, evenly spread
    size_of = _groups(wanted, size).square().mean(-1).sqrt()
    return torch.maximum(nearest, size_of * (torch.finfo(grid.float8).eps / 4 / math.sqrt(3)))


def _rounded(wanted: Tensor, grid: Grid, size: int) -> Tensor:
    """Return what round-to-nearest makes of a tensor, with a symmetric scale per group."""
    groups, top = _groups(wanted, size), _top(wanted, size).clamp(min=1e-300)
    if grid.float8 is not None:
        scale = top / torch.finfo(grid.float8).max
        return ((groups / scale).to(grid.float8).double() * scale).reshape(wanted.shape)
    if grid.levels is not None:
        return (grid.levels[nearest_level(groups / top, grid.levels)] * top).reshape(wanted.shape)
    scale = top / max(2 ** (grid.bits - 1) - 1, 1)
    rounded: Tensor = torch.round(groups / scale) * scale
    return rounded.reshape(wanted.shape)


def _chosen(error: Tensor, wanted: Tensor, grid: Grid, ratios: Tensor, x: Tensor | None) -> bool:
    """Whether the codes look chosen for what they do to `x`: no group far off, no bias, a small change of output."""
    if x is None or x.shape[-1] != wanted.shape[1] or bool((ratios > _CHOSEN).any()):
        return False
    bias = error.mean(1).abs()
    scatter = error.square().mean(1).sqrt() / math.sqrt(error.shape[1])
    if bool((bias > _BIAS * grid.step.mean(1) + 4 * scatter).any()):
        return False
    rounded = _rounded(wanted, grid, grid.group) - wanted
    mine, theirs = (torch.linalg.vector_norm(x @ e.t(), dim=0) for e in (error, rounded))  # of every row
    if bool(torch.linalg.vector_norm(mine) > _CHOSEN_OUTPUT * torch.linalg.vector_norm(theirs)):
        return False
    return bool((mine <= _CHOSEN * torch.maximum(theirs, theirs.median())).all())


def code_fit(value: Tensor, codes: Tensor, bounds: tuple[float, float] | None) -> Fit:
    """Ask the bound of codes that were made on the fly: `value` is what was rounded, in units of the step."""
    difference = codes - value
    outside = difference.abs() > HALF
    inside = 1.0 - float(outside.double().mean())
    if bounds is not None:
        ends = ((codes <= bounds[0]) & (value < codes)) | ((codes >= bounds[1]) & (value > codes))
        if bool((outside & ~ends).double().mean() > 1 - INSIDE):
            return Fit(False, f"{100 * (1 - inside):.0f} % of the values are not rounded to the nearest code", inside)
        low, high = float(value.amin()), float(value.amax())
        levels = (bounds[1] if high > 0.5 else 0.0) - (bounds[0] if low < -0.5 else 0.0)
        ratio = levels / max(high - low, 1e-300) if high > low else 0.0
        if ratio > COARSEST:
            return Fit(False, f"the codes use only {high - low:.0f} of {levels:.0f} levels", inside, ratio)
    else:
        ratio = 0.0
    if inside < INSIDE and not (bounds is not None and _pays(difference, ratio)):
        return Fit(False, f"{100 * (1 - inside):.1f} % of the values are clipped or not rounded to the nearest", inside)
    return Fit(True, "", inside, ratio)


def _pays(difference: Tensor, ratio: float) -> bool:
    """Whether clipping the ends costs no more than a step that reaches them would (calibrators choose the better)."""
    widest = 1.0 / ratio if ratio > 0 else 1.0  # of round-to-nearest over the whole range, in steps
    return float(difference.square().mean().sqrt()) <= COARSEST * widest / math.sqrt(12)


def float8_fit(value: Tensor, codes: Tensor, dtype: torch.dtype) -> Fit:
    """Ask the bound of 8-bit floating codes that were made on the fly."""
    flat, held = value.reshape(1, -1), codes.double().reshape(1, -1)
    neighbour = flip(held.to(dtype), 1).double()
    step = torch.nan_to_num((neighbour - held).abs(), nan=float(torch.finfo(dtype).max) / 14)
    return fit(flat, held, Grid(step.clamp(min=torch.finfo(dtype).smallest_normal / 8), 8, dtype, 1e-12))

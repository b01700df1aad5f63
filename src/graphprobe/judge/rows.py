"""One row of measurements becomes relative numbers, and the first look says which regions deserve a second one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from graphprobe import nodes
from graphprobe.lanes import details
from graphprobe.lanes.measure import Column
from graphprobe.lanes.regions import Region
from graphprobe.records import Comparison

#: The exact lanes agree at a first look where they differ by no more than this; float64 rounds at 1.1e-16, and long
#: sums reach 1e-13. Everything above gets a second look, which measures the region's own float64 noise.
AGREE = 1e-12


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured in one region. Relative L2 errors; None where a lane did not run."""

    region: Region
    introduced: float | None
    total: float | None
    exact: float | None
    floor: float | None  # ||before - exact|| / ||exact||
    forced_floor: float | None  # ||forced - exact|| / ||exact||
    exact_slice: float
    exact_class: int  # elements of different class in the exact lanes
    free_class: int
    forced_class: int
    before_nonfinite: int
    forced_nonfinite: int
    identical: bool  # free is before, as far as it counts
    bitwise: bool  # free is before in every element
    reproduced: bool  # forced is bitwise before
    max_abs: float
    left_out: int
    isomorphic: bool = False
    details: Comparison | None = None  # free against before
    silent: bool = False  # before's value holds nothing but zeros, or no number that counts

    @property
    def suspect(self) -> bool:
        """Whether the exact lanes differ enough for a second look."""
        return self.exact_class > 0 or max(self.exact or 0.0, self.exact_slice) > AGREE

    @property
    def precision_ratio(self) -> float:
        """R of rule 2 with its first two denominators; 0 where exact arithmetic was not run."""
        if self.floor is None or self.forced_floor is None:
            return 0.0
        return _ratio(self.forced_floor, max(self.floor, unit_roundoff(self.region)))


def unit_roundoff(region: Region) -> float:
    """Return u of the dtype in which `after` holds the claimed value; 0 for integers."""
    value = nodes.tensor_val(region.claim.after)
    if value is None or not value.dtype.is_floating_point:
        return 0.0
    return torch.finfo(value.dtype).eps / 2


def _ratio(x: float, y: float) -> float:
    return x / y if y > 0 else (0.0 if x == 0 else math.inf)


def read(
    region: Region, row: torch.Tensor, detail: torch.Tensor | None = None, *, isomorphic: bool = False
) -> Measured:
    """Turn one row of the buffer, and one of the details where there are any, into a `Measured`."""
    c = row.tolist()

    def relative(top: Column, bottom: Column) -> float:
        ratio = _ratio(c[top], c[bottom])
        return math.sqrt(ratio) if ratio == ratio else math.inf  # squares beyond float64 are no reason to trust

    ran, exact_ran = c[Column.NATIVE_DONE] > 0, c[Column.EXACT_DONE] > 0
    return Measured(
        region,
        introduced=relative(Column.FORCED, Column.BEFORE) if ran else None,
        total=relative(Column.FREE, Column.BEFORE) if ran else None,
        exact=relative(Column.EXACT, Column.EXACT_BEFORE) if exact_ran else (0.0 if isomorphic else None),
        floor=relative(Column.BEFORE_ERROR, Column.EXACT_BEFORE) if exact_ran else None,
        forced_floor=relative(Column.FORCED_ERROR, Column.EXACT_BEFORE) if exact_ran else None,
        exact_slice=c[Column.EXACT_SLICE] if c[Column.EXACT_SLICE] == c[Column.EXACT_SLICE] else math.inf,
        exact_class=int(c[Column.EXACT_CLASS]),
        free_class=int(c[Column.FREE_CLASS]),
        forced_class=int(c[Column.FORCED_CLASS]),
        before_nonfinite=int(c[Column.BEFORE_NONFINITE]),
        forced_nonfinite=int(c[Column.FORCED_NONFINITE]),
        identical=ran and _nothing(c, Column.FREE_EQUAL, Column.FREE, Column.FREE_CLASS),
        bitwise=ran and c[Column.FREE_EQUAL] > 0,
        reproduced=ran and _nothing(c, Column.FORCED_EQUAL, Column.FORCED, Column.FORCED_CLASS),
        max_abs=c[Column.FREE_MAX],
        left_out=int(c[Column.LEFT_OUT]),
        isomorphic=isomorphic,
        details=None if detail is None else details.read(detail),
        silent=ran and c[Column.BEFORE] == 0,
    )


def _nothing(c: list[float], equal: Column, squares: Column, wrong: Column) -> bool:
    return c[equal] > 0 or (c[squares] == 0 and c[wrong] == 0)

"""All that two values of one shape can be told apart by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Two values of one shape, element by element.

    Elements compare as a class where both are the same infinity, NaN, or mask values of one sign: they are no mismatch
    and stay out of every other number, as do those whose classes differ, and those that nobody cares for.
    """

    elements: int
    left_out: int  # of these, don't-care ones
    mismatched: int  # of another value, or of another class; NaN equals NaN, and 0 is -0
    classes: int  # of another class: NaN, infinite or a mask value on one side only, or with another sign
    nonfinite_before: int
    nonfinite_after: int
    max_abs: float  # largest |after - before|
    relative: float  # ||after - before|| / ||before||; NaN where the squares leave float64's range
    dot: float  # sum of before x after
    cosine: float  # dot / ||before|| / ||after||; NaN where either is zero
    max_ulp: float  # largest distance in numbers of the coarser dtype, a part of a step where the other is finer
    worst_slice: float  # largest relative L2 error of one slice along any dimension
    worst_dim: int  # which dimension, -1 where there is but one element or nothing differs
    worst_index: int  # which slice of it

"""What the kernels share: where an element lies, which elements compare as a class, where partial results go.

Partial results lie in ``[RING, GROUPS, COLUMNS, SLOTS]`` float64. A group is what one comparison finds: free, forced,
exact. Its first column is a header: [0] how many slots are in use (0: nothing to read), [1] how many elements there
were. Of the other columns every program writes its own slot.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from graphprobe.lanes.measure import JOINED

#: Rows that are joined at once; programs of one launch at most, a power of two.
RING, SLOTS = JOINED, 1024
GROUPS, COLUMNS = 3, 8
GROUP = COLUMNS * SLOTS

_SLOTS = tl.constexpr(SLOTS)


@triton.jit
def offset(at, n1, n2, n3, n4, s0, s1, s2, s3, s4):
    """Return where the element `at` of a walk through five dimensions lies."""
    place = (at % n4) * s4
    rest = at // n4
    place += (rest % n3) * s3
    rest = rest // n3
    place += (rest % n2) * s2
    rest = rest // n2
    return place + (rest % n1) * s1 + (rest // n1) * s0


@triton.jit
def classes(x, y, BOUND: tl.constexpr, OTHER: tl.constexpr):
    """Return (difference with 0 where a class compares, x with 0 there, whether the classes differ).

    BOUND and OTHER are the magnitudes from which on x and y are mask values.
    """
    inf = float("inf")
    size_x, size_y = tl.abs(x), tl.abs(y)
    finite = (size_x < inf) & (size_y < inf)
    masked = (size_x >= BOUND) & (size_y >= OTHER) & ((x > 0) == (y > 0))
    same = masked | (x == y) | ((x != x) & (y != y))
    counts = finite & (masked == 0)
    return tl.where(counts, y - x, 0.0), tl.where(counts, x, 0.0), (finite | same) == 0


@triton.jit
def head(cells, count, programs):
    """Write the header of a group that so many programs write to; it is the same whichever of them does it."""
    if tl.program_id(0) == 0:
        tl.store(cells, programs.to(tl.float64))
        tl.store(cells + 1, count.to(tl.float64))


@triton.jit
def write(cells, column, value):
    """Write one number of this program."""
    tl.store(cells + column * _SLOTS + tl.program_id(0), value)


@triton.jit
def total(cells, column, used):
    """Return the sum of a column over the slots in use."""
    slot = tl.arange(0, _SLOTS)
    return tl.sum(tl.load(cells + column * _SLOTS + slot, mask=slot < used, other=0.0), axis=0)


@triton.jit
def highest(cells, column, used):
    """Return the largest number of a column over the slots in use; none is below 0."""
    slot = tl.arange(0, _SLOTS)
    return tl.max(tl.load(cells + column * _SLOTS + slot, mask=slot < used, other=0.0), axis=0)

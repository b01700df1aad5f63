"""Several small comparisons in one launch: what is launch-bound one by one takes a fraction of the time together."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from graphprobe.lanes.fused.native import share

#: Values of each lane that `compare_several` takes in one launch.
SEVERAL = 16
_NAMES = [f"{kind}{index}" for kind in "bfrcp" for index in range(SEVERAL)]


@triton.jit
def _pick(k, choices, MANY: tl.constexpr):
    found = choices[0]
    for index in tl.static_range(1, MANY):
        found = tl.where(k == index, choices[index], found)
    return found


@triton.jit
def _at(address, KIND: tl.constexpr):
    return tl.multiple_of(address, 16).to(tl.pointer_type(KIND))


@triton.jit(do_not_specialize=_NAMES)
def compare_several(
    partials, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15,
    f0, f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, f11, f12, f13, f14, f15,
    r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11, r12, r13, r14, r15,
    c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15,
    p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15,
    B: tl.constexpr, F: tl.constexpr, R: tl.constexpr, BOUND: tl.constexpr, OTHER: tl.constexpr,
    HAS_F: tl.constexpr, HAS_R: tl.constexpr, SAME_F: tl.constexpr, SAME_R: tl.constexpr, FAST: tl.constexpr,
    WIDE: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr, MANY: tl.constexpr,
    B8: tl.constexpr, F8: tl.constexpr, R8: tl.constexpr,
):  # fmt: skip
    """Compare dense values of dtypes B, F and R: b, f, r are addresses (multiples of 16), c counts, p places."""
    k = tl.program_id(1)
    b = _at(_pick(k, (b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15), MANY), B)
    f = _at(_pick(k, (f0, f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, f11, f12, f13, f14, f15), MANY), F)
    r = _at(_pick(k, (r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, r10, r11, r12, r13, r14, r15), MANY), R)
    count = _pick(k, (c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15), MANY)
    place = _pick(k, (p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15), MANY)
    programs = tl.minimum(tl.cdiv(count, ROWS * ACROSS), PROGRAMS)
    none = (0, 0, 0, 0, 1)
    if tl.program_id(0) < programs:
        share(
            b, f, r, b, partials + place, count, tl.program_id(0), programs, (1, 1, 1, 1), none, none, none, none,
            BOUND, OTHER, HAS_F, HAS_R, False, SAME_F, SAME_R, FAST, WIDE, True, False, ROWS, ACROSS, 1,
            B8, F8, R8,
        )  # fmt: skip

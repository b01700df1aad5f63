"""The free and the forced lane against before: `measure.native` in one pass.

Squares are summed in float32 over the few elements that a thread reads at once, then in float64. What is not finite,
beyond the sentinel bound, or so small that its square vanishes in float32 shows in these sums; a program that sees it
goes over its share again, element by element and in float64.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from graphprobe.lanes.fused import common
from graphprobe.lanes.fused.common import classes, head, offset, write
from graphprobe.lanes.fused.float8 import decoded

_GROUP = tl.constexpr(common.GROUP)
#: Squares of float32 numbers below this may vanish.
_FAINT = tl.constexpr(2.0**-40)


@triton.jit
def _load(
    b, f, r, m, tile, count, sizes, bs, fs, rs, ms, HAS_F: tl.constexpr, HAS_R: tl.constexpr, HAS_M: tl.constexpr,
    DENSE: tl.constexpr, LONG: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr,
    B8: tl.constexpr, F8: tl.constexpr, R8: tl.constexpr,
):  # fmt: skip
    """Return one step [ROWS, ACROSS] of each tensor; elements beyond the end are zero in all of them."""
    lane = tl.arange(0, ROWS)[:, None] * ACROSS + tl.arange(0, ACROSS)[None, :]
    kind: tl.constexpr = tl.int64 if LONG else tl.int32
    base = tl.full([], tile, kind) * (ROWS * ACROSS)
    at = base + lane
    if DENSE:
        pb, pf, pr, pm = b + base + lane, f + base + lane, r + base + lane, m + base + lane
    else:
        n1, n2, n3, n4 = sizes
        pb = b + offset(at, n1, n2, n3, n4, bs[0], bs[1], bs[2], bs[3], bs[4])
        pf = f + offset(at, n1, n2, n3, n4, fs[0], fs[1], fs[2], fs[3], fs[4])
        pr = r + offset(at, n1, n2, n3, n4, rs[0], rs[1], rs[2], rs[3], rs[4])
        pm = m + offset(at, n1, n2, n3, n4, ms[0], ms[1], ms[2], ms[3], ms[4])
    if MASKED:
        x = tl.load(pb, mask=at < count, other=0)
        y = tl.load(pf, mask=at < count, other=0) if HAS_F else x
        z = tl.load(pr, mask=at < count, other=0) if HAS_R else x
        w = tl.load(pm, mask=at < count, other=0) if HAS_M else x
    else:
        x = tl.load(pb)
        y = tl.load(pf) if HAS_F else x
        z = tl.load(pr) if HAS_R else x
        w = tl.load(pm) if HAS_M else x
    y, z = decoded(y, F8 if HAS_F else B8), decoded(z, R8 if HAS_R else B8)
    return decoded(x, B8), y, z, w


@triton.jit
def _fast(state, x, y, z, HAS_F: tl.constexpr, HAS_R: tl.constexpr):
    """Add one step of numbers in float32."""
    kept, top, free, free_top, forced, forced_top = state
    x = x.to(tl.float32)
    kept += tl.sum(x * x, axis=1).to(tl.float64)
    top = tl.maximum(top, tl.max(tl.abs(x), axis=1))
    if HAS_F:
        d = y.to(tl.float32) - x
        free += tl.sum(d * d, axis=1).to(tl.float64)
        free_top = tl.maximum(free_top, tl.max(tl.abs(d), axis=1))
    if HAS_R:
        d = z.to(tl.float32) - x
        forced += tl.sum(d * d, axis=1).to(tl.float64)
        forced_top = tl.maximum(forced_top, tl.max(tl.abs(d), axis=1))
    return kept, top, free, free_top, forced, forced_top


@triton.jit
def _join_two(s0, t0, s1, t1, r0, u0, r1, u1):
    return s0 + r0, tl.maximum(t0, u0), s1 + r1, tl.maximum(t1, u1)


@triton.jit
def _join_three(s0, t0, s1, t1, s2, t2, r0, u0, r1, u1, r2, u2):
    return s0 + r0, tl.maximum(t0, u0), s1 + r1, tl.maximum(t1, u1), s2 + r2, tl.maximum(t2, u2)


@triton.jit
def _faint(top):
    return (top > 0) & (top < _FAINT)


@triton.jit
def _careful(state, x, y, w, BOUND: tl.constexpr, OTHER: tl.constexpr, HAS_M: tl.constexpr, WIDE: tl.constexpr):
    """Add one step of one pair of tensors."""
    kept, squares, top, wrong, unequal, nonfinite = state
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    x, y = x.to(kind), y.to(kind)
    same = (x == y) | ((x != x) & (y != y))
    unequal = tl.maximum(unequal, tl.max((same == 0).to(tl.int32), axis=1))
    if HAS_M:
        x, y = tl.where(w != 0, 0.0, x), tl.where(w != 0, 0.0, y)
    d, k, differs = classes(x, y, BOUND, OTHER)
    top = tl.maximum(top, tl.max(tl.abs(d), axis=1).to(tl.float64))
    d, k = d.to(tl.float64), k.to(tl.float64)
    squares += tl.sum(d * d, axis=1)
    kept += tl.sum(k * k, axis=1)
    wrong += tl.sum(differs.to(tl.int32), axis=1)
    nonfinite += tl.sum(((tl.abs(y) < float("inf")) == 0).to(tl.int32), axis=1)
    return kept, squares, top, wrong, unequal, nonfinite


@triton.jit
def _write_free(cells, count, programs, moved, kept, squares, wrong, top, unequal):
    head(cells, count, programs)
    write(cells, 1, moved)
    write(cells, 2, kept)
    write(cells, 3, squares)
    write(cells, 4, wrong)
    write(cells, 5, top)
    write(cells, 6, unequal)


@triton.jit
def _write_forced(cells, count, programs, moved, kept, squares, wrong, unequal, before_nonfinite, nonfinite):
    head(cells, count, programs)
    write(cells, 1, moved)
    write(cells, 2, kept)
    write(cells, 3, squares)
    write(cells, 4, wrong)
    write(cells, 5, unequal)
    write(cells, 6, before_nonfinite)
    write(cells, 7, nonfinite)


@triton.jit
def _whole(count):
    return tl.sum(count, axis=0).to(tl.float64)


@triton.jit
def share(
    b, f, r, m, cells, count, pid, programs, sizes, bs, fs, rs, ms,
    BOUND: tl.constexpr, OTHER: tl.constexpr, HAS_F: tl.constexpr, HAS_R: tl.constexpr,
    HAS_M: tl.constexpr, SAME_F: tl.constexpr, SAME_R: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr,
    DENSE: tl.constexpr, LONG: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr, STAGES: tl.constexpr,
    B8: tl.constexpr, F8: tl.constexpr, R8: tl.constexpr,
):  # fmt: skip
    """Measure the share of program `pid` of `programs`, and write its slot of the groups free and forced."""
    tiles, full = tl.cdiv(count, ROWS * ACROSS), count // (ROWS * ACROSS)
    again = True
    if FAST:
        real, narrow = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float32)
        state = (real, narrow, real, narrow, real, narrow)
        # from the end, which was written last and may still be in the cache
        for tile in tl.range(pid, full, programs, num_stages=STAGES):
            x, y, z, w = _load(
                b, f, r, m, full - 1 - tile, count, sizes, bs, fs, rs, ms, HAS_F, HAS_R, False, DENSE, LONG, False,
                ROWS, ACROSS, B8, F8, R8,
            )  # fmt: skip
            state = _fast(state, x, y, z, HAS_F, HAS_R)
        for tile in range(tl.where(full % programs == pid, full, tiles), tiles, 1):  # the last one, not full
            x, y, z, w = _load(
                b, f, r, m, tile, count, sizes, bs, fs, rs, ms, HAS_F, HAS_R, False, DENSE, LONG, True, ROWS, ACROSS,
                B8, F8, R8,
            )  # fmt: skip
            state = _fast(state, x, y, z, HAS_F, HAS_R)
        # in one go: every reduction makes the warps wait for each other
        if HAS_F and HAS_R:
            kept, top, free, free_top, forced, forced_top = tl.reduce(state, 0, _join_three)
        elif HAS_F:
            kept, top, free, free_top = tl.reduce((state[0], state[1], state[2], state[3]), 0, _join_two)
            forced, forced_top = 0.0, 0.0
        else:
            kept, top, forced, forced_top = tl.reduce((state[0], state[1], state[4], state[5]), 0, _join_two)
            free, free_top = 0.0, 0.0
        plain = (kept + free + forced < float("inf")) & (top < BOUND)
        again = (plain == 0) | _faint(top)
        if HAS_F:
            again = again | _faint(free_top)
        if HAS_R:
            again = again | _faint(forced_top)
        if again == 0:
            if HAS_F:
                unequal = (free_top > 0).to(tl.float64) if SAME_F else 1.0
                _write_free(cells, count, programs, 0.0, kept, free, 0.0, free_top.to(tl.float64), unequal)
            if HAS_R:
                unequal = (forced_top > 0).to(tl.float64) if SAME_R else 1.0
                _write_forced(cells + _GROUP, count, programs, 0.0, kept, forced, 0.0, unequal, 0.0, 0.0)
    if again:
        real, whole = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.int32)
        first = (real, real, real, whole, whole, whole)
        second = first
        nonfinite, moved = whole, whole
        for number in range(pid, tiles, programs):
            tile = tl.where(number < full, full - 1 - number, number)  # the same ones as above
            x, y, z, w = _load(
                b, f, r, m, tile, count, sizes, bs, fs, rs, ms, HAS_F, HAS_R, HAS_M, DENSE, LONG, True, ROWS, ACROSS,
                B8, F8, R8,
            )  # fmt: skip
            if HAS_F:
                first = _careful(first, x, y, w, BOUND, OTHER, HAS_M, WIDE)
            if HAS_R:
                second = _careful(second, x, z, w, BOUND, OTHER, HAS_M, WIDE)
            bad = (tl.abs(x.to(tl.float64)) < float("inf")) == 0
            if HAS_M:
                bad = bad & (w == 0)
                moved += tl.sum((w != 0).to(tl.int32), axis=1)
            nonfinite += tl.sum(bad.to(tl.int32), axis=1)
        out = _whole(moved)
        if HAS_F:
            unequal = tl.max(first[4], axis=0).to(tl.float64) if SAME_F else 1.0
            _write_free(
                cells, count, programs, out, tl.sum(first[0], axis=0), tl.sum(first[1], axis=0), _whole(first[3]),
                tl.max(first[2], axis=0), unequal,
            )  # fmt: skip
        if HAS_R:
            unequal = tl.max(second[4], axis=0).to(tl.float64) if SAME_R else 1.0
            _write_forced(
                cells + _GROUP, count, programs, out, tl.sum(second[0], axis=0), tl.sum(second[1], axis=0),
                _whole(second[3]), unequal, _whole(nonfinite), _whole(second[5]),
            )  # fmt: skip


@triton.jit(do_not_specialize=["place", "count"])
def compare_native(
    b, f, r, m, partials, place, count,
    n1, n2, n3, n4, b0, b1, b2, b3, b4, f0, f1, f2, f3, f4, r0, r1, r2, r3, r4, m0, m1, m2, m3, m4,
    BOUND: tl.constexpr, OTHER: tl.constexpr, HAS_F: tl.constexpr, HAS_R: tl.constexpr,
    HAS_M: tl.constexpr, SAME_F: tl.constexpr, SAME_R: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr,
    DENSE: tl.constexpr, LONG: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr, STAGES: tl.constexpr,
    B8: tl.constexpr, F8: tl.constexpr, R8: tl.constexpr,
):  # fmt: skip
    """Compare f and r with b; every program writes one slot."""
    share(
        b, f, r, m, partials + place, count, tl.program_id(0), tl.num_programs(0), (n1, n2, n3, n4),
        (b0, b1, b2, b3, b4), (f0, f1, f2, f3, f4), (r0, r1, r2, r3, r4), (m0, m1, m2, m3, m4),
        BOUND, OTHER, HAS_F, HAS_R, HAS_M, SAME_F, SAME_R, FAST, WIDE, DENSE, LONG, ROWS, ACROSS, STAGES,
        B8, F8, R8,
    )  # fmt: skip

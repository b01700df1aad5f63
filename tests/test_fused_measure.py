"""The fused comparisons against the plain ones: every dtype, layout and kind of number, on the GPU and interpreted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch

import interpreting
from graphprobe.lanes import elements, measure, norms
from graphprobe.lanes.measure import Column

Tensor = torch.Tensor
Case = dict[str, Tensor | None]  # before, free, forced, exact_before, exact_after, moved

LAYOUTS = {
    "scalar": lambda x: x[0, 0, 0],
    "one dimension": lambda x: x.reshape(-1)[:1555],
    "one row": lambda x: x[:1, :1],
    "contiguous": lambda x: x,
    "permuted": lambda x: x.permute(2, 0, 1),
    "sliced": lambda x: x[1:, ::2, 3:],
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "no elements": lambda x: x[:0],
    "narrow": lambda x: x[:, :, :3],
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(
    dtype: torch.dtype,
    other: torch.dtype | None = None,
    size: float = 1e-2,
    shape: tuple[int, int, int] = (5, 18, 20),
) -> Case:
    """Draw five values: free and forced are a little off before, exact_after is 1e-10 off exact_before."""
    truth = noise(*shape)
    before = truth.to(dtype)
    return {
        "before": before,
        "free": (before.double() * (1 + size * noise(*shape, seed=1))).to(other or dtype),
        "forced": (before.double() * (1 + size / 3 * noise(*shape, seed=2))).to(other or dtype),
        "exact_before": truth,
        "exact_after": truth * (1 + 1e-10 * noise(*shape, seed=3)),
        "moved": None,
    }


def cases() -> Iterator[tuple[str, Case]]:
    """The corpus."""
    for (name, view), dtype in zip(LAYOUTS.items(), itertools.cycle(DTYPES), strict=False):
        found = case(dtype)
        yield f"{name} {dtype}", {key: None if value is None else view(value) for key, value in found.items()}
    yield "two dtypes", case(torch.bfloat16, torch.float32)
    yield "two dtypes, one of 64 bits", case(torch.float16, torch.float64)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        eight = getattr(torch, name)
        yield name, case(eight, size=0.3)
        yield f"{name} beside wider ones", case(eight, torch.bfloat16)
        every = torch.arange(256, dtype=torch.uint8).view(eight).view(4, 8, 8)
        some = {"before": every, "free": every.flip(1), "forced": every.bfloat16(), "exact_before": every.double()}
        yield f"every {name}", {**some, "exact_after": every.double().flip(2), "moved": None}
    yield "bitwise equal", {**(equal := case(torch.bfloat16)), "free": equal["before"], "forced": equal["before"]}
    mixed = case(torch.float32)
    mixed["free"], mixed["exact_after"] = mixed["free"].permute(2, 1, 0).contiguous().permute(2, 1, 0), noise(5, 20, 18)
    mixed["exact_after"] = mixed["exact_after"].transpose(1, 2)
    yield "layouts that differ", mixed
    for scale in (1e-25, 1e-42, 1e18, 1e30, 1e36):
        scaled = case(torch.float32)
        yield f"float32 times {scale}", {k: None if v is None else (v * scale).to(v.dtype) for k, v in scaled.items()}
    yield "a difference too small for float32 squares", {**case(torch.float32, size=1e-30), "free": _nudged()}
    yield from special_cases()
    yield from whole_cases()
    many = case(torch.bfloat16, shape=(7, 20, 50))  # several programs, of which one must look again
    for value in many.values():
        if value is not None:
            value[0, 0, 3] = math.nan
    many["forced"][0, 1, 1] = math.inf
    yield "odd ones in the share of one program", many


def _nudged() -> Tensor:
    moved = noise(5, 18, 20).float()
    moved[2, 3, 4] += 1e-25
    moved[0] = 0
    moved[0, 0, 0] = 1e-30
    return moved


def special_cases() -> Iterator[tuple[str, Case]]:
    """NaN, infinities and mask values at equal and at different places; don't-care elements."""
    for dtype in DTYPES:
        found = case(dtype)
        low = torch.finfo(dtype).min
        for key, value in found.items():
            if value is not None:
                value[0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, low])
                value[1] = low if key.startswith("exact") else value[1].fill_(low)[0, 0]
        yield f"one class {dtype}", found
        other = {k: None if v is None else v.clone() for k, v in found.items()}
        other["free"][3, 3, :3] = math.nan
        other["forced"][4, 4, 5] = math.inf
        other["forced"][0, 0, 0] = 1.0
        other["exact_after"][4, :2, 7] = -math.inf
        other["exact_before"][4, 10, 7] = math.nan
        other["exact_after"][1, 0, 0] = -low
        yield f"other classes {dtype}", other
        yield f"other classes, some don't care {dtype}", {**other, "moved": noise(5, 18, 20, seed=9) > 0.5}
    yield "don't care in another layout", {**case(torch.bfloat16), "moved": (noise(20, 18, 5) > 0).permute(2, 1, 0)}


def whole_cases() -> Iterator[tuple[str, Case]]:
    """Integers and bool are their own exact values."""
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool):
        value = (noise(5, 18, 20) * 30).abs().to(dtype)
        near = value.clone()
        near[3, 3, 3] = not near[3, 3, 3] if dtype is torch.bool else 7
        yield str(dtype), {
            "before": value, "free": near, "forced": value, "exact_before": value, "exact_after": near, "moved": None,
        }  # fmt: skip


def expected(found: Case) -> dict[Column, float]:
    """Compute every column by its definition, in float64."""
    before, moved = found["before"], found["moved"]
    nothing = torch.zeros(before.shape, dtype=torch.bool, device=before.device) if moved is None else moved

    def pair(left: Tensor, right: Tensor, lane: str = "forced") -> tuple[Tensor, Tensor, float]:
        bounds = elements.sentinel_bounds(before.dtype, found["before" if lane == "before" else "forced"].dtype)
        work = torch.float64 if found["before"] is not left else elements.work_dtype(left, right)
        x, y = left.to(work).masked_fill(nothing, 0), right.to(work).masked_fill(nothing, 0)
        masked = (x.abs() >= bounds[0]) & (y.abs() >= bounds[1]) & (x.sign() == y.sign())
        counts = x.isfinite() & y.isfinite() & ~masked
        same = counts | masked | (x == y) | (x.isnan() & y.isnan())
        zero = torch.zeros((), dtype=work, device=x.device)
        difference = torch.where(counts, y - x, zero).double()
        return difference, torch.where(counts, x, zero).double(), float((~same).sum())

    def total(x: Tensor) -> float:
        return float(x.square().sum())

    out = {Column.COUNT: float(before.numel()), Column.LEFT_OUT: float(nothing.sum())}
    for lane, squares, wrong, equal in (
        ("free", Column.FREE, Column.FREE_CLASS, Column.FREE_EQUAL),
        ("forced", Column.FORCED, Column.FORCED_CLASS, Column.FORCED_EQUAL),
    ):
        difference, kept, count = pair(before, found[lane], lane)
        mine, theirs = before.double(), found[lane].double()
        bits = (mine == theirs) | (mine.isnan() & theirs.isnan())
        out[squares], out[wrong], out[Column.BEFORE] = total(difference), count, total(kept)
        out[equal] = float(bits.all() and before.dtype == found[lane].dtype)
        if lane == "free":
            out[Column.FREE_MAX] = float(difference.abs().amax()) if before.numel() else 0.0
    for lane, column in (("before", Column.BEFORE_NONFINITE), ("forced", Column.FORCED_NONFINITE)):
        out[column] = float((~found[lane].double().isfinite() & ~nothing).sum())
    difference, kept, count = pair(found["exact_before"], found["exact_after"])
    out |= {Column.EXACT: total(difference), Column.EXACT_BEFORE: total(kept), Column.EXACT_CLASS: count}
    out[Column.EXACT_MAX] = float(difference.abs().amax()) if before.numel() else 0.0
    out[Column.EXACT_SLICE] = float(norms.worst_slice(difference.square(), kept.square())) if before.numel() else 0.0
    out[Column.BEFORE_ERROR] = total(pair(found["exact_before"], found["before"], "before")[0])
    out[Column.FORCED_ERROR] = total(pair(found["exact_before"], found["forced"])[0])
    return out | {Column.NATIVE_DONE: 1.0, Column.EXACT_DONE: 1.0}


def measured(found: Case, row: int, split: bool = False) -> list[float]:
    """Measure with the kernels, in the given row of a buffer whose other rows must stay as they are."""
    from graphprobe.lanes.fused import launching

    before, moved = found["before"], found["moved"]
    slots = torch.full((row + 2, measure.WIDTH), 7.0, dtype=torch.float64, device=before.device)
    slots[row] = 0
    partials = launching.new_partials(before.device)
    bounds = elements.sentinel_bounds(before.dtype, found["forced"].dtype)
    lanes = [(found["free"], None), (None, found["forced"])] if split else [(found["free"], found["forced"])]
    for free, forced in lanes:
        assert launching.compare_native(partials, row, before, free, forced, moved, bounds)
    exact = (before, found["forced"], found["exact_before"], found["exact_after"], moved, bounds)
    assert launching.compare_exact(partials, row, *exact)
    launching.join(slots, partials, row, 1)
    launching.join(slots, partials, row, 1)  # what was read is not read again
    assert (slots[row + 1] == 7).all() and (slots[:row] == 7).all()
    return slots[row].tolist()


def check(name: str, found: Case) -> None:
    """Compare one case; sums of native lanes may come from float32 squares, the worst slice may be too large."""
    wanted = expected(found)
    split = len(name) % 2 == 0
    got = measured(found, measure.JOINED + 3 if split else 1, split)
    for column, value in wanted.items():
        if not math.isfinite(value):
            assert not math.isfinite(got[column]), (name, column, got[column])
        elif column is Column.EXACT_SLICE:
            assert value * (1 - 1e-9) <= got[column], (name, got[column], value)
            whole = math.sqrt(wanted[Column.EXACT] / wanted[Column.EXACT_BEFORE]) if wanted[Column.EXACT] else 0.0
            assert got[column] <= max(1e4 * value, 1.01 * whole), (name, got[column], value)
        else:
            precise = column not in (Column.BEFORE, Column.FREE, Column.FORCED)
            assert got[column] == pytest.approx(value, rel=1e-12 if precise else 1e-6, abs=0), (name, column)


def several() -> list[tuple[str, Case]]:
    """Small values of several dtypes, most of which can be read together."""
    names = (
        "contiguous", "permuted", "sliced", "two dtypes", "bitwise equal", "one class", "other classes", "odd ones",
        "float32 times", "float8", "torch.bool", "torch.int64", "no elements", "scalar",
    )  # fmt: skip
    found = [(name, one) for name, one in cases() if name.startswith(names) and one["moved"] is None]
    found += [
        (f"again {n}", case(torch.bfloat16, shape=(3, 7, 8 + n))) for n in range(20)
    ]  # more than one launch takes
    return found


def check_several(there: Callable[[Tensor], Tensor] = lambda value: value) -> None:
    """Compare what one call measures of all these values with their definitions, with and without a forced lane."""
    from graphprobe.lanes.fused import launching

    drawn = several()
    for start, forced in itertools.product(range(0, len(drawn), 32), (True, False)):
        found = [(n, {k: None if v is None else there(v) for k, v in c.items()}) for n, c in drawn[start : start + 32]]
        before, free, other = ([c[lane] for _, c in found] for lane in ("before", "free", "forced"))
        slots = torch.zeros(len(found), measure.WIDTH, dtype=torch.float64, device=before[0].device)
        partials = launching.new_partials(slots.device)
        bounds = [elements.sentinel_bounds(c["before"].dtype, c["forced"].dtype) for _, c in found]
        given = other if forced else [None] * len(found)
        alone = launching.compare_several(partials, range(len(found)), before, free, given, bounds)
        assert len(alone) < len(found) / 2
        launching.join(slots, partials, 0, len(found))
        for row, (name, one) in enumerate(found):
            if row in alone:
                assert not slots[row].any(), name
                continue
            for column, value in expected(one).items():
                if column.name.startswith("EXACT") or column in _ERRORS or (not forced and "FORCED" in column.name):
                    continue
                if not forced and column.name.startswith("BEFORE"):  # told by the forced lane
                    continue
                got = float(slots[row, column])
                assert got == pytest.approx(value, rel=1e-6, abs=0, nan_ok=True), (name, column)


_ERRORS = (Column.BEFORE_ERROR, Column.FORCED_ERROR)

_INTERPRETED = """
import test_fused_measure as shared
for name, found in shared.cases():
    shared.check(name, found)
shared.check_several()
"""


def test_the_kernels_measure_the_same_when_interpreted() -> None:
    interpreting.check(_INTERPRETED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [name for name, _ in cases()])
def test_the_gpu_measures_the_same(name: str) -> None:
    found = dict(cases())[name]
    for _ in range(2):  # the second time the launches are known
        check(name, {key: None if value is None else _there(value) for key, value in found.items()})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_measures_several_at_once_the_same() -> None:
    for _ in range(2):
        check_several(_there)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gpu_lifts_every_bit(dtype: torch.dtype) -> None:
    from graphprobe.lanes import exact

    for name, view in LAYOUTS.items():
        value = _there(view(noise(5, 18, 20).to(dtype)))
        for _ in range(2):
            found = exact.lift(value)
            assert found.dtype == torch.float64 and torch.equal(found, value.double()), name
            assert found.stride() == value.double().stride(), name


def _there(value: Tensor) -> Tensor:
    """Move to the GPU and keep the strides."""
    there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    return there.copy_(value) if 0 not in value.stride() else value[:, :1].cuda().expand(value.shape)


def test_the_plain_path_measures_the_same() -> None:
    for name, found in cases():
        slots = torch.zeros(1, measure.WIDTH, dtype=torch.float64)
        none = slots.new_empty(0)
        before, moved = found["before"], found["moved"]
        bounds = elements.sentinel_bounds(before.dtype, found["forced"].dtype)
        measure.native(slots, none, 0, before, found["free"], found["forced"], moved, bounds)
        measure.exact(
            slots, none, 0, before, found["forced"], found["exact_before"], found["exact_after"], moved, bounds
        )
        got, wanted = slots[0].tolist(), expected(found)
        for top, bottom in RATIOS:
            assert _ratio(got, top, bottom) == pytest.approx(_ratio(wanted, top, bottom), rel=1e-6, nan_ok=True), name
        for column in (Column.FREE_CLASS, Column.FORCED_CLASS, Column.EXACT_CLASS, Column.EXACT_SLICE):
            assert got[column] == pytest.approx(wanted[column], rel=1e-9, nan_ok=True), (name, column)


RATIOS = ((Column.FREE, Column.BEFORE), (Column.FORCED, Column.BEFORE), (Column.EXACT, Column.EXACT_BEFORE))


def _ratio(row: list[float] | dict[Column, float], top: Column, bottom: Column) -> float:
    return row[top] / row[bottom] if row[top] else 0.0

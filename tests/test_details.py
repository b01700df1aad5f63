"""Every detail of a comparison: by its properties, and on the GPU or interpreted by its definition."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import graphprobe
import interpreting
import test_fused_measure as shared
from graphprobe.cli import main
from graphprobe.lanes import details, elements, measure
from graphprobe.lanes.details import Detail
from graphprobe.records import Comparison

Tensor = torch.Tensor

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EIGHTS = [dtype for name, dtype in sorted(vars(torch).items()) if name.startswith("float8_")]
INF, NAN = math.inf, math.nan


def told(x: Tensor, y: Tensor, moved: Tensor | None = None) -> Comparison:
    bounds = elements.sentinel_bounds(x.dtype, y.dtype)
    found = details.read(details.measured(x, y, moved, bounds))
    assert found is not None
    return found


def values(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a small type, many of a large one: subnormal, normal, of both signs, and zero."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(dtype.itemsize)
    if bits is None:
        found = torch.arange(256, dtype=torch.uint8).view(dtype)
        return found[found.float().isfinite()]
    places = torch.cat([torch.arange(2000), torch.logspace(3, 8 * dtype.itemsize - 2, 4000, base=2).to(torch.int64)])
    found = places.to(bits).view(dtype)
    found = found[found.isfinite()]
    return torch.cat([found, -found])


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_next_number_is_one_ulp_away(dtype: torch.dtype) -> None:
    x = values(dtype)
    for towards in (INF, -INF):
        y = torch.nextafter(x, torch.full_like(x, towards))
        kept = y.isfinite()
        found = details.ulps(x[kept].double(), y[kept].double(), details.grid_of(dtype))
        assert (found == 1).all()
    assert torch.equal(details.ulps(x.double(), -x.double(), details.grid_of(dtype)) == 0, x == 0)


@pytest.mark.parametrize("dtype", EIGHTS)
def test_neighbours_of_eight_bits_are_one_ulp_apart(dtype: torch.dtype) -> None:
    x = values(dtype).double().unique()
    found = details.ulps(x[:-1], x[1:], details.grid_of(dtype))
    assert (found == 1).all(), found


@pytest.mark.parametrize("dtype", FLOATS)
def test_steps_add_up_across_zero_and_into_the_subnormal(dtype: torch.dtype) -> None:
    """Distances along a line are additive, and as many as the numbers stepped over."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    normal = int(torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype).view(bits))
    for low, high in ((0, 7), (3, 5), (normal - 3, normal + 4), (normal // 2, 2 * normal)):
        x, y = (torch.tensor([n], dtype=bits).view(dtype) for n in (low, high))
        assert told(x, y).max_ulp == high - low
        assert told(-x, y).max_ulp == told(y, -x).max_ulp == float(high + low)


def test_a_finer_value_lies_between_the_numbers_of_the_coarser() -> None:
    coarse = torch.tensor([1.0, -3.0, 0.0])
    for other in (torch.float32, torch.float64):
        fine = torch.tensor([1 + 2.0**-9, -3 - 2.0**-8, 2.0**-135], dtype=other)
        for x, y in ((coarse.bfloat16(), fine), (fine, coarse.bfloat16())):
            assert told(x, y).max_ulp == 0.25
            assert told(x[:1], y[:1]).max_ulp == 0.25
    assert told(torch.tensor([1.0]).half(), torch.tensor([1 + 2.0**-7]).bfloat16()).max_ulp == 1
    assert told(torch.tensor([7]), torch.tensor([12])).max_ulp == 5
    assert told(torch.tensor([2]), torch.tensor([2.5]).bfloat16()).max_ulp == 32  # steps of 2 ** -6


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("factor", [1.0, 0.25, 4.0, -2.0, -1.0])
def test_what_is_scaled_points_the_same_way(dtype: torch.dtype, factor: float) -> None:
    x = shared.noise(7, 33).to(dtype)
    found = told(x, x * factor)
    assert found.cosine == pytest.approx(math.copysign(1, factor), abs=1e-15)
    assert found.dot == pytest.approx(factor * float(x.double().square().sum()), rel=1e-14)
    assert found.relative == pytest.approx(abs(factor - 1), rel=1e-14)
    assert found.worst_slice == pytest.approx(abs(factor - 1), rel=1e-5)


def test_what_is_orthogonal_has_no_cosine_and_nothing_has_none() -> None:
    x, y = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 5.0, 0.0])
    assert told(x, y).cosine == told(x, y).dot == 0
    assert math.isnan(told(x, torch.zeros(3)).cosine) and told(torch.zeros(3), x).relative == INF
    assert told(torch.zeros(0, 4), torch.zeros(0, 4)).elements == 0
    tiny = torch.tensor([1e-300, -1e-300], dtype=torch.float64)
    assert math.isnan(told(tiny, tiny * 2).relative) and told(tiny, tiny).relative == 0  # its squares vanish
    assert math.isnan(told(tiny * 1e300 * 1e200, tiny).relative)


def test_what_is_not_finite_is_counted_and_stays_out() -> None:
    x = torch.tensor([1.0, NAN, INF, -INF, INF, 2.0, NAN, 0.0])
    y = torch.tensor([1.5, NAN, INF, INF, 3.0, NAN, 1.0, -0.0])
    found = told(x, y)
    assert (found.nonfinite_before, found.nonfinite_after) == (5, 4)
    assert (found.mismatched, found.classes) == (5, 4)
    assert (found.max_abs, found.relative, found.dot) == (0.5, 0.5, 1.5)
    assert found.max_ulp == 2**22
    low = torch.finfo(torch.bfloat16).min
    masks = told(torch.tensor([low, 1.0]).bfloat16(), torch.tensor([torch.finfo(torch.float32).min, 1.0]))
    assert (masks.mismatched, masks.max_abs, masks.max_ulp) == (0, 0, 0)


def test_what_nobody_cares_for_is_left_out() -> None:
    x, moved = torch.arange(6.0).view(2, 3), torch.tensor([[False, True, False], [True, False, False]])
    y = torch.where(moved, NAN, x + 1)
    found = told(x, y, moved)
    assert (found.left_out, found.mismatched, found.nonfinite_after, found.max_abs) == (2, 4, 0, 1)


@pytest.mark.parametrize("dim", range(3))
def test_the_worst_slice_is_named(dim: int) -> None:
    x = shared.noise(5, 6, 7)
    for index in (0, 4):
        y = x.clone()
        y.select(dim, index).mul_(1.01)
        found = told(x.float(), y.float())
        assert (found.worst_dim, found.worst_index) == (dim, index)
        assert found.worst_slice == pytest.approx(0.01, rel=1e-4)
        assert found.relative < found.worst_slice
    assert told(x, x).worst_dim == -1


def test_large_whole_numbers_differ_that_float64_holds_equal() -> None:
    x = torch.tensor([2**60, 5])
    assert told(x, x + torch.tensor([1, 0])).mismatched == 1


# --- where it is asked for ---------------------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.factor = torch.nn.Linear(16, 16), factor

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        return torch.softmax(torch.cat([hidden[..., :8], hidden[..., 8:] * self.factor], -1), -1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_report_tells_the_details_of_both_versions(dtype: torch.dtype, device: str) -> None:
    models, x = [Scaled(factor).to(dtype) for factor in (1.0, 1.25)], shared.noise(2, 70, 16).to(dtype)
    report = graphprobe.diff(*models, (x,), details=True, device=device)
    assert all(row.details is not None for row in report.regions)
    assert report.first is not None and report.first.details is not None
    found = report.first.details
    assert found.elements == x.numel() / 2 and found.relative == pytest.approx(report.first.total, rel=1e-6)
    assert found.relative == pytest.approx(0.25, rel=0.01) and found.cosine == pytest.approx(1, abs=1e-4)
    wanted = told(*(model(x).detach() for model in models))
    got = report.outputs[0].details
    assert got is not None and got.max_abs == report.outputs[0].max_abs
    if device == "cpu":
        assert got == wanted
    assert (got.worst_dim, got.mismatched > 0) == (wanted.worst_dim, True)
    assert graphprobe.Report.from_json(report.to_json()).regions == report.regions
    assert " ulp; 1 - cosine " in str(report)
    plain = graphprobe.diff(*models, (x,), device=device)
    assert plain.first is not None and plain.first.details is None
    assert [f.kind for f in plain.findings] == [f.kind for f in report.findings]


def test_the_command_line_tells_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = shared.noise(2, 16).float()
    files = [str(tmp_path / f"{factor}.fx") for factor in (1.0, 1.25)]
    for path in files:
        graphprobe.save(graphprobe.capture(Scaled(float(Path(path).stem)), (x,)), path, args=(x,))
    assert main(["diff", *files, "--details", "--json"]) == 1
    saved = json.loads(capsys.readouterr().out)
    assert "--details" in saved["command"]
    assert saved["outputs"][0]["details"]["max_ulp"] > 0 and 0 < saved["findings"][0]["details"]["cosine"] <= 1
    assert main(["diff", *files, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["outputs"][0]["details"] is None


# --- the kernels --------------------------------------------------------------------------------------------------


def pairs() -> list[tuple[str, Tensor, Tensor, Tensor | None]]:
    """The corpus of the other comparisons, and types of 8 bits beside it."""
    found = [(name, one["before"], one["free"], one["moved"]) for name, one in shared.cases()]
    found += [(f"{name}, exact", one["exact_before"], one["exact_after"], one["moved"]) for name, one in shared.cases()]
    noise = [shared.noise(3, 11, 50, seed=seed) for seed in range(2)]
    for dtype, other in itertools.product(EIGHTS, [*EIGHTS, torch.bfloat16, torch.float64]):
        found.append((f"{dtype} and {other}", noise[0].to(dtype), noise[1].to(other), None))
    every = values(torch.float8_e4m3fn)
    found.append(("every number of 8 bits", every, every.roll(1), None))
    found.append(("many blocks", shared.noise(3, 2500).bfloat16(), shared.noise(3, 2500, seed=1), None))
    other = shared.noise(4, 3, 2, 3, 2).permute(4, 1, 2, 3, 0)
    found.append(("five dimensions", shared.noise(2, 3, 2, 3, 4), other, None))
    return found


def check(name: str, x: Tensor, y: Tensor, moved: Tensor | None, row: int, twice: bool) -> None:
    """Compare what the kernels say with the definition; the slice they name must be as bad as the worst one."""
    rows = torch.full((row + 2, details.WIDTH), 7.0, dtype=torch.float64, device=x.device)
    from graphprobe.lanes.fused import detailing

    bounds = elements.sentinel_bounds(x.dtype, y.dtype)
    partials = detailing.new_partials(x.device)
    if not x.numel():
        assert not detailing.compare(partials, row, x, y, moved, bounds)
        return
    assert detailing.compare(partials, row, x, y, moved, bounds), name
    detailing.join(rows, partials, row, 1)
    detailing.join(rows, partials, row, 1)  # what was read is not read again
    assert (rows[row + 1] == 7).all() and (rows[:row] == 7).all()
    wanted, got = details.measured(x, y, moved, bounds).tolist(), rows[row].tolist()
    for column in Detail:
        if column < Detail.SLICE_DIM:
            assert got[column] == pytest.approx(wanted[column], rel=1e-9, abs=1e-300), (name, column)
    exactly = (Detail.MAX_ABS, Detail.MAX_ULP, Detail.SLICE_DIM, Detail.SLICE_INDEX)
    ties = ("expanded", "equal", "bool", "int8", "uint8")
    for column in exactly[: 2 if any(word in name for word in ties) else 4]:
        assert got[column] == wanted[column], (name, column, got, wanted)
    if twice:
        again = torch.zeros_like(rows)
        detailing.compare(partials, row, x, y, moved, bounds)
        detailing.join(again, partials, row, 1)
        assert torch.equal(again[row], rows[row]), name


def check_all(there: Callable[[Tensor], Tensor] = lambda value: value, step: int = 1) -> None:
    for number, (name, x, y, moved) in enumerate(pairs()[::step]):
        row = 1 + number % 3 * measure.JOINED
        check(name, there(x), there(y), None if moved is None else there(moved), row, step == 1)


_INTERPRETED = """
import test_details
test_details.check_all(step=9)
"""


def test_the_kernels_tell_the_same_when_interpreted() -> None:
    interpreting.check(_INTERPRETED)


@pytest.mark.gpu
def test_the_gpu_tells_the_same() -> None:
    for _ in range(2):  # the second time the launches are known
        check_all(shared._there)

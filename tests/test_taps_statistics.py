"""The statistics of one value: every dtype, range and layout, on every implementation, against exact sums."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphprobe
import interpreting
from graphprobe.taps import checksum, columns, cpu_stats, layout, operators, torch_stats

Writer = Callable[[torch.Tensor, torch.Tensor, int], None]


def _noise(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 1), dtype=torch.float64)
    return (drawn * scale).to(dtype)


def values() -> dict[str, torch.Tensor]:
    """The corpus: what a graph may hold, kind or nasty."""
    found = {
        "scalar": torch.tensor(-2.5),
        "no elements": torch.zeros(0, 4),
        "zeros": torch.zeros(300),
        "both zeros": torch.tensor([0.0, -0.0, 3.0]),
        "float32": _noise(100, 333),
        "more than a chunk": _noise(3, 1 << 16, dtype=torch.bfloat16),
        "bfloat16": _noise(40_001, dtype=torch.bfloat16),
        "float16 near its limit": _noise(3000, scale=1e4).half(),
        "squares beyond float32": _noise(5000, scale=1e30),
        "squares beyond bfloat16": _noise(5000, scale=1e30, dtype=torch.bfloat16),
        "squares below float32": _noise(5000, scale=1e-30),
        "subnormal": _noise(5000, scale=1e-42),
        "float64": _noise(3000, dtype=torch.float64),
        "squares beyond float64": _noise(4000, scale=1e300, dtype=torch.float64),
        "sum beyond float64": torch.full((5000,), 1.7e308, dtype=torch.float64),
        "subnormal float64": _noise(4000, scale=1e-310, dtype=torch.float64),
        "float64 of both ends": torch.tensor([1e-310, 1.0, 1e200], dtype=torch.float64).repeat(99),
        "mask": torch.full((9, 64, 64), torch.finfo(torch.float32).min).triu(1),
        "infinite mask": torch.full((9, 64, 64), -math.inf).triu(1),
        "nan and infinities": torch.tensor([1.0, math.nan, math.inf, -math.inf, 0.0, -0.0, 2.0]),
        "nan alone": torch.full((50,), math.nan),
        "one nan in many": _noise(300_000).index_fill_(0, torch.tensor([77]), math.nan),
        "bool": _noise(1000) > 0,
        "false": torch.zeros(10, dtype=torch.bool),
        "int8": torch.arange(-128, 128, dtype=torch.int8),
        "uint8": torch.arange(256).to(torch.uint8),
        "uint16": torch.arange(60_000, 65_536).to(torch.uint16),
        "int32": torch.arange(-(2**31), 2**31, 2**20, dtype=torch.int32),
        "int64": torch.arange(-9_000, 3_000),
        "complex64": torch.complex(_noise(50), _noise(50).flip(0)),
        "permuted": _noise(4, 5, 6, 7).permute(2, 0, 3, 1),
        "sliced": _noise(50, 60, 20)[3:40:2, ::3, 1:17],
        "sliced and large": _noise(3, 400, 500)[:, 1:, 3:],
        "expanded": _noise(6, 1, 5).expand(6, 9, 5),
        "expanded slice": _noise(6, 1, 50)[:, :, ::3].expand(6, 9, 17),
        "many dimensions": _noise(2, 3, 2, 3, 2, 3, 2, 4)[:, :2, :, :2, :, :2, :, ::2],
        "single stride": _noise(1, 1, 40)[:, :, :1],
    }
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"):
        dtype = getattr(torch, name)
        found[name] = _noise(3000).abs().to(dtype)
        found[f"every {name}"] = torch.arange(256, dtype=torch.uint8).view(dtype)
        found[f"sliced {name}"] = _noise(50, 60, 20).to(dtype)[3:40:2, ::3, 1:17]
    return found


def exact(value: torch.Tensor) -> list[float]:
    """Return [min, max, mean, rms, nan, inf, zeros, count] with sums that are exact."""
    magnitudes = value.abs() if value.is_complex() else value
    numbers = (magnitudes.float() if value.element_size() == 1 else magnitudes).double().flatten()
    finite = numbers[numbers.isfinite()].tolist()
    counts = [numbers.isnan().sum(), numbers.isinf().sum(), (numbers == 0).sum(), numbers.numel()]
    if not finite:
        return [math.nan] * 4 + [float(c) for c in counts]
    scale = max(abs(x) for x in finite) or 1.0
    mean = math.fsum(x / scale for x in finite) / len(finite) * scale
    rms = math.sqrt(math.fsum((x / scale) ** 2 for x in finite) / len(finite)) * scale
    return [min(finite), max(finite), mean, rms, *(float(c) for c in counts)]


def assert_row(found: Sequence[float], value: torch.Tensor) -> None:
    wanted = exact(value)
    assert list(found[columns.NAN : columns.SLOTS]) == wanted[columns.NAN :]
    assert list(found[:2]) == pytest.approx(wanted[:2], rel=0, abs=0, nan_ok=True)
    tolerance = max(3e-6 * wanted[columns.RMS], 1e-323)  # the smallest float64 has no digits to lose
    assert list(found[2:4]) == pytest.approx(wanted[2:4], rel=0, abs=tolerance, nan_ok=True)


def _plain(value: torch.Tensor, stats: torch.Tensor, row: int) -> None:
    stats[row, 0] = torch_stats.measure(value)


@pytest.mark.parametrize("write", [cpu_stats.write_row, _plain, operators.TAP], ids=["cpu", "plain", "operator"])
@pytest.mark.parametrize("name", values())
def test_a_row_tells_the_exact_statistics(name: str, write: Writer) -> None:
    value, stats = values()[name], torch.full((3, 1, columns.COLUMNS), 7.0, dtype=torch.float64)
    write(value, stats, 1)
    assert_row(columns.merge(stats)[1].tolist(), value)
    assert (stats[0] == 7).all() and (stats[2] == 7).all()


def checksum_of(value: torch.Tensor) -> int:
    """The checksum by its definition, element by element."""
    if value.is_complex():
        value = torch.view_as_real(value)
    size = value.element_size()
    raw = bytes(value.contiguous().flatten().view(torch.uint8).tolist())
    total = 0
    for place in range(value.numel()):
        bits = int.from_bytes(raw[place * size : (place + 1) * size], "little")
        word = bits if size < 8 else (bits & checksum.MASK) ^ (bits >> 32) * checksum.UPPER
        mixed = (word ^ place * checksum.PLACE) & checksum.MASK
        mixed = (mixed ^ mixed >> 16) * checksum.MIX & checksum.MASK
        total += mixed ^ mixed >> 13
    return total & checksum.MASK


def assert_checksum(found: Sequence[float], value: torch.Tensor) -> None:
    assert_row(found[: columns.COLUMNS], value)
    assert found[columns.CHECKSUM] == checksum_of(value)


def _plain_with_checksum(value: torch.Tensor, stats: torch.Tensor, row: int) -> None:
    stats[row, 0] = torch_stats.row_of(value, columns.WITH_CHECKSUM)


@pytest.mark.parametrize("write", [_plain_with_checksum, operators.TAP], ids=["plain", "operator"])
def test_a_checksum_is_that_of_its_definition(write: Writer) -> None:
    for value in values().values():
        if value.numel() < 20_000:
            stats = torch.full((3, 1, columns.WITH_CHECKSUM), 7.0, dtype=torch.float64)
            write(value, stats, 1)
            assert_checksum(columns.merge(stats)[1].tolist(), value)
            assert (stats[0] == 7).all() and (stats[2] == 7).all()


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_a_checksum_does_not_depend_on_layout_or_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "_CHUNK", {"cpu": chunk})
    value = _noise(5, 6, 7, 8).to(torch.bfloat16)
    wide = torch.zeros(5, 12, 7, 9, dtype=torch.bfloat16)[:, ::2, :, 1:].copy_(value)
    turned = value.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert {int(checksum.of(x)) for x in (value, wide, turned)} == {checksum_of(value)}
    assert int(checksum.of(value[:1].expand(3, -1, -1, -1))) == checksum_of(value[:1].repeat(3, 1, 1, 1))


def test_a_copy_of_a_probe_makes_checksums_too() -> None:
    probe, x = graphprobe.instrument(torch.nn.Linear(4, 3), checksum=True), _noise(2, 4)
    twin = copy.deepcopy(probe)
    twin(x), probe(x)
    found = [tap.checksum for tap in twin.taps if not tap.derived]
    assert None not in found and found == [tap.checksum for tap in probe.taps if not tap.derived]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_a_checksum_sees_what_statistics_do_not(dtype: torch.dtype) -> None:
    """Rows, signs and single elements that change places, and one bit; at distances that are powers of two, too."""
    value = (_noise(64, 4096) * 3).to(torch.int64).to(dtype)
    changed = [value.roll(1, 0), value.flip(0), value.flip(1), value.roll(2048, 1), value.view(32, 2, 4096).flip(1)]
    for i, j in ((0, 1), (3, 3 + 4096), (5, 5 + (1 << 16)), (0, (1 << 18) - 1)):
        flat = value.flatten().clone()
        flat[i], flat[j] = (True, False) if dtype is torch.bool else (1, -1)
        other = flat.clone()
        other[i], other[j] = flat[j].clone(), flat[i].clone()
        assert int(checksum.of(flat)) != int(checksum.of(other))
    found = [int(checksum.of(x)) for x in (value, *changed)]
    assert len(set(found)) == len(found)


_INTERPRETED = """
import test_taps_statistics as shared, torch
from graphprobe.taps import columns, triton_stats
for name, value in shared.values().items():
    stats = torch.full((3, 7, columns.COLUMNS), 7.0, dtype=torch.float64)
    triton_stats.write_row(value, stats, 1)
    shared.assert_row(columns.merge(stats)[1].tolist(), value)
    assert (stats[0] == 7).all() and (stats[2] == 7).all(), name
several = list(shared.values().values())
stats = torch.full((len(several) + 1, 5, columns.COLUMNS), 7.0, dtype=torch.float64)
triton_stats.write_rows(several, stats, range(len(several)))
for row, value in enumerate(several):
    shared.assert_row(columns.merge(stats)[row].tolist(), value)
assert (stats[-1] == 7).all()
shared.check_checksums(7)
"""


def check_checksums(slots: int, there: Callable[[torch.Tensor], torch.Tensor] = lambda value: value) -> None:
    """Compare what the kernels make of the corpus with the definition, one by one and several at once."""
    from graphprobe.taps import triton_stats

    found = [v for v in values().values() if v.numel() < 20_000 and not v.is_complex()]
    turned = _noise(3, 8, 5, 16).to(torch.bfloat16).transpose(1, 2)
    found += [turned, torch.empty_like(turned).copy_(turned), *(_noise(90 + n).half() for n in range(20))]
    device = there(found[0]).device
    for together in (False, True):
        stats = torch.full((len(found) + 1, slots, columns.WITH_CHECKSUM), 7.0, dtype=torch.float64, device=device)
        if together:
            triton_stats.write_rows([there(value) for value in found], stats, range(len(found)))
        else:
            for row, value in enumerate(found):
                triton_stats.write_row(there(value), stats, row)
        table = columns.merge(stats).tolist()
        for row, value in enumerate(found):
            assert_checksum(table[row], value)
        assert (stats[-1] == 7).all()


def _there(value: torch.Tensor) -> torch.Tensor:
    """Move to the GPU and keep the strides."""
    if 0 in value.stride():
        return value.cuda()
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda").copy_(value)


@pytest.mark.gpu
def test_the_gpu_computes_the_same_checksums() -> None:
    for _ in range(2):  # the second time the launches are known
        check_checksums(264, _there)
    for value in (v for v in values().values() if v.numel() >= 20_000 or v.element_size() == 1 or v.is_complex()):
        stats = columns.new_stats(1, torch.device("cuda"), checksum=True)
        operators.TAP(_there(value), stats, 0)
        assert int(columns.merge(stats)[0, columns.CHECKSUM]) == int(checksum.of(value))


def test_the_gpu_kernel_computes_the_same_when_interpreted() -> None:
    interpreting.check(_INTERPRETED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", values())
def test_the_gpu_tells_the_exact_statistics_and_the_same_ones_twice(name: str) -> None:
    value = values()[name]
    stats = [columns.new_stats(2, torch.device("cuda")) for _ in range(2)]
    there = value.cuda()
    if value.numel() and not value.is_contiguous():
        there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        if 0 in value.stride():
            there = value[:, :1].cuda().expand(value.shape)
        else:
            there.copy_(value)
    for table in stats:
        operators.TAP(there, table, 1)
    rows = [columns.merge(table).cpu()[1] for table in stats]
    assert_row(rows[0].tolist(), there.abs().cpu() if value.is_complex() else value)  # magnitudes are rounded there
    assert torch.equal(rows[0].view(torch.int64), rows[1].view(torch.int64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.bool])
def test_a_launch_that_is_known_measures_other_values_in_other_rows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(6, 3, 5000, generator=generator) * 100).to(dtype)
    stats = columns.new_stats(60, torch.device("cuda"))
    expected: dict[int, torch.Tensor] = {}
    for row, value in enumerate(drawn):
        for turn, view in enumerate((value, value[:, 1:], value[:, ::2], value.t())):
            there = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device="cuda").copy_(value)
            shown = (there, there[:, 1:], there[:, ::2], there.t())[turn]
            operators.TAP(shown, stats, 10 * turn + row)
            expected[10 * turn + row] = view
    for first, count in ((40, 1), (41, 5), (46, 3)):  # groups of several sizes are read by one variant
        group = [drawn[i % 6].cuda() for i in range(count)]
        operators.TAP_SEVERAL(group, stats, list(range(first, first + count)))
        expected |= {first + i: drawn[i % 6] for i in range(count)}
    table = columns.merge(stats).cpu()
    for row, value in expected.items():
        assert_row(table[row].tolist(), value)


# --- joining and layout -----------------------------------------------------------------------------------------------


@given(
    numbers=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_partial_rows_join_to_the_row_of_the_whole(numbers: list[float], cuts: list[int]) -> None:
    value = torch.tensor(numbers, dtype=torch.float64)
    edges = sorted({0, *(min(cut, len(numbers)) for cut in cuts), len(numbers)})
    parts = [value[start:stop] for start, stop in itertools.pairwise(edges)]
    stats = torch.full((1, len(parts) + 2, columns.COLUMNS), 5.0, dtype=torch.float64)  # two slots are not in use
    for slot, part in enumerate(parts):
        stats[0, slot] = torch_stats.measure(part)
    stats[0, 0, columns.SLOTS] = len(parts)
    assert_row(columns.merge(stats)[0].tolist(), value)
    assert_row(cpu_stats._merge([row[: columns.SLOTS] for row in stats[0, : len(parts)].tolist()]), value)


def test_a_row_that_never_ran_says_so() -> None:
    assert columns.merge(columns.new_stats(2, torch.device("cpu")))[:, columns.SLOTS].tolist() == [0.0, 0.0]


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    steps=st.lists(st.integers(1, 3), min_size=5, max_size=5),
    widen=st.integers(-1, 4),
)
def test_a_collapsed_layout_visits_every_element_once(
    shape: list[int], order: object, steps: list[int], widen: int
) -> None:
    value = torch.arange(math.prod(shape)).view(shape)
    value = value[tuple(slice(None, None, step) for step in steps[: len(shape)])]
    dims = list(range(value.dim()))
    order.shuffle(dims)  # type: ignore[attr-defined]
    value = value.permute(dims)
    if 0 <= widen < value.dim():
        value = value.narrow(widen, 0, 1).expand([3 if dim == widen else -1 for dim in range(value.dim())])
    sizes, strides, repeat = layout.collapse(value)
    visited = value.as_strided(sizes, strides).flatten().repeat(repeat)
    assert sorted(visited.tolist()) == sorted(value.flatten().tolist())
    if value.is_contiguous():
        assert (sizes, strides, repeat) == ([value.numel()], [1], 1)


# --- the operator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [False, True])
def test_the_operators_keep_the_rules_of_torch(gradient: bool) -> None:
    value = torch.randn(4, 6)[:, ::2].requires_grad_(gradient)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operators.TAP, (value, columns.new_stats(3, torch.device("cpu")), 2), test_utils=utils)
    torch.library.opcheck(operators.KEEP, (value, torch.empty(4, 3)), test_utils=utils)


def test_observing_is_not_differentiated() -> None:
    value, stats = torch.randn(5, requires_grad=True), columns.new_stats(1, torch.device("cpu"))
    doubled = value * 2
    operators.TAP(doubled, stats, 0)
    kept = torch.empty(5)
    operators.KEEP(doubled, kept)
    doubled.sum().backward()
    assert not stats.requires_grad and not kept.requires_grad
    assert value.grad is not None and torch.equal(kept, doubled.detach())


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_outside_the_buffer_is_refused(row: int) -> None:
    with pytest.raises(IndexError, match="is not in"):
        cpu_stats.write_row(torch.ones(3), columns.new_stats(3, torch.device("cpu")), row)

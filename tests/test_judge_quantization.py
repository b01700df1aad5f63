"""Rule 4: honest quantisation of every kind is a bounded change; wrong scales and what hides beside it are findings."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprobe
from judge_tools import Pair, module, randn
from models import tiny

ROWS, COLUMNS, GROUP = 48, 64, 16
DTYPES = [torch.float32, torch.bfloat16]
Forward = Callable[..., torch.Tensor]


class Codes:
    """A weight and what round-to-nearest makes of it."""

    def __init__(self, dtype: torch.dtype, bits: int = 8, group: int = COLUMNS, asymmetric: bool = False) -> None:
        self.weight = randn(ROWS, COLUMNS, dtype=dtype) * 0.1
        groups = self.weight.float().reshape(ROWS, -1, group)
        if asymmetric:
            low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
            scale = (high - low) / (2**bits - 1)
            zero = (-low / scale).round().clamp(0, 2**bits - 1)
            codes = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
        else:
            top = 2 ** (bits - 1) - 1
            scale = groups.abs().amax(-1, True) / top
            zero = torch.zeros_like(scale)
            codes = (groups / scale).round().clamp(-top - 1, top)
        self.codes, self.scale, self.zero = codes.reshape(ROWS, COLUMNS), scale.squeeze(-1), zero.squeeze(-1)


def plain(weight: torch.Tensor) -> nn.Module:
    return module(lambda m, x: torch.tanh(F.linear(x, m.w, m.b)), w=weight, b=randn(ROWS, seed=9, dtype=weight.dtype))


def compare(codes: Codes, forward: Forward, verdict: str, says: str = "", **tensors: torch.Tensor) -> graphprobe.Report:
    dtype = codes.weight.dtype
    bias = randn(ROWS, seed=9, dtype=dtype)
    x = randn(2, 8, COLUMNS, seed=1, dtype=dtype)
    return Pair(plain(codes.weight), module(forward, **{"b": bias, **tensors}), (x,), verdict, says=says).check()


def dequantised(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(F.linear(x, m.c.to(x.dtype) * m.s.to(x.dtype), m.b))


def scaled_after(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(F.linear(x, m.c.to(x.dtype)) * m.s.to(x.dtype).reshape(-1) + m.b)


WAYS = {"dequantised": dequantised, "scaled after": scaled_after}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
class TestStoredInt8:
    def test_honest(self, way: str, dtype: torch.dtype) -> None:
        codes = Codes(dtype)
        report = compare(codes, WAYS[way], "quantization", c=codes.codes.to(torch.int8), s=codes.scale)
        assert not report.ok and report.exit_code == 1
        finding = report.first
        assert finding is not None and finding.rule == "4 quantization"
        assert "8-bit weight" in finding.hint and "within half a step" in finding.hint

    @pytest.mark.parametrize("bug", ["16 times", "missing", "inverted", "3 %", "one row", "rolled", "doubled"])
    def test_wrong_scale(self, way: str, dtype: torch.dtype, bug: str) -> None:
        honest = Codes(dtype)
        codes, scale = honest.codes, honest.scale.clone()
        if bug == "16 times":  # obeys its own half step
            scale = scale * 16
            codes = (honest.weight.float() / scale).round()
        elif bug == "one row":
            scale[7] *= 1.1
        else:
            scale = {
                "missing": torch.ones_like(scale),
                "inverted": 1 / scale,
                "3 %": scale * 1.03,
                "rolled": scale.roll(1, 0),
                "doubled": scale * 2,
            }[bug]
        compare(honest, WAYS[way], "semantic", c=codes.to(torch.int8), s=scale)

    def test_one_wrong_row_of_codes(self, way: str, dtype: torch.dtype) -> None:
        honest = Codes(dtype)
        codes = honest.codes.clone()
        codes[5] = codes[5].roll(1)
        compare(honest, WAYS[way], "semantic", c=codes.to(torch.int8), s=honest.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bug_beside_honest_int8_is_found(dtype: torch.dtype) -> None:
    codes = Codes(dtype)

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.linear(x, m.c.to(x.dtype) * m.s.to(x.dtype), m.b) * 1.001)

    compare(codes, forward, "semantic", c=codes.codes.to(torch.int8), s=codes.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("float8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_weights(dtype: torch.dtype, float8: torch.dtype) -> None:
    codes = Codes(dtype)
    scale = codes.weight.float().abs().amax(1, True) / torch.finfo(float8).max
    held = (codes.weight.float() / scale).to(float8)
    compare(codes, dequantised, "quantization", c=held, s=scale)
    compare(codes, dequantised, "quantization", c=codes.weight.to(float8), s=torch.ones(1))
    compare(codes, dequantised, "semantic", c=held, s=scale * 1.06)


def unpacked(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    codes = torch.stack([m.p & 15, m.p >> 4], -1).reshape(ROWS, -1, GROUP).to(x.dtype)
    weight = (codes - m.z[..., None].to(x.dtype)) * m.s[..., None].to(x.dtype)
    return torch.tanh(F.linear(x, weight.reshape(ROWS, COLUMNS), m.b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_packed_int4_in_groups(dtype: torch.dtype, asymmetric: bool) -> None:
    honest = Codes(dtype, 4, GROUP, asymmetric)
    shift = 0 if asymmetric else 8
    codes = (honest.codes + shift).to(torch.uint8)
    packed, zero = codes[:, ::2] | (codes[:, 1::2] << 4), honest.zero + shift
    compare(honest, unpacked, "quantization", "4-bit", p=packed, s=honest.scale, z=zero)
    compare(honest, unpacked, "semantic", p=packed, s=honest.scale, z=zero + 1)
    compare(honest, unpacked, "semantic", p=(packed >> 4) | (packed << 4), s=honest.scale, z=zero)
    compare(honest, unpacked, "semantic", p=packed, s=honest.scale.roll(1, 1), z=zero)


def dynamic(rounding: Callable[[torch.Tensor], torch.Tensor] = torch.round, coarser: float = 1.0) -> Forward:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127 * coarser
        codes = rounding(x.float() / scale).clamp(-128, 127).to(torch.int8)
        product = torch._int_mm(codes.reshape(-1, COLUMNS), m.c.t().contiguous()).reshape(*x.shape[:-1], ROWS)
        return torch.tanh((product.float() * scale * m.s.reshape(-1)).to(x.dtype) + m.b)

    return forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic_int8_through_an_integer_product(dtype: torch.dtype) -> None:
    honest = Codes(dtype)
    codes, scale = honest.codes.to(torch.int8), honest.scale
    compare(honest, dynamic(), "quantization", "rounded to codes", c=codes, s=scale)
    compare(honest, dynamic(), "semantic", c=codes, s=scale * 1.03)
    compare(honest, dynamic(torch.floor), "semantic", c=codes, s=scale)
    compare(honest, dynamic(lambda x: x), "semantic", c=codes, s=scale)  # the cast truncates
    compare(honest, dynamic(coarser=16.0), "semantic", "levels", c=codes, s=scale)
    compare(honest, dynamic(coarser=0.2), "semantic", c=codes, s=scale)  # clips


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_quantisation(dtype: torch.dtype) -> None:
    honest = Codes(dtype)

    def arithmetic(levels: float) -> Forward:
        def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
            scale, step = m.w.float().abs().amax(1, True) / 127, x.float().abs().amax() / levels
            weight = (m.w / scale).round().clamp(-128, 127) * scale
            held = (x / step).round().clamp(-128, 127) * step
            return torch.tanh(F.linear(held.to(x.dtype), weight.to(x.dtype), m.b))

        return forward

    def operators(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        held = torch.fake_quantize_per_tensor_affine(x.float(), 0.03, 0, -128, 127).to(x.dtype)
        zero = torch.zeros(ROWS, dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(m.w.float(), m.s.reshape(-1), zero, 0, -128, 127)
        return torch.tanh(F.linear(held, weight.to(x.dtype), m.b))

    compare(honest, arithmetic(127), "quantization", w=honest.weight)
    compare(honest, arithmetic(800), "semantic", w=honest.weight)  # clips
    compare(honest, operators, "quantization", w=honest.weight, s=honest.scale)


def test_decomposed_quantisers_and_float8_products() -> None:
    import torch.ao.quantization.fx._decomposed

    honest = Codes(torch.float32)
    operators = torch.ops.quantized_decomposed

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        codes = operators.quantize_per_tensor(x, 0.03, 3, -128, 127, torch.int8)
        held = operators.dequantize_per_tensor(codes, 0.03, m.zero_back, -128, 127, torch.int8)
        zeros = torch.zeros(ROWS, dtype=torch.int64)
        weight = operators.dequantize_per_channel(m.c, m.s.reshape(-1), zeros, 0, -128, 127, torch.int8)
        return torch.tanh(F.linear(held, weight, m.b))

    for zero, verdict in ((3, "quantization"), (4, "semantic")):
        after = module(forward, c=honest.codes.to(torch.int8), s=honest.scale, b=randn(ROWS, seed=9))
        after.zero_back = zero
        Pair(plain(honest.weight), after, (randn(2, 8, COLUMNS, seed=1),), verdict).check()

    def float8(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax() / 448
        codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).reshape(-1, COLUMNS)
        product = torch._scaled_mm(codes, m.c.t(), scale_a=scale, scale_b=m.s, out_dtype=torch.bfloat16)
        return torch.tanh(product.reshape(*x.shape[:-1], ROWS).float() + m.b)

    scale = honest.weight.abs().amax() / 448
    compare(honest, float8, "quantization", c=(honest.weight / scale).to(torch.float8_e4m3fn), s=scale)
    compare(honest, float8, "semantic", c=(honest.weight / scale).to(torch.float8_e4m3fn), s=scale * 1.06)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_quantised_table(dtype: torch.dtype) -> None:
    table = randn(50, 32, dtype=dtype)
    scale = table.float().abs().amax(1, True) / 127
    codes, tokens = (table.float() / scale).round().to(torch.int8), torch.arange(0, 48).reshape(2, 24)
    before = module(lambda m, i: F.embedding(i, m.e) * 2, e=table)
    after = lambda m, i: m.c[i].to(dtype) * m.s[i].to(dtype) * 2  # noqa: E731
    Pair(before, module(after, c=codes, s=scale), (tokens,), "quantization").check()
    Pair(before, module(after, c=codes, s=scale.roll(1, 0)), (tokens,), "semantic").check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_quantised_cache(dtype: torch.dtype) -> None:
    def held(x: torch.Tensor, wrong: bool = False) -> torch.Tensor:
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        codes = (x.float() / scale).round().clamp(-128, 127).to(torch.int8)
        return (codes.float() * (scale.roll(1, 2) if wrong else scale)).to(x.dtype)

    def attention(wrong: bool, scale: float) -> Forward:
        return lambda m, q, k, v: F.scaled_dot_product_attention(q, held(k * 1.5, wrong), held(v), scale=scale)

    before = module(lambda m, q, k, v: F.scaled_dot_product_attention(q, k * 1.5, v, scale=0.25))
    qkv = tuple(randn(2, 4, 16, 16, seed=i, dtype=dtype) for i in range(3))
    Pair(before, module(attention(False, 0.25)), qkv, "quantization").check()
    Pair(before, module(attention(True, 0.25)), qkv, "semantic").check()
    Pair(before, module(attention(False, 0.2502)), qkv, "semantic").check()


def test_weights_chosen_for_their_output() -> None:
    """Columns quantised one after the other, each compensating the errors before it on real activations."""
    x = randn(512, COLUMNS, seed=5) @ randn(COLUMNS, COLUMNS, seed=6)
    weight = randn(ROWS, COLUMNS) * 0.1
    inverse = torch.linalg.inv(x.t() @ x + 0.01 * torch.eye(COLUMNS) * x.square().sum(0).mean())
    factor = torch.linalg.cholesky(inverse, upper=True)
    scale = weight.abs().amax(1, True) / 7
    left, codes = weight.clone(), torch.zeros_like(weight)
    for column in range(COLUMNS):
        codes[:, column] = (left[:, column] / scale[:, 0]).round().clamp(-8, 7)
        error = (left[:, column] - codes[:, column] * scale[:, 0]) / factor[column, column]
        left[:, column:] -= error[:, None] * factor[column, column:][None]
    assert ((codes * scale - weight).abs() > scale / 2).float().mean() > 0.1
    before = module(lambda m, x: F.linear(x, m.w), w=weight)
    after = module(lambda m, x: F.linear(x, m.c.float() * m.s), c=codes.to(torch.int8), s=scale)
    Pair(before, after, (x,), "quantization", says="chosen for the output").check()
    after = module(lambda m, x: F.linear(x, m.c.float() * m.s), c=(codes + 1).to(torch.int8), s=scale)
    Pair(before, after, (x,), "semantic").check()


def test_allowed_quantisation_passes_and_a_bug_does_not() -> None:
    codes = Codes(torch.float32)
    x = randn(2, 8, COLUMNS, seed=1)
    tensors = {"c": codes.codes.to(torch.int8), "s": codes.scale, "b": randn(ROWS, seed=9)}
    report = graphprobe.diff(plain(codes.weight), module(dequantised, **tensors), (x,), allow=("quantization",))
    assert report.verdict == "quantization" and report.ok and report.exit_code == 0
    tensors["s"] = codes.scale * 1.05
    report = graphprobe.diff(plain(codes.weight), module(dequantised, **tensors), (x,), allow=("quantization",))
    assert report.verdict == "semantic" and report.exit_code == 1


class TestLlama:
    """All linear layers of a model quantised, one of them wrongly."""

    @staticmethod
    def quantised(model: nn.Module, wrong: str = "") -> nn.Module:
        model = copy.deepcopy(model)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear):
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], Int8Linear(layer, 1.04 if name == wrong else 1.0))
        return model

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_honest(self, dtype: torch.dtype) -> None:
        model, args, kwargs = tiny("llama", dtype)
        report = graphprobe.diff(model, self.quantised(model), args, kwargs)
        assert report.verdict == "quantization" and {f.kind for f in report.findings} == {"quantization"}
        assert {f.module_path for f in report.findings} == {
            n for n, m in model.named_modules() if isinstance(m, nn.Linear)
        }

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_one_wrong_layer(self, dtype: torch.dtype) -> None:
        model, args, kwargs = tiny("llama", dtype)
        wrong = "model.layers.1.mlp.down_proj"
        report = graphprobe.diff(model, self.quantised(model, wrong), args, kwargs)
        assert report.verdict == "semantic"
        assert [f.module_path for f in report.findings if f.kind == "semantic"] == [wrong]


class Int8Linear(nn.Module):
    """A linear layer whose weight is held in 8 bits, one scale a row."""

    def __init__(self, source: nn.Linear, wrong: float) -> None:
        super().__init__()
        scale = source.weight.detach().float().abs().amax(1, True) / 127
        self.register_buffer("codes", (source.weight.detach().float() / scale).round().to(torch.int8))
        self.register_buffer("scale", (scale * wrong).to(source.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.codes.to(x.dtype) * self.scale)


def test_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, args, kwargs = tiny("llama", torch.bfloat16)
    for config in (
        quantization.Int8WeightOnlyConfig(),
        quantization.Int8DynamicActivationInt8WeightConfig(),
        quantization.Float8WeightOnlyConfig(),
        quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32)),
    ):
        after = copy.deepcopy(model)
        quantization.quantize_(after, config)
        report = graphprobe.diff(model, after, args, kwargs)
        assert report.verdict == "quantization", config
        assert {f.kind for f in report.findings} == {"quantization"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_column_that_is_off_does_not_hide_in_codes_of_rows(way: str, dtype: torch.dtype) -> None:
    honest = Codes(dtype)
    wrong = copy.copy(honest)
    wrong.codes = honest.codes.clone()
    wrong.codes[:, 5] = (honest.codes[:, 5] * 1.05).round().clamp(-127, 127)
    found = compare(wrong, WAYS[way], "semantic", c=wrong.codes.to(torch.int8), s=honest.scale)
    assert any("column 5 is" in f.hint for f in found.findings), found.to_json()

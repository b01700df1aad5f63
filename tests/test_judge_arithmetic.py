"""Exact arithmetic knows every family of operators: its value lies within rounding of the native one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprobe
from judge_tools import module, randn

BF16, INT8, FP8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn
aten = torch.ops.aten
Forward = Callable[..., Any]
Family = tuple[Forward | nn.Module, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]
FAMILIES: dict[str, Callable[[], Family]] = {}


def family(make: Callable[[], Family]) -> Callable[[], Family]:
    FAMILIES[make.__name__.replace("_", " ")] = make
    return make


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return randn(*shape, seed=seed, dtype=dtype)


# --- products with kernels of their own -------------------------------------------------------------------------------


@family
def grouped_product() -> Family:
    tensors = {"w": draw(3, 16, 32, dtype=BF16), "ends": torch.tensor([3, 5, 8], dtype=torch.int32)}
    return lambda m, x: torch._grouped_mm(x, m.w, offs=m.ends), (draw(8, 16, dtype=BF16),), tensors


@family
def integer_product() -> Family:
    return lambda m, x: torch._int_mm(x.to(INT8), m.w) * 0.1, (draw(32, 16) * 9,), {"w": (draw(16, 8) * 20).to(INT8)}


@family
def packed_int8_product() -> Family:
    tensors = {"w": (draw(16, 32) * 20).to(INT8), "s": draw(16, dtype=BF16).abs()}
    return lambda m, x: torch._weight_int8pack_mm(x, m.w, m.s), (draw(4, 32, dtype=BF16),), tensors


@family
def packed_int4_product() -> Family:
    codes = torch.randint(0, 16, (32, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    tensors = {"w": aten._convert_weight_to_int4pack_for_cpu(codes, 1), "s": draw(2, 32, 2)}
    return lambda m, x: aten._weight_int4pack_mm_for_cpu(x, m.w, 32, m.s), (draw(4, 64),), tensors


@family
def scaled_float8_product() -> Family:
    tensors = {"w": draw(16, 32).to(FP8), "a": torch.tensor(1.5), "b": torch.tensor(0.3)}
    return (
        lambda m, x: torch._scaled_mm(x.to(FP8), m.w.t(), scale_a=m.a, scale_b=m.b, out_dtype=BF16),
        (draw(16, 32, seed=1),),
        tensors,
    )


# --- attention --------------------------------------------------------------------------------------------------------


def _heads(count: int = 3, keys: int = 2) -> tuple[torch.Tensor, ...]:
    return tuple(draw(1, 4 if i == 0 else keys, 8, 16, seed=i) for i in range(count))


@family
def flash_attention() -> Family:
    return lambda m, q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0], _heads(keys=4), {}


@family
def attention_as_math() -> Family:
    return lambda m, q, k, v: aten._scaled_dot_product_attention_math(q, k, v, is_causal=True)[0], _heads(keys=4), {}


@family
def attention_with_shared_heads() -> Family:
    return lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), _heads(), {}


@family
def transformer_layer() -> Family:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), (draw(2, 5, 16),), {}


@family
def recurrent_layers() -> Family:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LSTM(8, 6, batch_first=True), nn.GRU(8, 6, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x)[0] + self.second(x)[0]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Recurrent().eval(), (draw(2, 5, 8),), {}


# --- transforms, convolutions, norms ----------------------------------------------------------------------------------


@family
def fourier() -> Family:
    tensors = {"w": torch.complex(draw(9), draw(9, seed=1))}
    return lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.w, n=16), (draw(2, 16, seed=2),), tensors


@family
def short_time_fourier() -> Family:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.stft(x, 16, window=torch.hann_window(16), return_complex=True).abs().log1p()

    return forward, (draw(2, 64),), {}


@family
def complex_rotary() -> Family:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().reshape(2, 8, 8, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(m.a), m.a)).flatten(-2).to(x.dtype)

    return forward, (draw(2, 8, 16, dtype=BF16),), {"a": draw(8, 8, seed=1)}


@family
def convolutions() -> Family:
    def forward(m: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = x.reshape(1, 2, 4, 4, 4)
        return (
            F.conv1d(x.reshape(1, 4, 32), m.a, padding=1, groups=2),
            F.conv2d(x.reshape(1, 2, 8, 8), m.b, padding="same", dilation=2),
            F.conv3d(wide, m.c, stride=2),
            F.conv_transpose2d(x.reshape(1, 2, 8, 8), m.d, stride=2),
        )

    tensors = {"a": draw(8, 2, 3), "b": draw(4, 2, 3, 3), "c": draw(3, 2, 3, 3, 3), "d": draw(2, 4, 3, 3)}
    return forward, (draw(128, seed=1),), tensors


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_norms(dtype: torch.dtype) -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            F.layer_norm(x, (16,), m.g, m.b), F.group_norm(x, 4, m.g, m.b), F.rms_norm(x, (16,)), F.instance_norm(x),
            F.batch_norm(x, m.b, m.g.abs(), m.g, m.b), F.local_response_norm(x, 3), F.normalize(x, dim=-1),
            aten._fused_rms_norm(x, [16], m.g, None)[0],
        )  # fmt: skip

    model = module(forward, g=draw(16, dtype=dtype), b=draw(16, seed=1, dtype=dtype))
    report = graphprobe.diff(model, model, (draw(2, 16, 16, seed=2, dtype=dtype),), exact="always")
    assert report.verdict == "identical" and report.coverage.unknown == 0
    u = torch.finfo(dtype).eps / 2
    assert all(row.floor is not None and row.floor <= 16 * u for row in report.regions)


# --- gathering, scattering, scanning, deciding ------------------------------------------------------------------------


@family
def bags() -> Family:
    def forward(m: nn.Module, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(F.embedding_bag(i, m.w, m.o, mode=mode) for mode in ("sum", "mean", "max"))

    tokens = torch.arange(12) * 7 % 20
    return forward, (tokens,), {"w": draw(20, 8), "o": torch.tensor([0, 3, 7])}


@family
def scatters() -> Family:
    def forward(m: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        zero = torch.zeros(6, 8)
        return (
            zero.index_add(0, m.i, x),
            zero.scatter_add(1, m.j, x[:6]),
            zero.index_put((m.i,), x, accumulate=True),
            zero.scatter_reduce(0, m.i[:, None].expand(10, 8), x, "mean", include_self=False),
        )

    return forward, (draw(10, 8),), {"i": torch.arange(10) * 5 % 6, "j": (torch.arange(48) * 3 % 8).reshape(6, 8)}


@family
def running_sums() -> Family:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1) + (x * 0.5).cumprod(1) + x.cummax(1)[0] + x.logcumsumexp(1)

    return forward, (draw(4, 16),), {}


@family
def orders() -> Family:
    def forward(m: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.sort(-1)[0] * m.w, x.topk(3)[0].exp(), x.argsort(-1), m.t[torch.bucketize(x, m.b)]

    return forward, (draw(4, 16),), {"w": draw(16, seed=1), "t": draw(6), "b": torch.linspace(-2, 2, 5)}


@family
def branches_in_branches() -> Family:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        def inner(t: torch.Tensor) -> torch.Tensor:
            return torch.cond(t.mean() > 0, torch.sin, torch.cos, (t,)) * 2

        return torch.cond(x.sum() > 0, inner, lambda t: F.linear(t, m.w) / 3, (x,))

    return forward, (draw(4, 16, dtype=BF16),), {"w": draw(16, 16, dtype=BF16)}


@family
def loops_and_scans() -> Family:
    from torch._higher_order_ops.associative_scan import associative_scan
    from torch._higher_order_ops.scan import scan
    from torch._higher_order_ops.while_loop import while_loop

    def forward(m: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        looped = while_loop(lambda i, t: i < 5, lambda i, t: (i + 1, torch.tanh(t * 1.1)), (torch.tensor(0), x))[1]
        scanned = scan(lambda c, t: (c * 0.9 + t, (c * t).sin()), torch.zeros(4), x)[1]
        return looped, scanned, associative_scan(lambda a, b: a * b + 0.1 * a, x, 0, combine_mode="generic")

    return forward, (draw(6, 4),), {}


@family
def mapped_over_a_dimension() -> Family:
    return lambda m, x: torch.vmap(lambda t: F.linear(t, m.w).softmax(-1))(x) * 2, (draw(3, 4, 8),), {"w": draw(8, 8)}


# --- dtypes -----------------------------------------------------------------------------------------------------------


@family
def autocast() -> Family:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=BF16):
            y = F.linear(x, m.w)
        return y.float().softmax(-1)

    return forward, (draw(4, 16),), {"w": draw(16, 16, seed=1)}


@family
def bits() -> Family:
    return lambda m, x: (x.view(torch.int32) & -65536).view(torch.float32) * 2, (draw(4, 8),), {}


@family
def product_in_another_dtype() -> Family:
    from torch._higher_order_ops.out_dtype import out_dtype

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return out_dtype(aten.mm.default, torch.int32, x.to(INT8), m.w).float() * 0.5

    return forward, (draw(16, 16) * 10,), {"w": (draw(16, 16) * 20).to(INT8)}


_SLOW = {"loops and scans", "branches in branches"}  # export takes seconds


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in _SLOW else n for n in FAMILIES])
def test_the_exact_value_is_what_the_native_one_rounds_to(name: str) -> None:
    forward, args, tensors = FAMILIES[name]()
    model = forward if isinstance(forward, nn.Module) else module(forward, **tensors)
    report = graphprobe.diff(model, model, args, exact="always")
    assert report.verdict == "identical" and report.coverage.unknown == 0
    for row in report.regions:
        assert row.verdict == "identical" and row.rule
        # 64 u: sums of a few hundred terms; another function would be off by a share of the value
        bound = (
            64 * (2.0**-8 if row.dtype == "bfloat16" else 2.0**-24)
            if row.dtype.startswith(("float", "bfloat", "complex"))
            else 0.0
        )
        assert row.floor is None or row.floor <= bound, (row.op, row.floor)


# --- operators of a user ----------------------------------------------------------------------------------------------


def _define(name: str) -> None:
    """Define ``graphprobe_tests::NAME(x, s) = sin(x) s`` whose kernel refuses float64."""
    if hasattr(torch.ops.graphprobe_tests, name):
        return

    def kernel(x: torch.Tensor, s: float) -> torch.Tensor:
        assert x.dtype != torch.float64
        return x.sin() * s

    torch.library.define(f"graphprobe_tests::{name}", "(Tensor x, float s) -> Tensor")
    torch.library.impl(f"graphprobe_tests::{name}", "CPU")(kernel)
    torch.library.register_fake(f"graphprobe_tests::{name}")(lambda x, s: torch.empty_like(x))


@pytest.mark.parametrize("ruled", [False, True])
def test_a_kernel_without_float64(ruled: bool) -> None:
    name = "ruled_sine" if ruled else "plain_sine"
    _define(name)
    operator = getattr(torch.ops.graphprobe_tests, name)
    if ruled:
        graphprobe.exact_rule(operator)(lambda x, s: x.sin() * s)
    before = module(lambda m, x: x.sin() * 2 + 1)
    for factor, verdict in ((2.0, ("identical", "rounding")), (2.1, ("semantic",))):
        report = graphprobe.diff(before, module(lambda m, x: operator(x, factor) + 1), (draw(4, 8),))  # noqa: B023
        assert report.verdict in verdict
    assert report.findings[0].rule.startswith("1" if ruled else "3")
    tiny_change = graphprobe.diff(before, module(lambda m, x: operator(x, 2.0000001) + 1), (draw(4, 8),))
    assert (tiny_change.verdict == "semantic") is ruled  # without a reference a defect below rounding does not show

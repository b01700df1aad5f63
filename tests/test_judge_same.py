"""Rule 1 and its neighbours: counter-examples that a comparison with a tolerance, or a naive exact one, gets wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import graphprobe
from judge_tools import Pair, module, randn

SAME = ("identical", "rounding")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, Callable[[], Pair]] = {}


def case(make: Callable[[], Pair]) -> Callable[[], Pair]:
    CASES[make.__name__.replace("_", " ")] = make
    return make


@pytest.mark.parametrize("name", CASES)
def test_counter_example(name: str) -> None:
    CASES[name]().check()


# --- fused add + RMSNorm: the two sides start at different places -----------------------------------------------------


def _split_norm(m: nn.Module, x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + r
    f = h.float()
    return m.w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype), h


def _fused_norm(eps: float) -> Callable[..., object]:
    def forward(m: nn.Module, x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        f = x.float() + r.float()
        return m.w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype), f.to(x.dtype)

    return forward


def _norm_pair(eps: float, verdict: str) -> Pair:
    w, x, r = randn(64, dtype=BF16), randn(2, 8, 64, seed=1, dtype=BF16), randn(2, 8, 64, seed=2, dtype=BF16)
    return Pair(module(_split_norm, w=w), module(_fused_norm(eps), w=w), (x, r), verdict)


@case
def fused_add_and_norm() -> Pair:
    return _norm_pair(1e-6, "rounding")


@case
def fused_add_and_norm_with_another_epsilon() -> Pair:
    return _norm_pair(1e-5, "semantic")


# --- masks: a huge number must not swallow a bug ----------------------------------------------------------------------

LOWEST = torch.finfo(FP32).min


def _mask(value: float = LOWEST, diagonal: int = 1) -> torch.Tensor:
    return torch.full((16, 16), value).triu(diagonal)


def _eager(scale: float) -> Callable[..., torch.Tensor]:
    return lambda m, q, k, v: torch.softmax(q @ k.transpose(-1, -2) * scale + m.mask, -1) @ v


def _sdpa(m: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.mask)


def _attention(after: nn.Module, verdict: object, mask: torch.Tensor | None = None, dtype: torch.dtype = FP32) -> Pair:
    qkv = tuple(randn(2, 4, 16, 16, seed=i, dtype=dtype) for i in range(3))
    return Pair(module(_eager(0.25), mask=_mask() if mask is None else mask), after, qkv, verdict)  # type: ignore[arg-type]


@case
def attention_scale_wrong_under_a_finite_mask() -> Pair:
    return _attention(module(_eager(0.25025), mask=_mask()), "semantic")


@case
def sdpa_for_eager_attention() -> Pair:
    return _attention(module(_sdpa, mask=_mask()), "rounding")


@case
def sdpa_with_a_boolean_mask() -> Pair:
    return _attention(module(_sdpa, mask=_mask() == 0), "rounding")


@case
def infinite_for_finite_mask() -> Pair:
    return _attention(module(_eager(0.25), mask=_mask(-torch.inf)), SAME)


@case
def another_large_mask_value() -> Pair:
    return _attention(module(_eager(0.25), mask=_mask(-1e9)), SAME)


@case
def mask_off_by_one() -> Pair:
    return _attention(module(_eager(0.25), mask=_mask(diagonal=2)), "semantic")


@case
def boolean_mask_added() -> Pair:
    return _attention(module(_eager(0.25), mask=_mask() == 0), "semantic")


@case
def mask_forgotten_before_an_infinite_one() -> Pair:
    after = module(lambda m, q, k, v: torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v)
    return _attention(after, "semantic", _mask(-torch.inf))


@case
def fully_masked_row_nan_against_zero() -> Pair:
    mask = _mask(-torch.inf)
    mask[3] = -torch.inf
    return _attention(module(_sdpa, mask=mask), "rounding", mask)


@case
def fully_masked_row_in_float16() -> Pair:
    mask = _mask(torch.finfo(FP16).min).half()
    mask[3] = torch.finfo(FP16).min

    def replaced(m: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(torch.where(m.mask == 0, q @ k.transpose(-1, -2) * 0.25, torch.finfo(FP16).min), -1) @ v

    return _attention(module(replaced, mask=mask), SAME, mask, FP16)


def _lowered_mask(scale: float, verdict: object) -> Pair:
    """A mask of float32's lowest number and rows that are masked as a whole, lowered to float16's lowest."""
    mask = _mask()
    mask[3] = LOWEST

    def low(m: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        score = (q.half() @ k.half().transpose(-1, -2)) * scale + m.mask
        return (torch.softmax(score.float(), -1).half() @ v.half()).float()

    return _attention(module(low, mask=mask.clamp(min=torch.finfo(FP16).min).half()), verdict, mask)


@case
def mask_lowered_to_float16() -> Pair:
    return _lowered_mask(0.25, "rounding")


@case
def mask_lowered_to_float16_and_a_wrong_scale() -> Pair:
    return _lowered_mask(0.2505, "semantic")


@case
def overflow_of_float16_is_no_mask() -> Pair:
    w = randn(64, 64) * 4000
    low = module(lambda m, x: (F.linear(x.half(), m.w.half()) * 1e-3).float(), w=w)
    return Pair(module(lambda m, x: F.linear(x, m.w) * 1e-3, w=w), low, (randn(2, 8, 64, seed=1) * 10,), "nonfinite")


@case
def product_in_float32_of_what_was_rounded() -> Pair:
    def forward(wide: bool) -> Callable[..., torch.Tensor]:
        def run(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
            f = x.float()
            h = (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6) * (m.g.float() + 1)).type_as(x)
            y = F.linear(h.float(), m.w.float()).to(x.dtype) if wide else F.linear(h, m.w)
            return torch.tanh(y + F.linear(h, m.v))

        return run

    tensors = {
        "g": randn(64, dtype=BF16),
        "w": randn(64, 64, dtype=BF16) / 8,
        "v": randn(64, 64, seed=1, dtype=BF16) / 8,
    }
    return Pair(
        module(forward(False), **tensors), module(forward(True), **tensors), (randn(2, 8, 64, dtype=BF16),), SAME
    )


# --- constants computed ahead -----------------------------------------------------------------------------------------


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin


def _frequencies(theta: float) -> torch.Tensor:
    return 1 / (theta ** (torch.arange(0, 16, 2).float() / 16))


def _rotary(theta: float, dtype: torch.dtype, verdict: object) -> Pair:
    def computed(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        angle = torch.cat([m.positions.float()[:, None] * m.frequencies[None]] * 2, -1)
        return _rotate(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype))

    positions = torch.arange(16)
    angle = torch.cat([positions.float()[:, None] * _frequencies(theta)[None]] * 2, -1)
    folded = module(lambda m, x: _rotate(x, m.c, m.s), c=angle.cos().to(dtype), s=angle.sin().to(dtype))
    before = module(computed, positions=positions, frequencies=_frequencies(10000.0))
    return Pair(before, folded, (randn(2, 4, 16, 16, dtype=dtype),), verdict)  # type: ignore[arg-type]


@case
def folded_rotary_tables() -> Pair:
    return _rotary(10000.0, FP32, SAME)


@case
def folded_rotary_tables_in_bf16() -> Pair:
    return _rotary(10000.0, BF16, SAME)


@case
def folded_rotary_tables_of_another_base() -> Pair:
    return _rotary(10010.0, FP32, "semantic")


@case
def folded_rotary_tables_of_another_base_in_bf16() -> Pair:
    return _rotary(10010.0, BF16, "semantic")


def _folded(eps: float, verdict: object) -> Pair:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv, norm, last = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    other = copy.deepcopy(norm).eval()
    other.eps = eps
    after = nn.Sequential(fuse_conv_bn_eval(copy.deepcopy(conv).eval(), other), nn.ReLU(), copy.deepcopy(last)).eval()
    before = nn.Sequential(conv, norm, nn.ReLU(), last).eval()
    return Pair(before, after, (randn(2, 3, 12, 12),), verdict)  # type: ignore[arg-type]


@case
def folded_batch_norm() -> Pair:
    return _folded(1e-5, "rounding")


@case
def folded_batch_norm_with_another_epsilon() -> Pair:
    return _folded(1.2e-5, "semantic")


@case
def two_wrong_rows_of_576() -> Pair:
    w = randn(576, 576, dtype=BF16) * 0.02
    wrong = w.clone()
    wrong[[100, 333]] *= 1.01
    linear = lambda m, x: F.linear(x, m.w)  # noqa: E731
    return Pair(module(linear, w=w), module(linear, w=wrong), (randn(2, 8, 576, dtype=BF16),), "semantic")


# --- claims that are wrong, and rewrites that compensate elsewhere ----------------------------------------------------


def _scaled(q_scale: float, k_scale: float) -> Callable[..., torch.Tensor]:
    def forward(m: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = q * q_scale if q_scale != 1 else q
        k = k * k_scale if k_scale != 1 else k
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v

    return forward


def _moved(k_scale: float, verdict: object) -> Pair:
    qkv = tuple(randn(2, 4, 16, 16, seed=i) for i in range(3))
    return Pair(module(_scaled(0.25, 1)), module(_scaled(1, k_scale)), qkv, verdict)  # type: ignore[arg-type]


@case
def scale_moved_from_q_to_k() -> Pair:
    return _moved(0.25, SAME)


@case
def scale_moved_from_q_to_k_and_changed() -> Pair:
    return _moved(0.2501, "semantic")


class Crosswise(nn.Module):
    """Attention whose projections can be written in the other order, so that only their place tells them apart."""

    def __init__(self, swapped: bool, scale: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.swapped, self.scale = swapped, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (self.k(x), self.q(x)) if self.swapped else (self.q(x), self.k(x))
        first, second, v = (t.view(2, 8, 2, 16).transpose(1, 2) for t in (first, second, self.v(x)))
        score = (first * self.scale) @ second.transpose(-1, -2)
        return torch.softmax(score.transpose(-1, -2) if self.swapped else score, -1) @ v


@case
def crosswise_claims() -> Pair:
    return Pair(Crosswise(False, 0.25), Crosswise(True, 0.25), (randn(2, 8, 32),), SAME)


@case
def crosswise_claims_with_a_wrong_scale() -> Pair:
    return Pair(Crosswise(False, 0.25), Crosswise(True, 0.25025), (randn(2, 8, 32),), "semantic")


class FusedQkv(nn.Module):
    """The projections of `Crosswise` in one matrix; `order` says which part is taken for what."""

    def __init__(self, source: Crosswise, order: tuple[int, int, int]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.cat([p.weight for p in (source.q, source.k, source.v)]))
        self.b = nn.Parameter(torch.cat([p.bias for p in (source.q, source.k, source.v)]))
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = F.linear(x, self.w, self.b).split(32, -1)
        q, k, v = (parts[i].view(2, 8, 2, 16).transpose(1, 2) for i in self.order)
        return torch.softmax((q * 0.25) @ k.transpose(-1, -2), -1) @ v


@case
def fused_projections() -> Pair:
    before = Crosswise(False, 0.25)
    return Pair(before, FusedQkv(before, (0, 1, 2)), (randn(2, 8, 32),), SAME)


@case
def fused_projections_split_in_the_wrong_order() -> Pair:
    before = Crosswise(False, 0.25)
    return Pair(before, FusedQkv(before, (0, 2, 1)), (randn(2, 8, 32),), "semantic")


@case
def difference_that_only_an_argmax_hides() -> Pair:
    w = randn(50, 32)
    before = module(lambda m, x: (F.linear(x, m.w) * 1.0).argmax(-1), w=w)
    after = module(lambda m, x: (F.linear(x, m.w) * 1.001).argmax(-1), w=w)
    return Pair(before, after, (randn(2, 8, 32),), "semantic", says="masked")


# --- cancellation, narrow ranges, defaults that depend on a dtype -----------------------------------------------------


def _variance(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)).pow(2).mean(-1)


@case
def cancellation_is_too_coarse_but_no_other_function() -> Pair:
    one_pass = module(lambda m, x: x.pow(2).mean(-1) - x.mean(-1).pow(2))
    return Pair(module(_variance), one_pass, (randn(4, 256) + 100,), "precision")


@case
def cancellation_with_another_divisor() -> Pair:
    biased = module(lambda m, x: (x.pow(2).mean(-1) - x.mean(-1).pow(2)) * (256 / 255))
    return Pair(module(_variance), biased, (randn(4, 256) + 100,), "semantic")


def _tiny_product(first: bool) -> Callable[..., torch.Tensor]:
    return lambda m, x: ((x * 1e-3) @ m.w if first else (x @ m.w) * 1e-3) * 1e4


@case
def float16_subnormals_in_another_order() -> Pair:
    w, x = randn(256, 64).half(), (randn(4, 256, seed=1) * 1e-4).half()
    return Pair(module(_tiny_product(True), w=w), module(_tiny_product(False), w=w), (x,), "rounding")


@case
def float16_subnormals_for_float32() -> Pair:
    w, x = randn(256, 64), randn(4, 256, seed=1) * 1e-4
    low = module(lambda m, x: (((x.half() * 1e-3) @ m.w) * 1e4).float(), w=w.half())
    return Pair(module(_tiny_product(True), w=w), low, (x,), "precision")


def _hand_norm(eps: float) -> Callable[..., torch.Tensor]:
    return lambda m, x: (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(BF16)


@case
def rms_norm_without_epsilon() -> Pair:
    before = module(lambda m, x: F.rms_norm(x, (64,)))
    return Pair(before, module(_hand_norm(torch.finfo(FP32).eps)), (randn(4, 64, dtype=BF16) * 1e-3,), SAME)


@case
def rms_norm_with_the_epsilon_of_another_dtype() -> Pair:
    before = module(lambda m, x: F.rms_norm(x, (64,)))
    return Pair(before, module(_hand_norm(torch.finfo(BF16).eps)), (randn(4, 64, dtype=BF16),), "semantic")


def _log_softmax(size: float, verdict: object) -> Pair:
    before, after = module(lambda m, x: F.log_softmax(x, -1)), module(lambda m, x: torch.softmax(x, -1).log())
    return Pair(before, after, (torch.linspace(0, size, 256).reshape(4, 64),), verdict)  # type: ignore[arg-type]


@case
def log_of_softmax() -> Pair:
    return _log_softmax(20.0, "rounding")


@case
def log_of_softmax_where_it_is_too_coarse() -> Pair:
    return _log_softmax(390.0, "precision")


@case
def log_of_softmax_where_it_underflows() -> Pair:
    return _log_softmax(4000.0, "nonfinite")


# --- what is handed through -------------------------------------------------------------------------------------------


@case
def inputs_returned_in_another_order() -> Pair:
    before, after = module(lambda m, x, y: (x, y, x + y)), module(lambda m, x, y: (y, x, x + y))
    return Pair(before, after, (randn(4, 8), randn(4, 8, seed=1)), "semantic")


@case
def another_weight_returned() -> Pair:
    returned = lambda m, x: (m.w, x * 2)  # noqa: E731
    return Pair(module(returned, w=randn(4)), module(returned, w=randn(4) * 2), (randn(4),), "semantic")


@case
def an_operation_that_should_do_nothing() -> Pair:
    return Pair(module(lambda m, x: x), module(lambda m, x: (x + 1e4) - 1e4), (randn(4, 8),), "precision")


# --- where neighbouring tools fail ------------------------------------------------------------------------------------


@case
def in_place_operations_against_their_functional_form() -> Pair:
    def in_place(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, m.w)
        h.add_(1.0)
        h[..., :4].mul_(0.5)
        return h.sin()

    def functional(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, m.w) + 1.0
        return torch.cat([h[..., :4] * 0.5, h[..., 4:]], -1).sin()

    w = randn(8, 8)
    return Pair(module(in_place, w=w), module(functional, w=w), (randn(4, 8),), SAME)


@case
def nan_on_both_sides() -> Pair:
    before = module(lambda m, x: torch.log(x) * 2)
    after = module(lambda m, x: torch.log(x) + torch.log(x))
    return Pair(before, after, (randn(4, 8),), SAME)


@case
def values_mirrored_and_negated() -> Pair:
    return Pair(module(lambda m, x: x.sin()), module(lambda m, x: -x.sin().flip(-1)), (randn(4, 8),), "semantic")


@case
def one_element_of_a_million() -> Pair:
    w = torch.ones(1000, 1000)
    wrong = w.clone()
    wrong[500, 500] = 1.09
    multiply = lambda m, x: x * m.w  # noqa: E731
    return Pair(module(multiply, w=w), module(multiply, w=wrong), (torch.ones(1000, 1000),), "semantic")


@case
def another_dtype_and_a_zeroed_weight() -> Pair:
    w = randn(8, 8)
    wrong = w.clone()
    wrong[2] = 0
    linear = lambda m, x: F.linear(x.to(m.w.dtype), m.w)  # noqa: E731
    return Pair(module(linear, w=w), module(linear, w=wrong.to(BF16)), (randn(4, 8),), "semantic")


@case
def float64_for_float32() -> Pair:
    w = randn(8, 8)
    linear = lambda m, x: F.linear(x.to(m.w.dtype), m.w).relu()  # noqa: E731
    return Pair(module(linear, w=w), module(linear, w=w.double()), (randn(4, 8),), "rounding")


def test_nothing_compared_is_no_pass() -> None:
    report = graphprobe.diff(module(lambda m, x: x), module(lambda m, x: x), (randn(4),))
    assert report.verdict == "unknown" and not report.ok and report.exit_code == 2


def test_a_constant_in_16_bits_says_what_it_may_hide() -> None:
    before = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    nn.init.uniform_(before[1].running_var, 0.5, 2.0)
    after = nn.Sequential(fuse_conv_bn_eval(copy.deepcopy(before[0]), copy.deepcopy(before[1])), nn.ReLU()).eval()
    pair = Pair(before.to(BF16), after.to(BF16), (randn(2, 3, 8, 8, dtype=BF16),), "rounding")
    report = pair.check()
    assert any("would not show" in region.note for region in report.regions)


def test_the_better_side_is_named() -> None:
    mask = torch.full((16, 16), -torch.inf)
    qkv = tuple(randn(1, 2, 16, 16, seed=i) for i in range(3))
    report = graphprobe.diff(module(_eager(0.25), mask=mask), module(_sdpa, mask=mask), qkv)
    assert report.verdict == "rounding"
    assert [f.better for f in report.findings] == ["after"] and "NaN" in report.findings[0].hint


def test_attention_whose_mask_is_a_named_argument_is_exact() -> None:
    class Attend(torch.nn.Module):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.fused = fused

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            if self.fused:
                return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=0.25)
            return torch.softmax(x @ x.transpose(-1, -2) * 0.25 + mask, -1) @ x

    inputs = (torch.randn(1, 2, 8, 16).bfloat16(), torch.randn(1, 1, 8, 8).bfloat16())
    before = graphprobe.capture(Attend(False), inputs)
    after = graphprobe.capture(Attend(True), inputs)
    for node in after.graph.nodes:
        if "scaled_dot" in node.name and len(node.args) > 3:
            node.kwargs = {**node.kwargs, "attn_mask": node.args[3]}
            node.args = node.args[:3]
    after.recompile()
    report = graphprobe.diff(before, after, inputs)
    assert report.verdict == "rounding"
    assert all(row.exact is not None and row.exact < 1e-12 for row in report.regions)


def test_what_differs_and_cannot_be_judged_is_not_called_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(30):  # so much else agrees that coverage alone would not tell
                x = torch.tanh(x) + 0.5
            return torch.relu(x * self.by)

    def fails(*_: object) -> None:
        raise RuntimeError("no such kernel")

    before, after, x = Scaled(2.0), Scaled(2.1), torch.linspace(-1, 1, 64)
    assert graphprobe.diff(before, after, (x,)).verdict == "semantic"
    monkeypatch.setattr("graphprobe.judge.same.compare", fails)
    report = graphprobe.diff(before, after, (x,))
    assert report.verdict == "unknown" and report.coverage.resolution >= 0.9
    assert any("could not be judged" in note and "no such kernel" in note for note in report.notes)

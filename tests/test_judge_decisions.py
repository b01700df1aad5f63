"""Rules 3 and 6: decisions on ties, operators without a float64 form, control flow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprobe
from graphprobe import errors
from graphprobe.lanes import exact
from judge_tools import Pair, module, randn

SAME = ("identical", "rounding")
HALVES = torch.arange(-32, 32).float().reshape(4, 16) * 0.5
Forward = Callable[..., object]


def check(before: Forward, after: Forward, x: torch.Tensor, verdict: object, rule: str = "", **w: torch.Tensor) -> None:
    Pair(module(before, **w), module(after, **w), (x,), verdict, rule).check()  # type: ignore[arg-type]


def test_exact_halves_may_go_either_way() -> None:
    up, even = (lambda m, x: torch.floor(x + 0.5) * 2), (lambda m, x: torch.round(x) * 2)
    check(even, up, HALVES, "rounding", "6 tie")
    check(even, lambda m, x: torch.floor(x) * 2, randn(4, 16), "semantic")
    check(lambda m, x: torch.round(x).long(), lambda m, x: x.long(), randn(4, 16), "semantic")


def test_equal_scores_may_go_either_way() -> None:
    scores = torch.zeros(8, 16)
    scores[:, [3, 9]] = 1
    last = lambda m, x: 15 - x.flip(-1).argmax(-1)  # noqa: E731
    check(lambda m, x: x.argmax(-1), last, scores, "rounding", "6 tie")
    check(lambda m, x: x.argmax(-1), lambda m, x: x.flip(-1).argmax(-1), randn(8, 16), "semantic")


def test_near_ties_in_bf16_and_a_wrong_score() -> None:
    w, x = randn(64, 64, dtype=torch.bfloat16), randn(256, 64, seed=1, dtype=torch.bfloat16)
    gain = torch.cat([torch.ones(63), torch.tensor([1.3])]).to(torch.bfloat16)
    choose = lambda m, x: (x @ m.w).argmax(-1)  # noqa: E731
    split = lambda m, x: (x[:, :32] @ m.w[:32] + x[:, 32:] @ m.w[32:]).argmax(-1)  # noqa: E731
    check(choose, split, x, SAME, w=w)
    check(choose, lambda m, x: ((x @ m.w) * m.g).argmax(-1), x, "semantic", w=w, g=gain)


def _defined() -> None:
    if hasattr(torch.ops.graphprobe_judge, "fused"):
        return

    @torch.library.custom_op("graphprobe_judge::fused", mutates_args=())
    def fused(x: torch.Tensor, w: torch.Tensor, scale: float) -> torch.Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("no kernel for float64")
        return F.silu(x @ w.t() * scale)

    @fused.register_fake
    def _(x: torch.Tensor, w: torch.Tensor, scale: float) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], w.shape[0])


def test_an_opaque_operator_is_judged_by_statistics_and_exactly_once_it_has_a_rule() -> None:
    _defined()
    w, x = randn(32, 64) * 0.1, randn(4, 8, 64, seed=1)
    plain = module(lambda m, x: F.silu(F.linear(x, m.w) * 0.5).sin(), w=w)

    def opaque(scale: float) -> nn.Module:
        return module(lambda m, x: torch.ops.graphprobe_judge.fused(x, m.w, scale).sin(), w=w)

    Pair(plain, opaque(0.5), (x,), SAME).check()
    Pair(plain, opaque(0.55), (x,), "semantic", "3 no float64 form").check()
    Pair(opaque(0.6), plain, (x,), "semantic", "3 no float64 form").check()
    try:
        graphprobe.exact_rule(torch.ops.graphprobe_judge.fused)(lambda x, w, scale: F.silu(x @ w.t() * scale))
        Pair(plain, opaque(0.5), (x,), SAME).check()
        Pair(plain, opaque(0.5001), (x,), "semantic", "1 same function").check()
    finally:
        exact.RULES.pop("graphprobe_judge::fused")


def test_a_rule_needs_an_operator() -> None:
    with pytest.raises(errors.InputError, match=r"torch\.ops\.mine\.fused"):
        graphprobe.exact_rule("fused")


def test_the_bodies_of_control_flow_are_lifted() -> None:
    def branch(gain: float) -> Forward:
        return lambda m, x: torch.cond(x.sum() > 0, lambda t: (t @ m.w).sin() * gain, lambda t: (t @ m.w).cos(), (x,))

    def narrow(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        low = torch.bfloat16
        return torch.cond(x.sum() > 0, lambda t: (t.to(low) @ m.w.to(low)).float().sin(), lambda t: t @ m.w, (x,))

    w, x = randn(8, 8), randn(4, 8, seed=1).abs()
    check(branch(1.0), branch(1.0), x, SAME, w=w)
    check(branch(1.0), branch(1.0001), x, "semantic", w=w)
    check(lambda m, x: (x @ m.w).sin(), narrow, x, "precision", w=w)

"""What a defect looks like is measured and said: every kind that shows a signature, with numbers, never as a fact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprobe
from graphprobe import errors
from judge_tools import module, randn

BF16, FP32 = torch.bfloat16, torch.float32
Forward = Callable[..., Any]
#: name -> (before, after, inputs, tensors of before, other tensors of after, what the hint says)
CASES: dict[str, tuple[Forward, Forward, tuple[torch.Tensor, ...], dict[str, Any], dict[str, Any], str]] = {}

X = randn(2, 8, 32)
SCORES = tuple(randn(2, 4, 8, 8, seed=i) for i in range(3))


def case(
    name: str, before: Forward, after: Forward, says: str, *args: torch.Tensor, other: dict[str, Any] | None = None,
    **tensors: torch.Tensor,
) -> None:  # fmt: skip
    CASES[name] = (before, after, args or (X,), tensors, other or {}, says)


def norm(eps: float = 1e-6, plus_one: bool = False) -> Forward:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return y * (1 + m.w if plus_one else m.w)

    return forward


def attention(scale: float = 0.25, shift: int = 1) -> Forward:
    def forward(m: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        hidden = torch.ones(8, 8).triu(shift) > 0
        score = (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
        return torch.softmax(score, -1) @ v

    return forward


def sdpa(m: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.mask)


W, SMALL = randn(32, 32) * 0.2, randn(32, seed=5) * 0.1 + 1
CAUSAL = torch.ones(8, 8).tril() > 0
ROUNDED = (randn(32, 32, seed=7).abs().amax(1, True) / 127, randn(32, 32, seed=7))

# scales: constant ratios, and the argument of an operator that stands on both sides
case("scale missing", lambda m, x: torch.tanh(x * 0.125), lambda m, x: torch.tanh(x), "missing scale")
case("scale missing in a kernel", lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.125),
     lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0), "missing scale", *SCORES)  # fmt: skip
case("scale inverted", lambda m, x: (x * 0.125).sin(), lambda m, x: (x * 8.0).sin(), "inverted scale")
case("d for its root", lambda m, x: (x * 0.125).sin(), lambda m, x: (x * 0.125**2).sin(), "root")
case("another constant", lambda m, x: (x * 0.125).sin(), lambda m, x: (x * 0.12).sin(), "another constant")
case("sign", lambda m, x: torch.sin(x @ m.w), lambda m, x: torch.sin(-(x @ m.w)), "flipped sign", w=W)
case("sum taken twice", lambda m, x: torch.stack([x, x.cos()]).sum(0).tanh(),
     lambda m, x: torch.stack([torch.stack([x, x.cos()]).sum(0)] * 4).sum(0).tanh(),
     "doubled sum (4 times")  # fmt: skip
case("sum doubled", lambda m, x: (x @ m.w).tanh(), lambda m, x: (x @ m.w + x @ m.w).tanh(), "doubled sum", w=W)
case("channel scale missing", lambda m, x: (F.linear(x, m.w) * m.s).tanh(), lambda m, x: F.linear(x, m.w).tanh(),
     "missing scale", w=W, s=SMALL)  # fmt: skip
case("channel scale of other rows", lambda m, x: (F.linear(x, m.w) * m.s).tanh(),
     lambda m, x: (F.linear(x, m.w) * m.s).tanh(), "another scale of every channel",
     other={"s": SMALL * 0.5 + SMALL.roll(1) * 0.5}, w=W, s=SMALL)  # fmt: skip

# addends
case("bias dropped", lambda m, x: F.linear(x, m.w, m.b).tanh(), lambda m, x: F.linear(x, m.w).tanh(),
     "missing addend", w=W, b=SMALL)  # fmt: skip
case("residual dropped", lambda m, x: (x + F.linear(x, m.w)).tanh(), lambda m, x: F.linear(x, m.w).tanh(),
     "missing addend", w=W)  # fmt: skip
case("one not added to a norm's weight", norm(plus_one=True), norm(), "missing addend", w=SMALL)
case("added by every rank", lambda m, x: (F.linear(x, m.w) + x).tanh(),
     lambda m, x: (F.linear(x, m.w) + x * 8).tanh(), "8 times", w=W)  # fmt: skip

# epsilons
case("epsilon", norm(1e-6), norm(1e-5), "wrong epsilon", w=SMALL)
case("epsilon of a kernel", lambda m, x: F.layer_norm(x, (32,), m.w, eps=1e-5),
     lambda m, x: F.layer_norm(x, (32,), m.w, eps=1e-6), "wrong epsilon", w=SMALL)  # fmt: skip
case("epsilon of another form", norm(1e-2), lambda m, x: F.rms_norm(x, (32,), m.w, 1e-3), "wrong epsilon", w=SMALL)

# orders
case("heads permuted", lambda m, x: F.linear(x, m.w).unflatten(-1, (4, 8)).tanh(),
     lambda m, x: F.linear(x, m.w).unflatten(-1, (4, 8))[..., [2, 0, 3, 1], :].tanh(), "permuted", w=W)  # fmt: skip
case("blocks in another order", lambda m, x: torch.cat([x.sin(), x.cos(), x.tanh()], -1) * 2,
     lambda m, x: torch.cat([x.cos(), x.tanh(), x.sin()], -1) * 2, "order")  # fmt: skip
case("interleaved for halves", lambda m, x: torch.stack([x.sin(), x.cos()], -1).flatten(-2),
     lambda m, x: torch.cat([x.sin(), x.cos()], -1), "interleaved")  # fmt: skip
case("wrong split order", lambda m, x: F.linear(x, m.w).chunk(2, -1)[0].tanh(),
     lambda m, x: F.linear(x, m.w).chunk(2, -1)[1].tanh(), "wrong split order", w=W)  # fmt: skip
case("slice off by one", lambda m, x: x.cos()[:, 1:7].tanh(), lambda m, x: x.cos()[:, 0:6].tanh(), "off by one")
case("transposed", lambda m, x: (x @ m.w @ x.transpose(-1, -2)).tanh(),
     lambda m, x: (x @ m.w @ x.transpose(-1, -2)).transpose(-1, -2).tanh(), "transpose", w=W)  # fmt: skip
case("view of the wrong dimensions", lambda m, x: x.cos().transpose(1, 2).reshape(2, 8, 32) * 2,
     lambda m, x: x.cos().reshape(2, 8, 32) * 2, "wrong dimensions")  # fmt: skip
case("gate and up swapped", lambda m, x, y: F.silu(x) * y, lambda m, x, y: F.silu(y) * x, "swapped operands",
     X, randn(2, 8, 32, seed=3))  # fmt: skip

# masks
case("mask off by one", attention(), attention(shift=2), "off by one", *SCORES)
case("mask off by one in a kernel", sdpa, sdpa, "off by one", *SCORES,
     other={"mask": torch.ones(8, 8).tril(1) > 0}, mask=CAUSAL)  # fmt: skip
case("mask of a kernel forgotten", sdpa, lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v),
     "missing or a wider mask", *SCORES, mask=CAUSAL)  # fmt: skip
case("boolean mask added", lambda m, x: torch.softmax(x.masked_fill(~m.mask, float("-inf")), -1),
     lambda m, x: torch.softmax(x + m.mask, -1), "boolean mask that is added", SCORES[0], mask=CAUSAL)  # fmt: skip
case("fill value that hides nothing", lambda m, x: torch.softmax(x.masked_fill(~m.mask, -1e38), -1),
     lambda m, x: torch.softmax(x.masked_fill(~m.mask, 1e-38), -1), "hides nothing",
     SCORES[0], mask=CAUSAL)  # fmt: skip
case("mask forgotten", lambda m, x: torch.softmax(x.masked_fill(~m.mask, -1e38), -1),
     lambda m, x: torch.softmax(x, -1), "missing mask", SCORES[0], mask=CAUSAL)  # fmt: skip

# weights
case("weight zero", lambda m, x: F.linear(x, m.w).tanh(), lambda m, x: F.linear(x, m.w).tanh(), "zero everywhere",
     other={"w": torch.zeros(32, 32)}, w=W)  # fmt: skip
case("weight never loaded", lambda m, x: F.linear(x, m.w).tanh(), lambda m, x: F.linear(x, m.w).tanh(),
     "never loaded", other={"w": randn(32, 32, seed=9)}, w=W)  # fmt: skip
case("weight transposed", lambda m, x: F.linear(x, m.w).tanh(), lambda m, x: F.linear(x, m.w).tanh(),
     "transposed weight", other={"w": W.t().contiguous()}, w=W)  # fmt: skip
case("weight of another layer", lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.u).tanh(),
     lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.u).tanh(), "another layer's weight",
     other={"u": W.clone()}, w=W, u=randn(32, 32, seed=4))  # fmt: skip
case("adapter merged twice", lambda m, x: F.linear(x, m.w).tanh(), lambda m, x: F.linear(x, m.w).tanh(), "rank 2",
     other={"w": W + randn(32, 2, seed=1) @ randn(2, 32, seed=2) * 0.1}, w=W)  # fmt: skip
case("wrong rows", lambda m, x: F.linear(x, m.w).tanh(), lambda m, x: F.linear(x, m.w).tanh(), "wrong rows",
     other={"w": torch.cat([W[:3] * 1.5, W[3:]])}, w=W)  # fmt: skip
case("rows of a weight permuted", lambda m, x: F.linear(x, m.w).tanh(), lambda m, x: F.linear(x, m.w).tanh(),
     "of the weight w", other={"w": torch.cat([W[16:], W[:16]])}, w=W)  # fmt: skip

# scales and bytes of codes
CODES = (W / (W.abs().amax(1, True) / 127)).round().to(torch.int8)
SCALE = W.abs().amax(1, True) / 127


def coded(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, m.c.float() * m.s).tanh()


def plain(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, m.w).tanh()


case("scale of codes inverted", plain, coded, "inverted scale", other={"c": CODES, "s": 1 / SCALE}, w=W)
case("scale of codes missing", plain, coded, "missing scale", other={"c": CODES, "s": torch.ones(32, 1)}, w=W)
case(
    "scale of codes of other rows", plain, coded, "scale of other rows", other={"c": CODES, "s": SCALE.roll(1, 0)}, w=W
)
case("scale of codes transposed", plain, coded, "transposed scale", other={"c": CODES, "s": SCALE.t()}, w=W)
case("one scale for all", plain, coded, "one scale used for all", other={"c": CODES, "s": SCALE[:1].expand(32, 1)}, w=W)
FLOAT8 = (W / (W.abs().amax() / 448)).to(torch.float8_e4m3fn).view(torch.uint8)
case("to for view", plain, lambda m, x: F.linear(x, m.c.to(torch.float8_e4m3fn).float() * m.s).tanh(),
     "looks like .to() where .view() was meant", other={"c": FLOAT8, "s": W.abs().amax() / 448}, w=W)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_defect_is_named_by_its_signature(name: str) -> None:
    before, after, args, tensors, other, says = CASES[name]
    mine = {k: v for k, v in tensors.items() if k not in other}
    report = graphprobe.diff(module(before, **tensors), module(after, **{**mine, **other}), args)
    told = [(f.kind, f.op, f.rule, f.hint) for f in report.findings]
    assert report.verdict == "semantic", told
    assert any(f.hint.startswith("looks like") and says in f.hint for f in report.findings), told
    assert not any(" is a " in f.hint.split(":")[0] for f in report.findings), told  # never as a fact


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_head_that_is_no_longer_tied(dtype: torch.dtype) -> None:
    class Model(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
            self.table.weight = nn.Parameter(randn(40, 16, dtype=dtype))
            self.head.weight = self.table.weight if tied else nn.Parameter(randn(40, 16, seed=1, dtype=dtype))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(tokens).tanh())

    report = graphprobe.diff(Model(True), Model(False), (torch.arange(12).reshape(2, 6),))
    assert report.first is not None and "not tied" in report.first.hint


def test_a_weight_on_the_meta_device() -> None:
    before = module(plain, w=W)
    after = graphprobe.capture(before, (X,))
    after.w = torch.empty(32, 32, device="meta")
    report = graphprobe.diff(before, after, (X,))
    assert report.verdict == "structural" and report.exit_code == 1
    assert report.first is not None and "w is on the meta device" in report.first.hint
    assert "checkpoint" in report.first.explanation
    half = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, device="meta"))
    with pytest.raises(errors.CaptureError, match=r"load 1\.weight, 1\.bias, which is still on the meta device"):
        graphprobe.capture(half, (X,))


def test_an_explanation_has_two_sentences_numbers_and_a_next_step() -> None:
    report = graphprobe.diff(module(attention()), module(attention(scale=0.2525)), SCORES)
    finding = report.first
    assert finding is not None
    assert f"{finding.exact:.1e}" in finding.explanation and f"{finding.introduced:.1e}" in finding.explanation
    assert "Next" in finding.explanation
    assert 2 <= finding.explanation.count(". ") + 1 <= 4


def test_what_differs_in_masked_elements_alone_is_not_said_to_differ_by_zero() -> None:
    def added(shift: int) -> Forward:
        hidden = torch.full((8, 8), float("-inf"))
        return lambda m, x: torch.softmax(x + hidden.triu(shift), -1)

    report = graphprobe.diff(module(added(1)), module(added(2)), (SCORES[0],))
    first = report.first
    assert first is not None and first.kind == "semantic" and first.exact == 0
    assert "masked" in first.explanation and "differ by 0" not in first.explanation


def test_a_benign_change_looks_like_nothing() -> None:
    report = graphprobe.diff(module(sdpa, mask=CAUSAL), module(attention(8**-0.5)), SCORES)
    assert report.ok and not any("looks like" in f.hint for f in report.findings)

"""Rule 5 on rewrites whose halves stand far apart: they compensate, or one of them is wrong by a little."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from judge_tools import Pair, module, randn

SAME = ("identical", "rounding")
WIDTH, INNER, TOKENS = 32, 48, 8
CASES: dict[str, Callable[[], Pair]] = {}
Weights = dict[str, torch.Tensor]


def case(make: Callable[[], Pair]) -> Callable[[], Pair]:
    CASES[make.__name__.replace("_", " ")] = make
    return make


@pytest.mark.parametrize("name", CASES)
def test_halves(name: str) -> None:
    CASES[name]().check()


def pair(forward: Callable[..., torch.Tensor], before: Weights, after: Weights, verdict: str | tuple[str, ...]) -> Pair:
    return Pair(module(forward, **before), module(forward, **after), (randn(2, TOKENS, WIDTH),), verdict)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return randn(*shape, seed=seed) / 5


# --- attention --------------------------------------------------------------------------------------------------------

PROJECTIONS = {name: drawn(i, WIDTH, WIDTH) for i, name in enumerate("qkvo", 2)}
GAIN = randn(WIDTH, seed=1).abs() + 0.5
HEADS = (torch.tensor([2, 0, 3, 1])[:, None] * 8 + torch.arange(8)).flatten()


def attention(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = F.rms_norm(x, (WIDTH,), m.g, 1e-6)
    q, k, v = (F.linear(h, w).view(2, TOKENS, 4, 8).transpose(1, 2) for w in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)
    return F.linear(y.transpose(1, 2).reshape(2, TOKENS, WIDTH), m.o)


def attention_pair(verdict: str | tuple[str, ...], **changed: torch.Tensor) -> Pair:
    before = {"g": GAIN, **PROJECTIONS}
    return pair(attention, before, {**before, **changed}, verdict)


def scaled_rows(name: str, gain: torch.Tensor = GAIN) -> torch.Tensor:
    return PROJECTIONS[name] * gain


@case
def gain_of_a_norm_folded_into_three_projections() -> Pair:
    return attention_pair(SAME, g=torch.ones(WIDTH), q=scaled_rows("q"), k=scaled_rows("k"), v=scaled_rows("v"))


@case
def gain_folded_into_two_of_three() -> Pair:
    return attention_pair("semantic", g=torch.ones(WIDTH), q=scaled_rows("q"), k=scaled_rows("k"))


@case
def gain_folded_with_one_channel_wrong() -> Pair:
    wrong = torch.where(torch.arange(WIDTH) == 5, GAIN * 1.001, GAIN)
    return attention_pair(
        "semantic", g=torch.ones(WIDTH), q=scaled_rows("q"), k=scaled_rows("k"), v=scaled_rows("v", wrong)
    )


@case
def queries_and_keys_negated() -> Pair:
    return attention_pair(SAME, q=-PROJECTIONS["q"], k=-PROJECTIONS["k"])


@case
def only_queries_negated() -> Pair:
    return attention_pair("semantic", q=-PROJECTIONS["q"])


@case
def heads_in_another_order() -> Pair:
    p = PROJECTIONS
    return attention_pair(SAME, q=p["q"][HEADS], k=p["k"][HEADS], v=p["v"][HEADS], o=p["o"][:, HEADS])


@case
def heads_in_another_order_but_the_values() -> Pair:
    p = PROJECTIONS
    return attention_pair("semantic", q=p["q"][HEADS], k=p["k"][HEADS], o=p["o"][:, HEADS])


@case
def values_scaled_and_unscaled() -> Pair:
    return attention_pair(SAME, v=PROJECTIONS["v"] * 3, o=PROJECTIONS["o"] / 3)


@case
def values_scaled_and_unscaled_by_a_little_less() -> Pair:
    return attention_pair("semantic", v=PROJECTIONS["v"] * 3, o=PROJECTIONS["o"] / 3.003)


# --- feed-forward -----------------------------------------------------------------------------------------------------

FEED = {"g": drawn(11, INNER, WIDTH), "u": drawn(12, INNER, WIDTH), "d": drawn(13, WIDTH, INNER)}
ORDER = torch.randperm(INNER, generator=torch.Generator().manual_seed(0))
SMOOTH = randn(INNER, seed=8).abs() + 0.5


def feed_forward(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + F.linear(F.silu(F.linear(x, m.g)) * F.linear(x, m.u), m.d)


def feed_pair(verdict: str | tuple[str, ...], **changed: torch.Tensor) -> Pair:
    return pair(feed_forward, FEED, {**FEED, **changed}, verdict)


@case
def channels_in_another_order() -> Pair:
    return feed_pair(SAME, g=FEED["g"][ORDER], u=FEED["u"][ORDER], d=FEED["d"][:, ORDER])


@case
def channels_in_another_order_and_two_swapped() -> Pair:
    swapped = ORDER.clone()
    swapped[[0, 1]] = ORDER[[1, 0]]
    return feed_pair("semantic", g=FEED["g"][ORDER], u=FEED["u"][ORDER], d=FEED["d"][:, swapped])


@case
def scales_moved_from_one_weight_to_the_next() -> Pair:
    return feed_pair(SAME, u=FEED["u"] * SMOOTH[:, None], d=FEED["d"] / SMOOTH)


@case
def scales_moved_with_one_wrong() -> Pair:
    wrong = torch.where(torch.arange(INNER) == 9, SMOOTH * 1.005, SMOOTH)
    return feed_pair("semantic", u=FEED["u"] * SMOOTH[:, None], d=FEED["d"] / wrong)


# --- the whole residual stream ----------------------------------------------------------------------------------------

STREAM = {
    "e": drawn(21, WIDTH, WIDTH),
    **{f"u{i}": drawn(22 + i, INNER, WIDTH) for i in range(2)},
    **{f"d{i}": drawn(24 + i, WIDTH, INNER) for i in range(2)},
    "h": drawn(26, 20, WIDTH),
}
ROTATION = torch.linalg.qr(randn(WIDTH, WIDTH, seed=27).double())[0]


def stream(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = F.linear(x, m.e)
    for up, down in ((m.u0, m.d0), (m.u1, m.d1)):
        normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = h + F.linear(F.relu(F.linear(normed, up)), down)
    return F.linear(h, m.h)


def rotated(but: str = "") -> Weights:
    """Rotate what writes to the residual stream and what reads from it."""
    turned = {
        name: ROTATION.t() @ w.double() if name[0] in "ed" else w.double() @ ROTATION for name, w in STREAM.items()
    }
    return {name: STREAM[name] if name == but else w.float() for name, w in turned.items()}


@case
def rotated_stream() -> Pair:
    return pair(stream, STREAM, rotated(), SAME)


@case
def rotated_stream_with_one_weight_left() -> Pair:
    return pair(stream, STREAM, rotated("d1"), "semantic")


# --- what a later operation hides -------------------------------------------------------------------------------------


@case
def logarithm_of_zero_where_it_is_not_taken() -> Pair:
    def guarded(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, torch.log(x.clamp(min=1e-30)), torch.zeros_like(x))

    def bare(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, torch.log(x), torch.zeros_like(x))

    return Pair(module(guarded), module(bare), (torch.relu(randn(4, 8)),), SAME)


@case
def scores_shifted_by_row() -> Pair:
    before, after = module(lambda m, x: x.softmax(-1)), module(lambda m, x: (x + m.c).softmax(-1), c=randn(8, 1))
    return Pair(before, after, (randn(2, 8, 16),), SAME)


@case
def scores_shifted_by_column() -> Pair:
    before, after = module(lambda m, x: x.softmax(-1)), module(lambda m, x: (x + m.c).softmax(-1), c=randn(16) * 1e-3)
    return Pair(before, after, (randn(2, 8, 16),), "semantic")


# --- layouts that nobody meant ----------------------------------------------------------------------------------------


def scores(turned: bool) -> Callable[..., torch.Tensor]:
    """Softcapped scores, [heads, tokens, tokens]; `turned` transposes them by mistake, and nothing turns them back."""

    def forward(m: torch.nn.Module, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        s = q @ k.transpose(-1, -2)
        s = s.transpose(-1, -2) if turned else s
        s = torch.tanh(s * 0.3 / 5.0) * 5.0
        return torch.softmax(s + m.mask, -1)

    return forward


def test_a_transposed_value_is_blamed_where_it_was_transposed() -> None:
    mask = torch.full((12, 12), torch.finfo(torch.float32).min).triu(1)
    before, after = module(scores(False), mask=mask), module(scores(True), mask=mask)
    args = randn(4, 12, 8), randn(4, 12, 8, seed=1)
    report = Pair(before, after, args, "semantic").check()
    (finding,) = report.findings
    assert finding.op == "aten.transpose.int" and len(finding.after) <= 9

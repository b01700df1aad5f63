"""Rows in which all is masked: nobody means what they hold. They are left out and counted; a mask that hides less than
it should is still found, in those rows, too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphprobe
from graphprobe.records import Report

F = nn.functional
LOWEST = "lowest"
Place = tuple[int, int]
#: What becomes of scores: with the mask as numbers to add, as ones where something is hidden, and as the number itself.
WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "added": lambda score, added, hidden, fill: score + added,
    "added first": lambda score, added, hidden, fill: added + score,
    "filled": lambda score, added, hidden, fill: score.masked_fill(hidden.bool(), fill),
    "subtracted": lambda score, added, hidden, fill: score - hidden * -fill,
    "subtracted from": lambda score, added, hidden, fill: -((-added) - score),
    "times a number": lambda score, added, hidden, fill: torch.add(score, hidden, alpha=fill),
    "less times a number": lambda score, added, hidden, fill: torch.sub(score, hidden, alpha=-fill),
    "multiplied and added": lambda score, added, hidden, fill: torch.addcmul(score, hidden, hidden * fill),
    "kept and filled": lambda score, added, hidden, fill: score * (1 - hidden) + fill * hidden,
    "added before the scale": lambda score, added, hidden, fill: (score * 4 + added) * 0.25,
}


class Attention(nn.Module):
    """Attention with the mask added, filled in, or given to the fused operator; `leak` is a place let through."""

    def __init__(self, how: str, fill: float, leak: Place | None = None) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.how, self.fill, self.leak = how, fill, leak

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.query, self.key, self.value))
        if self.leak is not None:
            rows = torch.arange(x.shape[1])
            keep = keep | ((rows == self.leak[0])[:, None] & (rows == self.leak[1]))
        added = torch.zeros_like(keep, dtype=x.dtype).masked_fill(~keep, self.fill)
        hidden = (~keep).to(x.dtype)
        if self.how == "flash":  # an operator with two results
            y = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=added)[0]
        elif self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        elif self.how == "fused, added":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        else:
            score = q @ k.transpose(-1, -2) * 8**-0.5
            score = WAYS[self.how](score, added, hidden, self.fill)
            y = torch.softmax(score.float(), -1).to(x.dtype) @ v
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


EMPTY, PARTLY = 7, 6  # a query that sees nothing, and one that sees what came before


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding to the left of one text, and a query of the other that may look at nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        keep = torch.ones(12, 12, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
        keep[0, :, :, :4] = False
        keep[1, :, EMPTY] = False
        return torch.randn(2, 12, 32).to(dtype), keep


def model(dtype: torch.dtype, how: str, fill: float | str, leak: Place | None = None) -> nn.Module:
    lowest = torch.finfo(dtype).min
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Attention(how, lowest if isinstance(fill, str) else fill, leak).to(dtype).eval()


def compare(dtype: torch.dtype, before: Any, after: Any, leak: Place | None = None) -> Report:
    return graphprobe.diff(model(dtype, *before), model(dtype, *after, leak), inputs(dtype))


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FILLS = (LOWEST, -1e4, -1e9)
#: float16 holds no -1e9.
CASES = [(d, f) for d, f in itertools.product(DTYPES, FILLS) if not (d == torch.float16 and f == -1e9)]
HOWS = (*(way for way in WAYS if way != "added"), "fused", "fused, added", "flash")
PLACES = [(PARTLY, 9), (EMPTY, 3)]


#: Every way meets every dtype, and every fill somewhere.
HONEST = [(*case, how) for i, case in enumerate(CASES) for j, how in enumerate(HOWS) if (i + j) % 3 == 0]


@pytest.mark.parametrize(("dtype", "fill", "how"), HONEST, ids=str)
def test_rows_that_see_nothing_are_nobodys_concern(dtype: torch.dtype, fill: float | str, how: str) -> None:
    report = compare(dtype, ("added", fill), (how, LOWEST if how == "filled" else fill))
    assert report.verdict in ("identical", "rounding"), report.to_json()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["fused", "flash"])
def test_they_are_counted_as_left_out(how: str, dtype: torch.dtype) -> None:
    fill = LOWEST if how == "fused" else -1e9 if dtype == torch.float32 else -1e4  # flash agrees on the lowest
    report = compare(dtype, ("added", fill), (how, fill))
    assert report.coverage.dont_care == 5 * 32  # rows of the attention's output: 4 of padding, and one
    assert any("fully masked rows are left out" in row.note for row in report.regions)


LEAKS = [
    (*case, HOWS[(5 * i + j) % len(HOWS)], place) for i, case in enumerate(CASES) for j, place in enumerate(PLACES)
]
LEAKS += [(torch.bfloat16, LOWEST, how, place) for how in ("flash", "subtracted", "fused") for place in PLACES]


@pytest.mark.parametrize(("dtype", "fill", "how", "place"), LEAKS, ids=str)
def test_a_mask_that_lets_something_through_is_found(
    dtype: torch.dtype, fill: float | str, how: str, place: Place
) -> None:
    report = compare(dtype, ("added", fill), (how, LOWEST if how == "filled" else fill), leak=place)
    assert report.verdict == "semantic", report.to_json()


CAUSAL = torch.ones(12, 12, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
#: Where every query sees something, what is hidden may hold any number.
PAIRS = [
    ((HOWS[(3 * i) % len(HOWS)], fill), (HOWS[(i + 4) % len(HOWS)], other))
    for i, (fill, other) in enumerate([*itertools.product((-1e4, LOWEST), repeat=2)] * 3)
] + [(("added", -1e4), (how, fill)) for how in ("subtracted", "kept and filled") for fill in (-1e4, LOWEST)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
def test_a_mask_may_hold_any_number_that_hides(dtype: torch.dtype, before: Any, after: Any) -> None:
    report = graphprobe.diff(model(dtype, *before), model(dtype, *after), (inputs(dtype)[0], CAUSAL))
    assert report.verdict in ("identical", "rounding"), report.to_json()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["added", "subtracted", "fused, added"])
def test_a_number_that_does_not_hide_is_found(how: str, dtype: torch.dtype) -> None:
    before, after = model(dtype, "added", LOWEST), model(dtype, how, -5.0)
    report = graphprobe.diff(before, after, (inputs(dtype)[0], CAUSAL))
    assert report.verdict == "semantic", report.to_json()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_that_give_zeros_to_who_sees_nothing_agree(dtype: torch.dtype) -> None:
    report = compare(dtype, ("fused", -math.inf), ("flash", -math.inf))
    assert report.verdict in ("identical", "rounding"), report.to_json()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_no_numbers_are_not_left_out(dtype: torch.dtype) -> None:
    report = compare(dtype, ("added", -1e4), ("filled", -math.inf))
    assert report.verdict in ("nonfinite", "semantic")


def test_a_wrong_scale_beside_rows_that_see_nothing_is_found() -> None:
    before, after = (model(torch.float16, how, LOWEST) for how in ("added", "fused"))
    with torch.no_grad():
        after.query.weight *= 1.002  # type: ignore[operator,union-attr]
    report = graphprobe.diff(before, after, inputs(torch.float16))
    assert report.verdict == "semantic"

"""Rule 2: what is computed too coarsely is said, unless every reader throws those digits away anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from judge_tools import Pair, module, randn

BF16 = torch.bfloat16
Readers = Callable[[nn.Module, torch.Tensor], Any]

#: What is done with a product in float32.
NARROWED: dict[str, Readers] = {
    "one": lambda m, w: w.to(BF16) @ m.v,
    "two": lambda m, w: w.to(BF16) @ m.v + w.to(BF16) @ m.k,
}
KEPT: dict[str, Readers] = {
    "none narrows": lambda m, w: w @ m.v.float(),
    "one of two narrows": lambda m, w: (w.to(BF16) @ m.v, w.log1p()),
    "handed out, too": lambda m, w: (w.to(BF16) @ m.v, w),
}


def pair(readers: Readers, verdict: str, cancels: float = 0.0) -> Pair:
    """A table in float32, and the same as a buffer in bfloat16; `cancels` is taken from the product with it."""

    def forward(m: nn.Module, x: torch.Tensor) -> Any:
        return readers(m, x * m.c - cancels if cancels else x * m.c)

    table = torch.rand(16, generator=torch.Generator().manual_seed(3)) + 0.5
    tensors = {"k": randn(16, 8, seed=1, dtype=BF16) / 4, "v": randn(16, 8, seed=2, dtype=BF16)}
    before, after = (module(forward, c=c, **tensors) for c in (table + cancels, (table + cancels).to(BF16)))
    return Pair(before, after, (randn(2, 12, 16).abs() / 8 + 1,), verdict)


@pytest.mark.parametrize("readers", NARROWED)
def test_digits_that_all_readers_throw_away_are_not_missed(readers: str) -> None:
    pair(NARROWED[readers], "rounding").check()


@pytest.mark.parametrize("readers", KEPT)
def test_digits_that_somebody_reads_are(readers: str) -> None:
    pair(KEPT[readers], "precision").check()


@pytest.mark.parametrize("readers", [*NARROWED, *KEPT])
def test_more_than_they_throw_away_is_lost_for_all(readers: str) -> None:
    pair({**NARROWED, **KEPT}[readers], "precision", cancels=64.0).check()

"""fuse_rotary: the operators afterwards, the numbers, the metadata, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from transform_cases import DECODERS, DTYPES, Case, apply
from transform_tools import reason

CASE = Case(
    "fuse_rotary",
    matches=4,
    change={
        "aten.mul.Tensor": -8,
        "aten.add.Tensor": -4,
        "aten.cat.default": -4,
        "aten.neg.default": -4,
        "aten.slice.Tensor": -8,
        "graphprobe_transforms.rotary.default": 4,
    },
)


@pytest.mark.parametrize("name", DECODERS)
def test_exactly_the_pattern_is_replaced(name: str) -> None:
    CASE.check_operators(name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_it_differs_by_rounding_at_most(name: str, dtype: torch.dtype) -> None:
    assert CASE.verdict(name, dtype) in ("identical", "rounding")


@pytest.mark.parametrize("name", DECODERS)
def test_metadata_is_complete_and_fresh(name: str) -> None:
    CASE.check_metadata(name)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_models_without_the_pattern_are_left_alone(name: str) -> None:
    CASE.check_left_alone(name, "nothing is rotated by halves")


class Uneven(torch.nn.Module):
    """Rotates by a quarter and three quarters in place of halves."""

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat((-x[..., 2:], x[..., :2]), -1) * sin


def test_what_is_not_cut_in_halves_is_a_near_miss_that_is_named() -> None:
    done, _ = apply("fuse_rotary", Uneven(), *(torch.randn(2, 8) for _ in range(3)))
    assert "not the two halves" in reason(done)

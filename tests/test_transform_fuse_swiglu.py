"""fuse_swiglu: the operators afterwards, the numbers, the metadata, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from graphprobe.pipeline import Pipeline
from transform_cases import DECODERS, DTYPES, Case, apply
from transform_tools import captured, matches, reason

CASE = Case(
    "fuse_swiglu",
    matches=2,
    change={"aten.silu.default": -2, "aten.mul.Tensor": -2, "graphprobe_transforms.silu_mul.default": 2},
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
    CASE.check_left_alone(name, "nothing is multiplied with aten.silu")


class Shared(torch.nn.Module):
    """The activation is an output, too."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        active = torch.nn.functional.silu(x)
        return active * y, active


def test_an_activation_that_is_used_elsewhere_is_a_near_miss_that_is_named() -> None:
    done, _ = apply("fuse_swiglu", Shared(), torch.randn(2, 8), torch.randn(2, 8))
    assert "used elsewhere" in reason(done)


def test_two_matches_in_one_layer_after_gate_and_up_are_fused() -> None:
    assert len(matches(Pipeline.parse("fuse_gate_up,fuse_swiglu").run(captured("llama")[0]))) == 2

"""fuse_gate_up: the operators afterwards, the numbers, the metadata, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from transform_cases import DECODERS, DTYPES, Case, apply
from transform_tools import captured, reason

CASE = Case(
    "fuse_gate_up",
    matches=2,
    change={"aten.linear.default": -2, "aten.split_with_sizes.default": 2, "operator.getitem": 4},
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
    CASE.check_left_alone(name, "multiplied with another linear")


class Gated(torch.nn.Module):
    """silu(gate(x)) * up(y): two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(self.gate(x)) * self.up(y)


def test_projections_of_different_inputs_are_a_near_miss_that_is_named() -> None:
    done, _ = apply("fuse_gate_up", Gated(), torch.randn(2, 8), torch.randn(2, 8))
    assert "different inputs" in reason(done)


def test_weights_are_stacked_and_not_kept_twice() -> None:
    before, after = captured("llama")[0], CASE.run("llama").gm
    assert sum(p.numel() for p in after.parameters()) == sum(p.numel() for p in before.parameters())

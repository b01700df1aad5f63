"""fuse_add_rmsnorm: the operators afterwards, the numbers, the metadata, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from graphprobe.pipeline import Pipeline
from transform_cases import DECODERS, DTYPES, Case, apply
from transform_tools import captured, reason

CASE = Case(
    "fuse_add_rmsnorm",
    before="remove_noops,fuse_rmsnorm",
    matches=4,
    change={
        "aten.add.Tensor": -4,
        "aten.rms_norm.default": -4,
        "graphprobe_transforms.add_rms_norm.default": 4,
        "operator.getitem": 7,
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
    CASE.check_left_alone(name, "run fuse_rmsnorm before this")


class Broadcast(torch.nn.Module):
    """The sum broadcasts, which the fused operator does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(8, eps=1e-6)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.norm(x + y)


def test_a_sum_that_broadcasts_is_a_near_miss_that_is_named() -> None:
    done, _ = apply("fuse_add_rmsnorm", Broadcast(), torch.randn(2, 8), torch.randn(8))
    assert "broadcasts" in reason(done)


def test_norms_written_out_are_said_to_need_another_transform_first() -> None:
    assert "run fuse_rmsnorm before this" in reason(Pipeline.parse("fuse_add_rmsnorm").run(captured("llama")[0]))

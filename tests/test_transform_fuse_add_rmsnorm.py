"""fuse_add_rmsnorm: what is its own; what holds of every transform is in test_transforms.py."""

from __future__ import annotations

import torch

from graphprobe.pipeline import Pipeline
from transform_cases import apply
from transform_tools import captured, reason


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

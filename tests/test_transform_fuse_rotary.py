"""fuse_rotary: what is its own; what holds of every transform is in test_transforms.py."""

from __future__ import annotations

import torch

from transform_cases import apply
from transform_tools import reason


class Uneven(torch.nn.Module):
    """Rotates by a quarter and three quarters in place of halves."""

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat((-x[..., 2:], x[..., :2]), -1) * sin


def test_what_is_not_cut_in_halves_is_a_near_miss_that_is_named() -> None:
    done, _ = apply("fuse_rotary", Uneven(), *(torch.randn(2, 8) for _ in range(3)))
    assert "not the two halves" in reason(done)

"""fuse_gate_up: what is its own; what holds of every transform is in test_transforms.py."""

from __future__ import annotations

import torch

from transform_cases import apply, case
from transform_tools import captured, reason


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
    before, after = captured("llama")[0], case("fuse_gate_up").run("llama").gm
    assert sum(p.numel() for p in after.parameters()) == sum(p.numel() for p in before.parameters())

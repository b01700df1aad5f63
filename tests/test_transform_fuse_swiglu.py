"""fuse_swiglu: what is its own; what holds of every transform is in test_transforms.py."""

from __future__ import annotations

import torch

from graphprobe.pipeline import Pipeline
from transform_cases import apply
from transform_tools import captured, matches, reason


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

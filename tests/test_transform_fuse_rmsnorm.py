"""fuse_rmsnorm: what is its own; what holds of every transform is in test_transforms.py."""

from __future__ import annotations

import pytest
import torch

import graphprobe
from graphprobe.pipeline import Pipeline
from graphprobe_transforms.fuse_rmsnorm import FuseRmsNorm
from transform_tools import matches, operators, reason, run

NORMS = {"llama": 5, "mistral": 5, "mixtral": 5, "qwen3": 9}


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_becomes_one_operator(name: str) -> None:
    done = run(FuseRmsNorm(), name, torch.bfloat16)
    assert len(matches(done)) == NORMS[name]
    assert operators(done.gm, "model.layers.0.input_layernorm") == ["rms_norm"]
    assert operators(done.gm, "model.norm") == ["rms_norm"]


def test_where_limits_it_to_some_modules() -> None:
    assert matches(run(FuseRmsNorm(where="*.1.*"), "llama")) == (
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
    )


class Norm(torch.nn.Module):
    """An RMSNorm with one thing about it that forbids the fusion."""

    def __init__(self, obstacle: str) -> None:
        super().__init__()
        self.obstacle = obstacle
        self.weight = torch.nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        dims = [-2] if self.obstacle == "another dimension" else [-1]
        power = 3 if self.obstacle == "another power" else 2
        mean = x.pow(power).mean(dims, keepdim=True)
        normed = x * torch.rsqrt(mean + 1e-5)
        if self.obstacle == "the mean is an output":
            return self.weight * normed, mean
        return normed * 2.0 if self.obstacle == "no weight" else self.weight * normed


OBSTACLES = {
    "another dimension": "last dimension",
    "another power": "square",
    "the mean is an output": "used elsewhere",
    "no weight": "weight",
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_near_miss_is_left_alone_and_explained(obstacle: str) -> None:
    gm = graphprobe.capture(Norm(obstacle).eval(), (torch.rand(4, 8),))
    done = Pipeline((FuseRmsNorm(),)).run(gm)
    assert OBSTACLES[obstacle] in reason(done)
    assert [n.name for n in done.gm.graph.nodes] == [n.name for n in gm.graph.nodes]

"""fuse_rmsnorm: the operators afterwards, the numbers, the metadata, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

import graphprobe
from graphprobe.pipeline import Pipeline
from graphprobe_transforms.fuse_rmsnorm import FuseRmsNorm
from transform_tools import DTYPES, assert_metadata, matches, operators, reason, run, verdict

NORMS = {"llama": 5, "mistral": 5, "mixtral": 5, "qwen3": 9}


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_becomes_one_operator(name: str) -> None:
    done = run(FuseRmsNorm(), name, torch.bfloat16)
    assert len(matches(done)) == NORMS[name]
    assert operators(done.gm, "model.layers.0.input_layernorm") == ["rms_norm"]
    assert operators(done.gm, "model.norm") == ["rms_norm"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMS)
def test_it_differs_by_rounding_at_most(name: str, dtype: torch.dtype) -> None:
    assert verdict(run(FuseRmsNorm(), name, dtype), name, dtype) in ("identical", "rounding")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMS)
def test_metadata_is_complete_and_fresh(name: str, dtype: torch.dtype) -> None:
    assert_metadata(run(FuseRmsNorm(), name, dtype).gm)


def test_where_limits_it_to_some_modules() -> None:
    assert matches(run(FuseRmsNorm(where="*.1.*"), "llama")) == (
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
    )


@pytest.mark.parametrize("name", ["gpt2", "bert", "conv"])
def test_models_without_rmsnorm_are_left_alone(name: str) -> None:
    done = run(FuseRmsNorm(), name)
    assert "no aten.rsqrt" in reason(done)
    assert not done.events


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

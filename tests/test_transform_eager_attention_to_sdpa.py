"""eager_attention_to_sdpa: what is its own; what holds of every transform is in test_transforms.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import graphprobe
from graphprobe.pipeline import Pipeline
from graphprobe_transforms.eager_attention_to_sdpa import EagerAttentionToSdpa
from transform_tools import matches, operators, reason, run

ATTENTION = {
    "llama": "model.layers.{}.self_attn",
    "mistral": "model.layers.{}.self_attn",
    "mixtral": "model.layers.{}.self_attn",
    "qwen3": "model.layers.{}.self_attn",
    "gpt2": "transformer.h.{}.attn",
    "bert": "encoder.layer.{}.attention.self",
}


@pytest.mark.parametrize("name", ATTENTION)
def test_scores_softmax_and_sum_become_one_operator(name: str) -> None:
    done = run(EagerAttentionToSdpa(), name)
    assert matches(done) == (ATTENTION[name].format(0), ATTENTION[name].format(1))
    inside = operators(done.gm, ATTENTION[name].format(0))
    assert inside.count("scaled_dot_product_attention") == 1
    assert not {"softmax", "matmul"} & set(inside)


class Attention(torch.nn.Module):
    """Attention with one thing about it that forbids the replacement."""

    def __init__(self, obstacle: str) -> None:
        super().__init__()
        self.obstacle = obstacle

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        keys = k if self.obstacle == "keys not transposed" else k.transpose(2, 3)
        scores = torch.matmul(q, keys) / 2.0
        weights = torch.softmax(scores, dim=2 if self.obstacle == "another dimension" else -1)
        if self.obstacle == "dropout":
            weights = F.dropout(weights, 0.5, training=True)
        out = torch.matmul(weights, v)
        return (out, weights) if self.obstacle == "weights are an output" else out


OBSTACLES = {
    "keys not transposed": "not transposed",
    "another dimension": "last dimension",
    "dropout": "dropout is switched on",
    "weights are an output": "values alone",
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_near_miss_is_left_alone_and_explained(obstacle: str) -> None:
    q, k, v = torch.rand(3, 1, 2, 4, 4)
    gm = graphprobe.capture(Attention(obstacle).eval(), (q, k, v))
    done = Pipeline((EagerAttentionToSdpa(),)).run(gm)
    assert OBSTACLES[obstacle] in reason(done)
    assert [n.name for n in done.gm.graph.nodes] == [n.name for n in gm.graph.nodes]


@pytest.mark.parametrize("divisor", [2.0, 0.25])
def test_a_division_becomes_the_scale(divisor: float) -> None:
    class Plain(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.softmax(q @ k.transpose(-1, -2) / divisor, -1) @ v

    q, k, v = torch.rand(3, 1, 2, 4, 4)
    gm = graphprobe.capture(Plain(), (q, k, v))
    done = Pipeline((EagerAttentionToSdpa(),)).run(gm)
    assert len(matches(done)) == 1
    torch.testing.assert_close(done.gm(q, k, v), gm(q, k, v))

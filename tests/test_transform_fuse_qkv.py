"""fuse_qkv: what is its own; what holds of every transform is in test_transforms.py."""

from __future__ import annotations

import pytest
import torch

import graphprobe
from graphprobe.pipeline import Pipeline
from graphprobe_transforms.fuse_qkv import FuseQkv
from transform_tools import captured, matches, operators, reason, run

ATTENTION = {
    "llama": "model.layers.{}.self_attn",
    "mistral": "model.layers.{}.self_attn",
    "mixtral": "model.layers.{}.self_attn",
    "qwen3": "model.layers.{}.self_attn",
    "bert": "encoder.layer.{}.attention.self",
}


@pytest.mark.parametrize("name", ATTENTION)
def test_three_linears_become_one_and_a_split(name: str) -> None:
    done = run(FuseQkv(), name)
    assert matches(done) == (ATTENTION[name].format(0), ATTENTION[name].format(1))
    inside = operators(done.gm, ATTENTION[name].format(0))
    others = 1 if name != "bert" else 0  # the output projection, which lies outside in bert
    assert [inside.count(op) for op in ("linear", "split_with_sizes", "getitem")] == [1 + others, 1, 3]


@pytest.mark.parametrize("name", ATTENTION)
def test_weights_are_stacked_and_not_kept_twice(name: str) -> None:
    before, _, _ = captured(name)
    after = run(FuseQkv(), name).gm
    assert sum(p.numel() for p in after.parameters()) == sum(p.numel() for p in before.parameters())
    assert sum("qkv_proj.weight" in key for key, _ in after.named_parameters()) == 2


def test_each_projection_is_claimed_to_equal_its_slice() -> None:
    done = run(FuseQkv(where="*.0.*"), "llama")
    slices = [n.name for n in done.gm.graph.nodes if n.name.startswith("getitem")]
    assert [event.new for event in done.events] == slices
    assert [event.old for event in done.events] == ["linear", "linear_1", "linear_2"]


class Projections(torch.nn.Module):
    """Three linears on one input, one of which has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=i > 0) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads[0](x) + self.heads[1](x) * self.heads[2](x)


def test_a_missing_bias_is_an_obstacle_that_is_named() -> None:
    gm = graphprobe.capture(Projections().eval(), (torch.rand(2, 4),))
    assert "some of the projections have a bias" in reason(Pipeline((FuseQkv(),)).run(gm))

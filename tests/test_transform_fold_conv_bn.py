"""fold_conv_bn: what is its own; what holds of every transform is in test_transforms.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprobe
from graphprobe.pipeline import Pipeline, Run
from transform_cases import apply, case, count
from transform_tools import captured, matches, reason


class Net(nn.Module):
    """A convolution of any rank with a batch norm behind it, both with or without their optional weights."""

    def __init__(self, rank: int, bias: bool, affine: bool, shared: bool = False) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
        self.conv = conv(4, 6, 3, padding=1, groups=2, bias=bias)
        self.norm = norm(6, affine=affine)
        self.shared = shared
        nn.init.uniform_(self.norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y if self.shared else self.norm(y)


def folded(rank: int, bias: bool, affine: bool, shared: bool = False) -> tuple[Run, tuple[torch.Tensor, ...], Net]:
    torch.manual_seed(rank)
    model = Net(rank, bias, affine, shared).eval()
    done, args = apply("fold_conv_bn", model, torch.randn(2, 4, *(5,) * rank))
    return done, args, model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_rank_with_and_without_bias_and_affine_weights(rank: int, bias: bool, affine: bool) -> None:
    done, args, model = folded(rank, bias, affine)
    assert "aten.batch_norm.default" not in count(done.gm)
    torch.testing.assert_close(done.gm(*args), model(*args), rtol=1e-5, atol=1e-6)


def test_a_result_that_is_used_twice_is_a_near_miss_that_is_named() -> None:
    done, _, _ = folded(2, True, True, shared=True)
    assert "used elsewhere" in reason(done)


def test_a_resnet_is_folded_whole() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    torch.manual_seed(0)
    model = transformers.ResNetModel(config).eval()
    gm = graphprobe.capture(model, (torch.randn(1, 3, 32, 32),))
    done = Pipeline.parse("fold_conv_bn").run(gm)
    assert len(matches(done)) == count(gm)["aten.batch_norm.default"]
    assert "aten.batch_norm.default" not in count(done.gm)
    assert graphprobe.diff(gm, done.gm, (torch.randn(1, 3, 32, 32),), events=done.events).ok


def test_old_weights_are_gone() -> None:
    before, after = captured("conv")[0], case("fold_conv_bn").run("conv").gm
    assert {n for n, _ in before.named_parameters()} - {n for n, _ in after.named_parameters()} >= {
        "stem.weight",
        "norm.weight",
        "norm.bias",
    }

"""remove_noops: what goes, what stays, and near misses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from transform_cases import LANGUAGE, apply, case, count
from transform_tools import captured, reason


@pytest.mark.parametrize("name", LANGUAGE)
def test_casts_to_the_same_dtype_and_dropout_go(name: str) -> None:
    gm = case("remove_noops").run(name).gm
    assert "aten.dropout.default" not in count(gm)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype):
        assert node.args[0].meta["val"].dtype != node.meta["val"].dtype
    assert len(gm.graph.nodes) < len(captured(name)[0].graph.nodes)


@pytest.mark.parametrize("name", ["mlp", "branch", "conv"])
def test_graphs_with_writes_branches_and_convolutions_compute_the_same(name: str) -> None:
    assert case("remove_noops").verdict(name, torch.float32) == "identical"


class One(torch.nn.Module):
    """An operation between two others."""

    def __init__(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operation(x.sin()).cos()


GO: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "times one": lambda x: x * 1.0,
    "over one": lambda x: x / 1,
    "whole slice": lambda x: x[:, 0:4],
    "same view": lambda x: x.view(3, 4),
    "same expand": lambda x: x.expand(3, 4),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "there and back": lambda x: x.transpose(0, 1).transpose(-1, -2),
    "eval dropout": lambda x: torch.nn.functional.dropout(x, 0.5, training=False),
}
STAY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plus zero": lambda x: x + 0.0,  # -0.0 + 0 is 0.0
    "times two": lambda x: x * 2.0,
    "part": lambda x: x[:, 0:3],
    "one transpose": lambda x: x.transpose(0, 1),
    "two transposes": lambda x: x.unsqueeze(0).transpose(0, 1).transpose(1, 2),
    "wider": lambda x: x.double(),
    "contiguous of a view": lambda x: x.transpose(0, 1).contiguous(),
}


@pytest.mark.parametrize("kind", GO)
def test_what_changes_nothing_goes(kind: str) -> None:
    done, args = apply("remove_noops", One(GO[kind]), torch.randn(3, 4))
    assert count(done.gm) == {"aten.sin.default": 1, "aten.cos.default": 1}
    assert torch.equal(done.gm(*args), One(GO[kind])(*args))


@pytest.mark.parametrize("kind", STAY)
def test_what_changes_something_stays(kind: str) -> None:
    done, args = apply("remove_noops", One(STAY[kind]), torch.randn(3, 4))
    assert "every operation changes something" in reason(done)
    assert torch.equal(done.gm(*args), One(STAY[kind])(*args))


class Written(torch.nn.Module):
    """The clone keeps the input from being written into."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y.add_(1)
        return y * x


def test_a_copy_that_protects_something_stays() -> None:
    done, _ = apply("remove_noops", Written(), torch.randn(3, 4))
    x = torch.randn(3, 4)
    kept = x.clone()
    torch.testing.assert_close(done.gm(x), (kept + 1) * kept)
    assert torch.equal(x, kept)


def test_the_graph_does_not_hand_out_its_input() -> None:
    class Copy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    done, (x,) = apply("remove_noops", Copy(), torch.randn(3))
    assert done.gm(x).data_ptr() != x.data_ptr()

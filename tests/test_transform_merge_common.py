"""merge_common: what is merged, what is not, and near misses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from transform_cases import LANGUAGE, apply, case, count
from transform_tools import reason, run


@pytest.mark.parametrize("name", LANGUAGE)
def test_no_two_nodes_compute_the_same(name: str) -> None:
    gm = case("merge_common").run(name).gm
    calls = [(n.target, str(n.args), str(n.kwargs)) for n in gm.graph.nodes if n.op == "call_function"]
    pure = [call for call in calls if "_assert" not in str(call[0])]
    assert len(pure) == len(set(pure))


class Twice(torch.nn.Module):
    """The same function of the same input, written twice."""

    def __init__(self, one: Callable[..., torch.Tensor], other: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one(x).sin(), self.other(x).cos()


def test_chains_are_merged_whole() -> None:
    done, args = apply("merge_common", Twice(lambda x: (x + 1).exp(), lambda x: (x + 1).exp()), torch.randn(3))
    assert count(done.gm)["aten.exp.default"] == count(done.gm)["aten.add.Tensor"] == 1
    for mine, wanted in zip(done.gm(*args), (args[0] + 1).exp().sin()[None], strict=False):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x + 1, lambda x: x + 1.0),
        (lambda x: x * 0.0, lambda x: x * -0.0),
        (lambda x: x + True, lambda x: x + 1),
        (lambda x: x + torch.rand(3), lambda x: x + torch.rand(3)),
        (lambda x: x.sum(0, keepdim=True), lambda x: x.sum(0)),
    ],
    ids=["int and float", "signed zeros", "bool and int", "random numbers", "other arguments"],
)
def test_what_only_looks_alike_is_not_merged(
    one: Callable[..., torch.Tensor], other: Callable[..., torch.Tensor]
) -> None:
    done, _ = apply("merge_common", Twice(one, other), torch.randn(3))
    assert "nothing is computed twice" in reason(done)


def test_a_graph_that_writes_is_left_alone() -> None:
    from graphprobe.pipeline import Pipeline

    (transform,) = Pipeline.parse("merge_common").transforms
    done = run(transform, "mlp")
    assert "writes into its tensors" in reason(done)

"""What users hand over wrongly from Python: one sentence that says what would be right, before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphprobe
from graphprobe.errors import GraphprobeError, InputError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.up(x))


MODEL = Net().eval()
X = torch.linspace(-1, 1, 24).reshape(3, 8)


def compared(*args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: graphprobe.diff(MODEL, MODEL, *(args or ((X,),)), **options)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "a tensor for args": (compared(X), "args must be a tuple"),
    "a dict for args": (compared({"x": X}), "args must be a tuple"),
    "a tuple for kwargs": (compared((), (X,)), "kwargs must be a dict"),
    "a set too few": (compared([(X,), (X,)], [{}]), "2 sets of args and 1 of kwargs"),
    "no inputs": (compared(()), "no inputs were given"),
    "no setting of exact": (compared(exact="yes"), "'auto', 'always' or 'never'"),
    "no share": (compared(min_coverage="all"), "a number between 0 and 1"),
    "a text for accept": (compared(accept="up:semantic:1"), "accept=('up:semantic:1',)"),
    "a text for allow": (compared(allow="semantic"), "give a list or a tuple"),
    "no kind": (compared(allow=["semantics"]), "did you mean 'semantic'"),
    "no device": (compared(device="nowhere"), "the device 'nowhere' cannot be used here"),
    "a device without values": (compared(device="meta"), "no values to compare"),
    "no events": (compared(events=["fused"]), "records.Replacement"),
    "a list for valid": (compared(valid=[1, 1]), "not list"),
    "valid of another shape": (compared(valid=torch.ones(2, 2)), "(3, 8)), not (2, 2)"),
    "nothing valid": (compared(valid=torch.zeros(3, 8)), "no position counts"),
    "no graph to lint": (lambda: graphprobe.lint(MODEL), "lint takes a GraphModule, not a Net"),
    "no graph to view": (lambda: graphprobe.view(MODEL), "view takes a GraphModule, not a Net"),
    "a function to capture": (lambda: graphprobe.capture(torch.relu, (X,)), "cannot capture a builtin"),
    "an unknown input": (lambda: graphprobe.diff(*[graphprobe.capture(MODEL, (X,))] * 2, (), {"xs": X}), "input 'xs'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_in_a_sentence(case: str) -> None:
    call, words = MISTAKES[case]
    with pytest.raises(GraphprobeError) as told:
        call()
    assert words in str(told.value)


def test_a_mask_that_leaves_something_hides_no_bug() -> None:
    tokens = torch.ones(2, 6, dtype=torch.int64)
    table = nn.Embedding(4, 8)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, :3] = False
    wrong = nn.Sequential(nn.Embedding.from_pretrained(table.weight.detach() * 1.001))
    report = graphprobe.diff(nn.Sequential(table), wrong, (tokens,), valid=valid)
    assert report.verdict == "semantic"
    with pytest.raises(InputError, match="no position counts"):
        graphprobe.diff(nn.Sequential(table), wrong, (tokens,), valid=torch.zeros_like(valid))

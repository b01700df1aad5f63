"""What a graph returns beside tensors: numbers, strings and None are compared, too; a change of one is a finding."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import graphprobe
from graphprobe.cli import main
from graphprobe.judge.plain import Plain
from graphprobe.render import text


class Beside(torch.nn.Module):
    """A linear layer that returns something of any type beside its result."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.extra = extra

    def forward(self, x):
        return {"y": self.linear(x), "extra": self.extra, "nothing": None}


class Counting(torch.nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return torch.tanh(x), x.shape[0] * self.factor


def pair(mine: Any, theirs: Any) -> tuple[Beside, Beside]:
    before = Beside(mine)
    after = copy.deepcopy(before)
    after.extra = theirs
    return before, after


X = (torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize("value", [3, 0.5, True, "relu", None], ids=repr)
def test_equal_values_are_identical(value: Any) -> None:
    assert graphprobe.diff(*pair(value, value), X).verdict == "identical"


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [(3, 4), (0.5, 0.25), (True, False), ("relu", "gelu"), (3, None), (None, 3), ("3", 3)],
    ids=lambda v: repr(v),
)
def test_another_value_is_a_finding_that_names_both(mine: Any, theirs: Any) -> None:
    report = graphprobe.diff(*pair(mine, theirs), X)
    assert report.verdict == "semantic" and not report.ok
    assert report.first is not None and report.first.op == "output"
    assert f"'extra' is {theirs!r}, and {mine!r} in before" in report.first.explanation
    assert graphprobe.Report.from_json(report.to_json()) == report
    assert "'extra'" in text(report)


def test_a_finding_in_the_operations_comes_first() -> None:
    before, after = pair(3, 4)
    with torch.no_grad():
        after.linear.weight.mul_(1.01)
    report = graphprobe.diff(before, after, X)
    assert [f.culprit for f in report.findings if f.kind == "semantic"] == ["linear", "output"]


def test_exit_status_and_files(tmp_path, capsys) -> None:
    paths = []
    for name, model in zip(("before", "after"), pair("relu", "gelu"), strict=True):
        paths.append(str(tmp_path / f"{name}.fx"))
        graphprobe.save(graphprobe.capture(model, X), paths[-1], args=X)
    assert main(["diff", paths[0], paths[0]]) == 0
    assert main(["diff", *paths]) == 1
    assert "the output 'extra' is 'gelu', and 'relu' in before" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("factor", "verdict"), [(2, "identical"), (3, "semantic")])
def test_a_number_that_one_side_computes_and_the_other_knows(factor: int, verdict: str) -> None:
    given = (torch.randn(6, 4, generator=torch.Generator().manual_seed(1)),)
    dynamic = graphprobe.capture(Counting(2), (torch.randn(5, 4),), dynamic_shapes=({0: torch.export.Dim("n")},))
    report = graphprobe.diff(dynamic, graphprobe.capture(Counting(factor), given), given)
    assert report.verdict == verdict


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        (math.nan, math.nan, True),
        (math.inf, math.inf, True),
        (math.inf, -math.inf, False),
        (0.1 + 0.2, 0.3, True),
        (0.1, 0.1001, False),
        (1, 1.0, True),
        (0.0, 1e-300, False),
        (1, "1", False),
        (None, 0, False),
    ],
)
def test_when_two_values_are_the_same(mine: Any, theirs: Any, same: bool) -> None:
    assert Plain("x", mine, theirs).same is same
    assert Plain("x", theirs, mine).same is same

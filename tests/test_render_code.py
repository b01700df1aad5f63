"""What a region computes, as lines of code: the quickest answer to 'what did the transform change?'."""

from __future__ import annotations

import dataclasses
import re

import pytest

from graphprobe import render
from graphprobe.records import Finding, GraphView, NodeView, Report
from graphprobe.render.code import call, region_code
from render_samples import wrong_scale


def test_both_sides_show_the_constant_that_differs() -> None:
    report = wrong_scale()
    before, after = region_code(report, report.findings[0])
    assert [line.text for line in before] == ["scale_1 = mul(scores_1, 0.25)"]
    assert [line.text for line in after] == ["scale_1 = mul(scores_1, 0.25025)"]
    assert after[0].culprit and not before[0].culprit
    assert after[0].made == "[1×4×5×5] bf16"  # noqa: RUF001
    lines = render.text(report).splitlines()
    assert any(re.fullmatch(r"  after +> scale_1 = mul\(scores_1, 0.25025\)", line) for line in lines)


@pytest.mark.parametrize("at", [0, 20, 39])
@pytest.mark.parametrize("size", [1, 8, 9, 40])
def test_of_a_large_region_the_culprit_and_the_end_are_shown_and_the_rest_is_counted(size: int, at: int) -> None:
    names = tuple(f"n{i}" for i in range(size))
    culprit = names[min(at, size - 1)]
    nodes = tuple(NodeView(n, "call_function", "aten.neg.default", args="()") for n in names)
    finding = Finding("semantic", names, names, "", "aten.neg.default", 1.0, 1.0, 1.0, 0.0, culprit=culprit)
    finding = dataclasses.replace(finding, outputs=(names[-1], names[-1]))
    graph = GraphView("g", nodes)
    before, after = region_code(Report("semantic", (finding,), before=graph, after=graph), finding)
    shown = [line.name for line in after if line.name]
    assert {culprit, names[-1]} <= set(shown) and len(shown) == min(size, 8)
    assert [line.name for line in after if line.culprit] == [culprit] and not any(line.culprit for line in before)
    left_out = sum(int(re.findall(r"\d+", line.text)[0]) for line in after if not line.name)
    assert left_out + len(shown) == size
    assert shown == sorted(shown, key=names.index)


def test_weights_bear_their_paths_and_results_their_index() -> None:
    weight = NodeView("w", "get_attr", "layers.0.q.weight")
    product = NodeView("p", "call_function", "aten.linear.default", ("x", "w"), "(%x, %w)")
    part = NodeView("g", "call_function", "operator.getitem", ("p",), "(%p, 2)")
    graph = GraphView("g", (weight, product, part))
    assert call(graph, product) == "linear(x, layers.0.q.weight)"
    assert call(graph, part) == "p[2]"


def test_names_without_nodes_are_passed_over() -> None:
    finding = Finding("semantic", ("gone",), (), "", "op", None, None, None, None)
    assert region_code(Report("semantic", (finding,)), finding) == ((), ())
    assert "semantic" in render.text(Report("semantic", (finding,)))

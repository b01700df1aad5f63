"""Graph views: what a picture or a report needs of a graph, and nothing that differs from run to run."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from torch import nn

import graphprobe
from fx_tools import captured
from graphprobe.graphview import arguments
from graphprobe.records import GraphView, NodeView, from_data, to_data
from models import NAMES, TEXT


@pytest.mark.parametrize("name", NAMES)
def test_a_view_says_of_every_node_what_the_graph_knows(name: str) -> None:
    gm = captured(name)
    view = graphprobe.view(gm, name)
    assert view.name == name
    for node, row in zip(gm.graph.nodes, view.nodes, strict=True):
        val = node.meta.get("val")
        assert (row.name, row.op) == (node.name, node.op)
        assert row.inputs == tuple(source.name for source in node.all_input_nodes)
        assert all(f"%{source}" in row.args or row.args.endswith("...)") for source in row.inputs)
        assert row.has_val
        assert re.fullmatch(r"[0-9a-f]{12}:\d+", row.id)
        if isinstance(val, torch.Tensor):
            assert row.shape == tuple(val.shape)
            assert f"torch.{row.dtype}" == str(val.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_view_goes_through_json(name: str) -> None:
    view = graphprobe.view(captured(name))
    assert from_data(GraphView, json.loads(json.dumps(to_data(view)))) == view


@pytest.mark.parametrize("name", TEXT)
def test_operations_know_their_module_and_their_line(name: str) -> None:
    calls = [row for row in graphprobe.view(captured(name)).nodes if row.op == "call_function"]
    assert all(re.fullmatch(r"\w+\.py:\d+ in \w+", row.source) for row in calls)
    assert {row.module_type for row in calls} >= {"Linear"} or name == "gpt2"
    layers = {re.search(r"\d+", row.module_path).group() for row in calls if re.search(r"\d+", row.module_path)}
    assert layers == {"0", "1"}


def test_views_are_told_from_operations_that_make_values() -> None:
    rows = graphprobe.view(captured("mlp")).nodes
    assert [row.target for row in rows if row.is_view] == [
        "aten.view.default",
        "aten.select.int",
        "aten.flatten.using_ints",
        "aten.slice.Tensor",
    ]


def test_symbolic_dimensions_are_strings() -> None:
    view = graphprobe.view(captured("llama", dynamic=True))
    shapes = [row.shape for row in view.nodes if row.target == "aten.linear.default"]
    assert {tuple(type(size) for size in shape or ()) for shape in shapes} == {(str, str, int)}


def graph_with(*args: Any, target: Any = torch.add, **kwargs: Any) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(target, tuple(x if arg is Ellipsis else arg for arg in args), kwargs))
    return torch.fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((..., 0.125, [1, 2]), {}, "(%x, 0.125, [1, 2])"),
        (([..., ...], -1), {}, "([%x, %x], -1)"),
        ((...,), {"dtype": torch.bfloat16, "device": torch.device("cpu")}, "(%x, dtype=bfloat16, device=cpu)"),
        (((...,), None, True, "same"), {}, "((%x,), None, True, 'same')"),
        ((slice(None, 4), slice(1, None, 2)), {}, "(:4, 1::2)"),
        ((float("-inf"), 1e-5), {}, "(-inf, 1e-05)"),
        (({"a": ...}, torch.ones(2, 3)), {}, "({a: %x}, tensor[2, 3])"),
        ((object(),), {}, "(<object object>)"),
    ],
)
def test_arguments_are_short_text(args: Any, kwargs: Any, text: str) -> None:
    def fill(value: Any, node: Any) -> Any:
        if value is Ellipsis:
            return node
        if isinstance(value, (list, tuple)):
            return type(value)(fill(part, node) for part in value)
        return {key: fill(part, node) for key, part in value.items()} if isinstance(value, dict) else value

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.add, fill(args, x), fill(kwargs, x))
    assert arguments(node) == text


def test_long_arguments_are_cut_and_no_text_holds_an_address() -> None:
    gm = graph_with(..., list(range(500)), target=lambda x, y: x)
    (row,) = (row for row in graphprobe.view(gm).nodes if row.op == "call_function")
    assert len(row.args) == 200 and row.args.endswith("...)")
    assert "0x" not in row.target


def lost(gm: torch.fx.GraphModule) -> list[str]:
    return [row.name for row in graphprobe.view(gm).nodes if not row.has_val]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, when a pytree structure is copied
@pytest.mark.parametrize("how", ["missing", "None"])
def test_a_lost_value_shows(how: str) -> None:
    gm = copy.deepcopy(captured("branch"))
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    if how == "None":
        node.meta["val"] = None
    else:
        del node.meta["val"]
    assert lost(gm) == [node.name]


def test_nothing_is_known_of_a_traced_graph_and_that_shows() -> None:
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    view = graphprobe.view(gm)
    assert lost(gm) == ["input_1", "_0", "_1"]
    assert view.nodes[1] == NodeView(
        name="_0",
        op="call_module",
        target="0",
        inputs=("input_1",),
        args="(%input_1)",
        module_path="0",
        module_type="Linear",
        has_val=False,
    )

"""Graphs that are moved to another device: everything they make goes along."""

from __future__ import annotations

import pytest
import torch

import graphprobe
from graphprobe.devices import faults, moved, redirect
from graphprobe.errors import OperatorError

aten = torch.ops.aten


def makers() -> torch.fx.GraphModule:
    """A graph that makes tensors in every way that names no device, and holds a constant that is no buffer."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    made = [
        graph.call_function(aten.zeros.default, ([3],), {"dtype": torch.float32}),
        graph.call_function(aten.arange.default, (3,)),
        graph.call_function(aten.scalar_tensor.default, (2.0,)),
        graph.call_function(aten.full.default, ([3], 1.0), {"device": torch.device("cpu")}),
        graph.call_function(aten.zeros_like.default, (x,)),
        graph.get_attr("number"),
    ]
    graph.output(tuple(made))
    root = torch.nn.Module()
    root.register_buffer("number", torch.tensor(3.0))
    gm = torch.fx.GraphModule(root, graph)
    del gm._buffers["number"]
    gm.__dict__["number"] = torch.tensor(3.0)
    return gm


def test_everything_a_moved_graph_makes_lies_on_the_new_device() -> None:
    found = moved(makers(), torch.device("meta"))(torch.empty(3, device="meta"))
    assert [t.device.type for t in found] == ["meta"] * len(found)


def test_bodies_of_control_flow_go_along() -> None:
    root = torch.nn.Module()
    root.body = makers()
    graph = torch.fx.Graph()
    graph.output(graph.call_module("body", (graph.placeholder("x"),)))
    gm = torch.fx.GraphModule(root, graph)
    redirect(gm, torch.device("meta"))
    assert [t.device.type for t in gm(torch.empty(3, device="meta"))] == ["meta"] * 6


def test_a_gpu_that_gives_up_is_said_in_one_sentence() -> None:
    with pytest.raises(OperatorError, match=r"the GPU gave up.*device-side assert.*device=.cpu."), faults():
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nSearch for ...")


class Positions(torch.nn.Module):
    """Adds rows of a table that no input chooses: a region that starts from weights alone."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first
        self.table = torch.nn.Embedding(16, 32)
        self.norm = torch.nn.LayerNorm(32)
        self.register_buffer("positions", torch.arange(16)[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.table(self.positions[:, self.first : self.first + 8]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_computed_from_weights_alone_is_judged_on_every_device(device: str) -> None:
    torch.manual_seed(0)
    before, after = Positions(0), Positions(1)
    after.load_state_dict(before.state_dict())
    report = graphprobe.diff(before, after, (torch.randn(2, 8, 32),), device=device)
    assert report.verdict == "semantic"
    assert report.coverage.unknown == 0

"""Built-in pipelines: torchao's quantisers as transforms, and what is said where torchao is not installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import graphprobe
from graphprobe.bisection import built_in, quantizing
from graphprobe.bisection.quantizing import INPUTS, Pt2e, Quantize
from graphprobe.cli import main
from graphprobe.errors import PipelineError
from graphprobe.pipeline import Pipeline, installed

TORCHAO = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not TORCHAO, reason="torchao is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore")] if TORCHAO else []  # torchao's own, at its import
without_torchao = pytest.mark.skipif(TORCHAO, reason="torchao is installed")


class Net(nn.Module):
    """Two linear layers with something between them, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))) + self.down(torch.relu(self.up(x)))


def net() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval(), (torch.randn(4, 8, 32),)


def test_names_and_options_read_back() -> None:
    known = {**installed(), **built_in.TRANSFORMS}
    for text, transform in {
        "quantize_": Quantize(),
        'torchao{config="Float8WeightOnlyConfig", where="*.mlp.*"}': Quantize("Float8WeightOnlyConfig", "*.mlp.*"),
        "pt2e{first=3}": Pt2e(first=3),
    }.items():
        plan = Pipeline.parse(text, known)
        assert plan.transforms == (transform,) == Pipeline.parse(str(plan)).transforms


@without_torchao
@pytest.mark.parametrize("pipeline", ["quantize_", "torchao", "pt2e"])
def test_without_torchao_that_is_what_is_said(pipeline: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, args = net()
    for call in (graphprobe.bisect, graphprobe.run):
        with pytest.raises(PipelineError, match=r"needs torchao.*pip install"):
            call(model, args, pipeline=pipeline)


@without_torchao
def test_the_command_line_says_so_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["bisect", "bisect_passes:chain", "--pipeline", "quantize_"]) == 2
    assert "needs torchao" in capsys.readouterr().err


def test_a_graph_carries_its_inputs_through_a_pipeline() -> None:
    seen: list[Any] = []

    def look(gm: GraphModule) -> None:
        seen.append(quantizing.inputs_of(gm))

    model, args = net()
    report = graphprobe.run(model, args, pipeline=[look])
    assert torch.equal(seen[0][0][0], args[0]) and seen[0][0][0] is not args[0]
    gm = graphprobe.capture(model, args)
    assert INPUTS not in gm.meta and report.steps
    graphprobe.bisect(gm, args, pipeline=[look])
    assert INPUTS not in gm.meta  # the caller's graph is not touched


@needs_torchao
@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"]
)
def test_honest_quantisation_is_no_fault(config: str) -> None:
    model, args = net()
    found = graphprobe.bisect(model, args, pipeline=f'quantize_{{config="{config}"}}')
    assert found.ok and found.report is not None and found.report.verdict == "quantization"


@needs_torchao
def test_a_wrong_scale_is_named_by_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = quantizing._put_in

    def wrong(gm: GraphModule, node: torch.fx.Node, layer: GraphModule) -> None:
        if quantizing._place(node) == "down":
            with torch.no_grad():
                for name, value in (*layer.named_parameters(), *layer.named_buffers()):
                    if value.is_floating_point() and "weight" in name:
                        value.mul_(1.5)
        honest(gm, node, layer)

    monkeypatch.setattr(quantizing, "_put_in", wrong)
    model, args = net()
    found = graphprobe.bisect(model, args, pipeline="quantize_")
    assert found.transform == "quantize_" and found.match == "down"


@needs_torchao
def test_a_config_that_is_not_there_is_named() -> None:
    model, args = net()
    with pytest.raises(PipelineError, match=r"has no 'Int8WeightOnly'.*Int8WeightOnlyConfig"):
        graphprobe.bisect(model, args, pipeline='quantize_{config="Int8WeightOnly"}')


@needs_torchao
def test_pt2e_is_quantisation_and_can_be_limited() -> None:
    model, args = net()
    found = graphprobe.bisect(model, args, pipeline="pt2e")
    assert found.ok and found.report is not None and found.report.verdict == "quantization"
    one = graphprobe.run(model, args, pipeline="pt2e{first=1}")
    assert len(one.steps[0].matches) == 1

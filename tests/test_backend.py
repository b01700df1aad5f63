"""``torch.compile(model, backend="graphprobe")``: taps on each of Dynamo's graphs, and the results of eager."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import models
from graphprobe import backend

# Dynamo's own, where it resumes after a break and looks at a tensor that has a gradient
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    backend.default.clear()
    yield
    torch.compiler.reset()
    backend.default.clear()


class Broken(nn.Module):
    """Needs a graph break: how it goes on depends on a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.sum().item() > 1e9:
            return x
        return self.second(x.relu())


def test_graphs_around_a_break_are_tapped_and_nothing_changes() -> None:
    model, x = Broken(), torch.randn(4, 8)
    recorder = backend.Recorder()
    found = torch.compile(model, backend=recorder)(x)
    assert torch.equal(found, model(x))
    assert len(recorder.graphs) == 2
    taps = {tap.name.partition("/")[0]: tap for tap in recorder.taps if not tap.derived and tap.shape == (4, 8)}
    assert set(taps) == {"graph0", "graph1"}
    assert taps["graph1"].mean == pytest.approx(found.mean().item(), abs=1e-5)


class Asking(nn.Module):
    """Computes otherwise while it is traced, as attention masks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if torch.compiler.is_compiling():
            x = x * 1.01
        if x.sum().item() > 1e9:
            return x
        return self.second(x.relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_returned_are_the_bits_of_the_backend_eager(dtype: torch.dtype) -> None:
    model, x = Asking().to(dtype), torch.randn(4, 64, dtype=dtype)
    wanted = torch.compile(model, backend="eager")(x)
    torch.compiler.reset()
    recorder = backend.Recorder()
    assert torch.equal(torch.compile(model, backend=recorder)(x), wanted)
    assert not torch.equal(wanted, model(x))  # else this says nothing
    assert len(recorder.graphs) == 2


def test_gradients_flow_through_tapped_graphs() -> None:
    model, x = Broken(), torch.randn(4, 8)
    recorder = backend.Recorder()
    torch.compile(model, backend=recorder)(x).sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    assert recorder.taps
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_a_second_call_and_another_size_tell_of_themselves() -> None:
    model = nn.Linear(8, 3)
    recorder = backend.Recorder()
    compiled = torch.compile(model, backend=recorder, dynamic=True)
    for rows in (4, 7):
        x = torch.randn(rows, 8)
        found = compiled(x)
        tap = [tap for tap in recorder.taps if not tap.derived][-1]
        assert tap.shape == (rows, 3)
        assert tap.mean == pytest.approx(found.mean().item(), abs=1e-6)


def test_generation_works_under_the_name() -> None:
    pytest.importorskip("transformers")
    model, _, kwargs = models.tiny("llama")
    tokens = kwargs["input_ids"][:1, :5]
    wanted = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    model.forward = torch.compile(model.forward, backend="graphprobe")
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, wanted)
    assert len(backend.default.taps) > 20


def test_the_name_is_declared() -> None:
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends")
    assert [entry.value for entry in entries if entry.name == "graphprobe"] == ["graphprobe.backend:graphprobe"]

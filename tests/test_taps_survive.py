"""Taps survive what is done to a graph afterwards: every one still fires, and reads what it read before."""

from __future__ import annotations

import copy
import io
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

import graphprobe
import models
from graphprobe.records import Tap
from graphprobe.taps import Table, read
from graphprobe.taps.rows import META

Call = Callable[..., Any]
Step = Callable[[torch.fx.GraphModule, tuple[Any, ...], dict[str, Any]], tuple[torch.nn.Module, Call]]


def _eliminated(gm: torch.fx.GraphModule, args: Any, kwargs: Any) -> tuple[torch.nn.Module, Call]:
    gm = copy.deepcopy(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm, gm


def _strictly_exported(gm: torch.fx.GraphModule, args: Any, kwargs: Any) -> tuple[torch.nn.Module, Call]:
    module = torch.export.export(gm, args, kwargs, strict=True).module()
    return module, module


def _functionalised(gm: torch.fx.GraphModule, args: Any, kwargs: Any) -> tuple[torch.nn.Module, Call]:
    module = torch.export.export(gm, args, kwargs).run_decompositions({}).module()
    return module, module


def _decomposed(gm: torch.fx.GraphModule, args: Any, kwargs: Any) -> tuple[torch.nn.Module, Call]:
    module = torch.export.export(gm, args, kwargs).run_decompositions().module()
    return module, module


def _stored(gm: torch.fx.GraphModule, args: Any, kwargs: Any) -> tuple[torch.nn.Module, Call]:
    file = io.BytesIO()
    torch.export.save(torch.export.export(gm, args, kwargs), file)
    file.seek(0)
    module = torch.export.load(file).module()
    return module, module


def _compiled(backend: str) -> Step:
    def step(gm: torch.fx.GraphModule, args: Any, kwargs: Any) -> tuple[torch.nn.Module, Call]:
        torch._dynamo.reset()
        return gm, torch.compile(gm, backend=backend)

    return step


STEPS: dict[str, Step] = {
    "dead code elimination": _eliminated,
    "strict export": _strictly_exported,
    "run_decompositions({})": _functionalised,
    "run_decompositions()": _decomposed,
    "save and load": _stored,
    "compile aot_eager": _compiled("aot_eager"),
}
#: These compute other numbers: taps fire, but need not read the same.
OTHER_NUMBERS = {"run_decompositions()", "compile inductor"}
NAMES = ("llama", "conv", "mlp", "branch", "custom")
#: torch cannot decompose these graphs without taps either.
IMPOSSIBLE = {("gpt2", "run_decompositions()")}


def observe(module: torch.nn.Module, call: Call, table: Table, args: Any, kwargs: Any) -> tuple[Any, tuple[Tap, ...]]:
    """Run once with empty statistics and return (output, taps)."""
    for name in table.stats:
        module.get_buffer(name).zero_()
    with torch.no_grad():
        result = call(*args, **kwargs)
    return result, read(module, table)


def check(name: str, what: str, step: Step) -> None:
    model, args, kwargs = models.tiny(name)
    probe = graphprobe.instrument(model, keep="*0*") if name in models.TEXT else graphprobe.instrument(model)
    expected, taps = probe(*args, **kwargs), probe.taps
    table: Table = probe.graph.meta[META]
    kept = {buffer: probe.graph.get_buffer(buffer).clone() for buffer in table.kept.values()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        module, call = step(probe.graph, args, kwargs)
        found, after = observe(module, call, table, args, kwargs)
    for before, now in zip(taps, after, strict=True):
        assert before.derived or (now.min is None) == (before.min is None), f"{before.name} did not fire"
        assert (before.name, before.shape) == (now.name, now.shape)
    if what in OTHER_NUMBERS:
        for before, now in zip(taps, after, strict=True):
            if before.rms is not None and now.rms is not None:
                assert now.rms == pytest.approx(before.rms, rel=1e-3, abs=1e-5)
        return
    assert after == taps
    outputs = [x for x in pytree.tree_leaves(expected) if isinstance(x, torch.Tensor)]
    assert all(torch.equal(x, y) for x, y in zip(outputs, pytree.tree_leaves(found), strict=False))
    assert all(torch.equal(module.get_buffer(buffer), value) for buffer, value in kept.items())


@pytest.mark.parametrize("what", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_every_tap_fires_after(name: str, what: str) -> None:
    check(name, what, STEPS[what])


@pytest.mark.slow
@pytest.mark.parametrize("what", STEPS)
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3"])
def test_every_tap_fires_after_in_larger_graphs(name: str, what: str) -> None:
    if (name, what) in IMPOSSIBLE:
        pytest.skip("torch cannot do this to the untapped graph either")
    check(name, what, STEPS[what])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("name", NAMES)
def test_every_tap_fires_after_inductor(name: str) -> None:
    check(name, "compile inductor", _compiled("inductor"))


def test_taps_fire_in_training_graphs_that_are_compiled() -> None:
    model, (x,), _ = models.tiny("conv")
    probe = graphprobe.instrument(model)
    probe(x)
    taps = probe.taps
    torch._dynamo.reset()
    compiled = torch.compile(probe.graph, backend="aot_eager")
    x = x.clone().requires_grad_()
    for name in probe.graph.meta[META].stats:
        probe.graph.get_buffer(name).zero_()
    compiled(x).sum().backward()
    assert x.grad is not None and probe.taps == taps


def test_a_copy_of_an_instrumented_graph_has_statistics_of_its_own() -> None:
    model, (x,), _ = models.tiny("mlp")
    probe = graphprobe.instrument(model)
    probe(x)
    taps = probe.taps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own
        twin = copy.deepcopy(probe.graph)
    with torch.no_grad():
        twin(x * 3)
    assert probe.taps == taps
    assert read(twin, twin.meta[META]) != taps

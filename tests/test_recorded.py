"""Runs recorded as CUDA graphs, and graphs with taps compiled by Inductor: they tell what an eager run tells."""

from __future__ import annotations

import copy

import pytest
import torch

import graphprobe
import models
from graphprobe import backend
from graphprobe.errors import InputError
from graphprobe.lanes import timing

# torch's own, where Inductor and Dynamo are set up
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]


def llama(seed: int = 0) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model, _, kwargs = models.tiny("llama", torch.bfloat16)
    torch.manual_seed(seed)
    ids = torch.randint(0, 50, kwargs["input_ids"].shape, device="cuda")
    there = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return copy.deepcopy(model).cuda(), {**there, "input_ids": ids}


def statistics(probe: graphprobe.taps.Probe) -> list[tuple[str, float, float, int]]:
    return [(tap.name, tap.mean, tap.rms, tap.zeros) for tap in probe.taps if not tap.derived]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_nothing_is_recorded_without_a_device() -> None:
    probe = graphprobe.instrument(torch.nn.Linear(4, 4))
    with pytest.raises(InputError, match="CUDA"):
        probe.recorded(torch.randn(2, 4))
    gm = graphprobe.capture(torch.nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(InputError, match="CUDA"):
        timing.lanes(gm, gm, (torch.randn(2, 4),), {}, recorded=True)


@pytest.mark.gpu
@pytest.mark.parametrize("checksum", [False, True])
def test_a_recorded_probe_tells_of_the_inputs_it_is_given(checksum: bool) -> None:
    model, kwargs = llama()
    probe = graphprobe.instrument(model, checksum=checksum)
    run = probe.recorded(**kwargs)
    for seed in (1, 2):
        _, other = llama(seed)
        wanted = probe(**other).logits.clone()
        eager = statistics(probe)
        found = run(**other)
        assert torch.equal(found.logits if hasattr(found, "logits") else found[0], wanted)
        assert statistics(probe) == eager and len(eager) > 40


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"exact": "never"}, {"exact": "always"}, {"exact": "never", "detailed": True}])
def test_recorded_lanes_measure_what_lanes_measure(options: dict[str, object]) -> None:
    model, kwargs = llama()
    before = graphprobe.capture(model, (), kwargs)
    model.model.layers[1].self_attn.scaling *= 1.01
    after = graphprobe.capture(model, (), kwargs)
    wanted = timing.lanes(before, after, (), kwargs, **options)().clone()
    run = timing.lanes(before, after, (), kwargs, **options, recorded=True)
    for _ in range(2):
        assert torch.equal(run().nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert wanted.count_nonzero() > 100


@pytest.mark.gpu
def test_a_compiled_graph_keeps_every_tap() -> None:
    model, kwargs = llama()
    probe = graphprobe.instrument(graphprobe.capture(model, (), kwargs))
    probe(**kwargs)
    eager = probe.taps
    for buffer in probe.graph.buffers():
        if buffer.dtype is torch.float64:
            buffer.zero_()
    compiled = torch.compile(probe.graph)
    with torch.no_grad():
        compiled(**kwargs)
    found = probe.taps
    assert [tap.name for tap in found] == [tap.name for tap in eager]
    for mine, theirs in zip(found, eager, strict=True):
        if not mine.derived:
            assert mine.rms == pytest.approx(theirs.rms, rel=0.05, abs=1e-3), mine.name


@pytest.mark.gpu
def test_generation_on_a_gpu_says_the_words_of_the_traced_model() -> None:
    model, kwargs = llama()
    options = {"max_new_tokens": 6, "do_sample": False}
    ids, forward = kwargs["input_ids"][:1, :5], model.forward
    said = []
    for chosen in ("eager", recorder := backend.Recorder()):
        torch.compiler.reset()
        model.forward = torch.compile(forward, backend=chosen)
        said.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options))
    assert torch.equal(*said)
    assert len(recorder.taps) > 20

"""What the tests of transforms share: captured tiny models with eager attention, and checks of a graph's metadata."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import GraphModule

import graphprobe
from graphprobe import provenance
from graphprobe.pipeline import Applied, NotApplied, Pipeline, Run, Transform, fresh_copy
from graphprobe_transforms import graphs
from models import tiny

DTYPES = (torch.float32, torch.bfloat16)


Captured = tuple[GraphModule, tuple[Any, ...], dict[str, Any]]

#: The shared graphs that the running test has asked for, and what they were when it did.
_asked_for: dict[tuple[str, torch.dtype], list[Any]] = {}


def captured(name: str, dtype: torch.dtype = torch.float32) -> Captured:
    """Capture one model of the corpus, a transformers model with attention written out.

    All tests share it and its weights: none may change it, which is checked when each ends. Who has to write into
    weights takes `with_own_weights`.
    """
    found = _captured(name, dtype)
    _asked_for.setdefault((name, dtype), _state(found[0]))
    return found


@functools.cache
def _captured(name: str, dtype: torch.dtype) -> Captured:
    model, args, kwargs = tiny(name, dtype)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return graphprobe.capture(model, args, kwargs), args, kwargs


def changed() -> list[str]:
    """Name the shared graphs that the running test has changed, and capture them anew for the next."""
    found = [key for key, was in _asked_for.items() if _state(_captured(*key)[0]) != was]
    _asked_for.clear()
    if found:
        _captured.cache_clear()
    return [name for name, _ in found]


def _state(gm: GraphModule) -> list[Any]:
    """Return what a graph computes, to be compared: its calls, and the bytes of its weights."""
    weights = [(path, id(t), _sum(t)) for path, t in (*gm.named_parameters(), *gm.named_buffers())]
    return [*weights, *((n.name, n.target, n.args, n.kwargs, tuple(n.meta)) for n in gm.graph.nodes)]


def _sum(tensor: torch.Tensor) -> int:
    return hash(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def with_own_weights(gm: GraphModule) -> GraphModule:
    """Return a copy whose weights may be written into."""
    gm = fresh_copy(gm)
    for path, parameter in list(gm.named_parameters()):
        owner, _, name = path.rpartition(".")
        setattr(gm.get_submodule(owner), name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return gm


def run(transform: Transform, name: str, dtype: torch.dtype = torch.float32) -> Run:
    """Run one transform over one model of the corpus."""
    return Pipeline((transform,)).run(captured(name, dtype)[0])


def matches(done: Run) -> tuple[str, ...]:
    """Return what the last step matched."""
    outcome = done.steps[-1].outcome
    return outcome.matches if isinstance(outcome, Applied) else ()


def reason(done: Run) -> str:
    """Return why the last step matched nothing."""
    outcome = done.steps[-1].outcome
    assert isinstance(outcome, NotApplied)
    return outcome.reason


def operators(gm: GraphModule, module: str) -> list[str]:
    """List the operators inside one module in graph order: 'linear', 'split_with_sizes', 'getitem', ..."""
    inside = [n for n in gm.graph.nodes if n.op == "call_function" and not graphs.is_assertion(n)]
    names = [provenance.target_name(n) for n in inside if f"{provenance.module_path(n)}.".startswith(f"{module}.")]
    return [name.split(".")[1] for name in names]


def assert_metadata(gm: GraphModule) -> None:
    """Every value has a ``val`` that is what its operation gives, and says where it came from."""
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            assert isinstance(node.meta.get("val"), torch.Tensor), node.name
        if node.op != "call_function" or graphs.is_assertion(node):
            continue
        assert node.meta.get("nn_module_stack"), node.name
        was = node.meta.get("val")
        now = graphs.evaluate(node) if node.all_input_nodes else was
        if isinstance(was, torch.Tensor):
            assert (was.shape, was.dtype, was.stride()) == (now.shape, now.dtype, now.stride()), node.name
        else:
            assert was is not None, node.name


def verdict(done: Run, name: str, dtype: torch.dtype) -> str:
    """Return graphprobe's own verdict on a run over a model of the corpus."""
    gm, args, kwargs = captured(name, dtype)
    return graphprobe.diff(gm, done.gm, args, kwargs, events=done.events).verdict

"""Plain functions, pass managers and lists of passes become transforms."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from graphprobe.errors import PipelineError
from graphprobe.pipeline.transform import Applied, NotApplied, Outcome, Transform, Unsaid

#: What a graph module holds about its own graph.
_OWN = ("_graph", "_code", "_lineno_map", "_prologue_start", "meta")
_NO_WORD = re.compile(r"\W+")


@dataclass(frozen=True)
class FunctionTransform:
    """A function ``(gm, **options)`` seen as a transform.

    It returns None or `gm` after changing it where it stands, another GraphModule, a ``PassResult``, the matches of
    ``torch.fx.replace_pattern``, whether it changed anything, or an Applied or NotApplied.
    """

    function: Callable[..., Any]
    name: str
    stage: str = "pattern_matcher"
    options: tuple[tuple[str, Any], ...] = ()

    def apply(self, gm: GraphModule) -> Outcome | Unsaid:
        """Call the function; what it returns in place of `gm` is moved into `gm`. Raises PipelineError."""
        result = self.function(gm, **dict(self.options))
        changed = True
        if hasattr(result, "graph_module") and hasattr(result, "modified"):  # a PassResult
            changed, result = bool(result.modified), result.graph_module
        if isinstance(result, torch.nn.Module):
            adopt(gm, result, self.name)
            return Unsaid() if changed else NotApplied("it says that it changed nothing")
        if isinstance(result, (Applied, NotApplied)):
            return result
        if result is None or result is True:
            return Unsaid()
        if result is False:
            return NotApplied("it says that it changed nothing")
        if isinstance(result, (list, tuple)):
            return _matches(result)
        raise PipelineError(
            f"{self.name} returned {type(result).__name__}: a transform returns None, the graph, a PassResult, "
            "whether it changed anything, or Applied(...) or NotApplied(...)"
        )


def _matches(found: Sequence[Any]) -> Outcome | Unsaid:
    anchors = [getattr(match, "anchor", None) for match in found]
    if not anchors:
        return NotApplied("the pattern was found nowhere")
    names = tuple(str(anchor.name) for anchor in anchors if isinstance(anchor, torch.fx.Node))
    return Applied(names) if len(names) == len(anchors) else Unsaid()


def adopt(gm: GraphModule, result: torch.nn.Module, name: str) -> None:
    """Move the content of another graph module into `gm`, which others hold. Raises PipelineError."""
    if result is gm:
        return
    if not isinstance(result, GraphModule):
        raise PipelineError(f"{name} returned a {type(result).__name__}, which is no graph and cannot be observed")
    for key, value in result.__dict__.items():
        if key not in _OWN and not key.endswith("_hooks"):
            gm.__dict__[key] = value
    gm.meta = {**gm.meta, **result.meta}
    graph, before = result.graph, gm.graph
    same_inputs = len(graph.find_nodes(op="placeholder")) == len(before.find_nodes(op="placeholder"))
    if type(graph._codegen) is CodeGen and same_inputs:  # retracing forgets how the graph is called
        graph._codegen = before._codegen
    gm.graph = graph


def from_any(value: Any, name: str = "") -> Iterator[Transform]:
    """Yield the transforms that a transform, a function, a pass manager or a list of such stands for.

    A list may also hold pairs (name, function). Raises PipelineError.
    """
    if isinstance(value, type):
        raise PipelineError(f"{value.__name__} is a class: give an instance, {value.__name__}(...)")
    if isinstance(value, Transform):
        yield value
    elif isinstance(getattr(value, "passes", None), (list, tuple)) and callable(value):
        yield from _from_manager(value)
    elif isinstance(value, functools.partial) and inspect.isfunction(value.func) and not value.args:
        options = tuple(sorted(value.keywords.items()))  # which a text can name
        yield FunctionTransform(value.func, name or function_name(value), options=options)
    elif callable(value):
        yield FunctionTransform(value, name or function_name(value))
    elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and callable(value[1]):
        yield from from_any(value[1], value[0])
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from from_any(one)
    else:
        raise PipelineError(
            f"{value!r:.80} is no transform: give a transform, a function of the graph, a torch PassManager, "
            "or a list of such"
        )


def _from_manager(manager: Any) -> Iterator[Transform]:
    """Yield a pass manager's passes in the order of its constraints, each to be observed on its own."""
    order = getattr(manager, "solve_constraints", None) or getattr(manager, "validate", None)
    if order is not None:
        order()
    check = getattr(manager, "check", None) if getattr(manager, "run_checks_after_each_pass", False) else None
    for _ in range(getattr(manager, "steps", 1)):
        for one in manager.passes:
            yield from from_any(_checked(one, check) if check else one, function_name(one))


def _checked(one: Callable[..., Any], check: Callable[..., Any]) -> Callable[..., Any]:
    def pass_and_check(gm: GraphModule) -> Any:
        result = one(gm)
        check(getattr(result, "graph_module", result) if result is not None else gm)
        return result

    return pass_and_check


def function_name(function: Callable[..., Any]) -> str:
    """Return a name fit for a file: the function's own, for a callable object or class the class's in lower case."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function):
        name = function.__name__
    else:
        kind = function if isinstance(function, type) else type(function)
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower()
    return _NO_WORD.sub("", name) or "function"

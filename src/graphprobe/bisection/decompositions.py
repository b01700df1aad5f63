"""``pipeline="decompositions"``: torch.export's decompositions, one operator a transform."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from graphprobe.bisection.oracle import deep_copy
from graphprobe.capturing import quiet, unlift
from graphprobe.errors import PipelineError
from graphprobe.pipeline import FunctionTransform, Pipeline
from graphprobe.program import program

NAME = "decompositions"
_ROUNDS = 50  # decompositions of decompositions end long before


def decompose(gm: GraphModule, op: str, args: Any = (), kwargs: Any = None) -> GraphModule:
    """Replace every call of one operator, "aten.softmax.int", by its decomposition.

    Raises PipelineError where torch has none for it.
    """
    found = {target: rule for target, rule in _table().items() if str(target) == op}
    if not found:
        raise PipelineError(f"torch.export has no decomposition of {op}")
    with torch.no_grad(), quiet():
        exported = torch.export.export(gm, tuple(args), dict(kwargs or {}), strict=False)
        return unlift(exported.run_decompositions(found))


def plan(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pipeline:
    """Return one transform for each operator of a graph that is decomposed, in the order in which they come up."""
    names = {str(target) for target in _table()}
    transforms: list[FunctionTransform] = []
    current, done = deep_copy(gm), set[str]()
    for _ in range(_ROUNDS):
        there = dict.fromkeys(str(node.target) for node in program(current, args, kwargs).gm.graph.nodes)
        fresh = [op for op in there if op in names and op not in done]
        if not fresh:
            break
        for op in fresh:
            done.add(op)
            transforms.append(_transform(op, args, kwargs))
            current = decompose(current, op, args, kwargs)
    return Pipeline(tuple(transforms))


def _transform(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FunctionTransform:
    def apply(gm: GraphModule) -> GraphModule:
        return decompose(gm, op, args, kwargs)

    return FunctionTransform(apply, f"decompose {op}")


def _table() -> dict[Any, Any]:
    table: Any = torch.export.default_decompositions()  # its methods have no types
    return dict(table.items())

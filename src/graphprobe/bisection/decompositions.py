"""``pipeline="decompositions"``: torch.export's decompositions, one operator a transform."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from graphprobe.bisection.oracle import deep_copy
from graphprobe.bisection.quantizing import INPUTS, inputs_of
from graphprobe.capturing import quiet, unlift
from graphprobe.errors import PipelineError
from graphprobe.pipeline import NotApplied, Outcome, Pipeline, Unsaid, fresh_copy
from graphprobe.pipeline.functions import adopt
from graphprobe.program import program

NAME = "decompositions"
_ROUNDS = 50  # decompositions of decompositions end long before


@dataclass(frozen=True)
class Decompose:
    """Every call of one operator, "aten.softmax.int", becomes what torch.export's decompositions make of it."""

    op: str
    stage: str = field(default="post_export", init=False)

    @property
    def name(self) -> str:
        """Names the operator."""
        return f"decompose {self.op}"

    def apply(self, gm: GraphModule) -> Outcome | Unsaid:
        """Decompose. Raises PipelineError where torch has no rule for the operator."""
        args, kwargs = inputs_of(gm)
        if all(str(node.target) != self.op for node in program(gm, args, kwargs).gm.graph.nodes):
            return NotApplied(f"there is no {self.op} in the graph")
        adopt(gm, decompose(gm, (self.op,), args, kwargs), self.name)
        return Unsaid()


def decompose(gm: GraphModule, ops: Collection[str], args: Any = (), kwargs: Any = None) -> GraphModule:
    """Replace every call of some operators, "aten.softmax.int", by its decomposition.

    Raises PipelineError where torch has none for one of them.
    """
    found = {target: rule for target, rule in _table().items() if str(target) in ops}
    if missing := set(ops) - set(map(str, found)):
        raise PipelineError(f"torch.export has no decomposition of {', '.join(sorted(missing))}")
    source = fresh_copy(gm)
    for node in source.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # what is decomposed may return other strides than it did
    for node in source.graph.nodes:  # a chain that each export makes longer, and copies for each node
        node.meta = {key: value for key, value in node.meta.items() if key != "from_node"}
    source.recompile()
    with torch.no_grad(), quiet():
        exported = torch.export.export(source, tuple(args), dict(kwargs or {}), strict=False)
        return unlift(exported.run_decompositions(found))


def plan(gm: GraphModule) -> Pipeline:
    """Return one transform for each operator of a graph that is decomposed, in the order in which they come up."""
    args, kwargs = inputs_of(gm)
    names = {str(target) for target in _table()}
    transforms: list[Decompose] = []
    current, done = deep_copy(gm), set[str]()
    for _ in range(_ROUNDS):
        there = dict.fromkeys(str(node.target) for node in program(current, args, kwargs).gm.graph.nodes)
        fresh = [op for op in there if op in names and op not in done]
        if not fresh:
            break
        done.update(fresh)
        transforms += map(Decompose, fresh)
        current = _decomposed(current, fresh, args, kwargs)
        current.meta[INPUTS] = (args, kwargs)
    return Pipeline(tuple(transforms))


def _decomposed(gm: GraphModule, ops: list[str], args: Any, kwargs: Any) -> GraphModule:
    """Decompose operators at once, which is quicker than one by one; where that fails, those that can be."""
    with contextlib.suppress(Exception):
        return decompose(gm, ops, args, kwargs)
    for op in ops:
        with contextlib.suppress(Exception):  # it is for a trial to say that this operator's rule fails
            gm = decompose(gm, (op,), args, kwargs)
    return gm


def _table() -> dict[Any, Any]:
    table: Any = torch.export.default_decompositions()  # its methods have no types
    return dict(table.items())

"""The native lanes of a probe graph: both sides as they are, on redrawn padding, and after's pieces on before's values.

Each lane is emitted as far as it is needed, in the order of its own graph; a forced node once per distinct frontier
above it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from graphprobe import nodes
from graphprobe.execute import replayed, target_of, zeroed
from graphprobe.lanes import elements
from graphprobe.lanes.emitting import emit
from graphprobe.lanes.plan import Plan
from graphprobe.lanes.regions import Origin, Region, origins
from graphprobe.program import Program


class NativeLanes:
    """Emits what the native lanes compute, and knows which node of the probe graph came from where."""

    def __init__(self, plan: Plan, graph: Graph) -> None:
        self.plan, self.graph = plan, graph
        self.paths: list[str] = []
        self.origin: dict[str, tuple[str, Node]] = {}
        self.native: dict[str, dict[Node, Node]] = {"before": {}, "free": {}, "before_redrawn": {}, "free_redrawn": {}}
        self._swept = dict.fromkeys(self.native, 0)
        self._forced: dict[tuple[Node, Origin], Node] = {}
        self._cast: dict[tuple[Node, torch.dtype], Node] = {}
        self.dead = plan.dead()
        self._placeholders()

    def _placeholders(self) -> None:
        paths = list(dict.fromkeys([*self.plan.before.inputs, *self.plan.after.inputs]))
        self._bind(paths, "", "before", "free")
        if self.plan.redraw:
            self._bind(paths, "redrawn:", "before_redrawn", "free_redrawn")

    def _bind(self, paths: list[str], prefix: str, lane_before: str, lane_free: str) -> None:
        made = {}
        for path in paths:
            made[path] = self.graph.placeholder(f"{prefix[:-1]}input_{len(self.paths)}")
            self.paths.append(prefix + path)
        for path, placeholder in made.items():
            x, y = self.plan.before.inputs.get(path), self.plan.after.inputs.get(path)
            if x is not None:
                self.native[lane_before][x] = placeholder
            if y is not None:
                self.native[lane_free][y] = self._as(placeholder, x, y) if x is not None else placeholder

    def _as(self, value: Node, x: Node, y: Node) -> Node:
        """Cast before's value to the dtype after takes there."""
        theirs, mine = nodes.tensor_val(x), nodes.tensor_val(y)
        if theirs is None or mine is None or theirs.dtype == mine.dtype:
            return value
        key = (value, mine.dtype)
        if key not in self._cast:
            self._cast[key] = emit(self.graph, elements.taken, (value, mine.dtype))
        return self._cast[key]

    def sweep(self, lane: str, upto: Node) -> None:
        """Emit a native lane's nodes up to and including `upto`."""
        program = self._program(lane)
        last = program.order[upto]
        env = self.native[lane]
        while self._swept[lane] <= last:
            node = program.live[self._swept[lane]]
            self._swept[lane] += 1
            if node in env or node.op in ("get_attr", "output") or (program is self.plan.after and node in self.dead):
                continue
            env[node] = self._emit(lane, node, lambda n: self.value(lane, n))

    def value(self, lane: str, node: Node) -> Node:
        """Return what a lane holds for a node that it has reached; a weight is read where it is first needed."""
        if node.op == "get_attr" and node not in self.native[lane]:
            side = "before" if lane.startswith("before") else "after"
            self.native[lane][node] = self.graph.get_attr(f"{side}.{node.target}")
        return self.native[lane][node]

    def _program(self, lane: str) -> Program:
        return self.plan.before if lane.startswith("before") else self.plan.after

    def _emit(self, lane: str, node: Node, operand: Callable[[Node], Node]) -> Node:
        args = torch.fx.map_arg(node.args, operand)
        kwargs = torch.fx.map_arg(node.kwargs, operand)
        assert callable(node.target)
        program = self._program(lane)
        if nodes.is_undefined(node):
            return self.made(lane, node, zeroed, (node.target, *args), kwargs)
        if node in program.seeds:
            return self.made(lane, node, replayed, (program.seeds[node], node.target, args, kwargs), {})
        return self.made(lane, node, target_of(node), args, kwargs)

    def made(self, lane: str, node: Node, target: Callable[..., Any], args: Any, kwargs: Any) -> Node:
        """Emit a call that stands for a node in one lane, under a name that says so."""
        made = emit(self.graph, target, args, kwargs, f"{lane}_{node.name}")
        self.origin[made.name] = (lane, node)
        if "val" in node.meta:
            made.meta["val"] = node.meta["val"]
        return made

    def forced(self, region: Region) -> dict[Node, Node]:
        """Evaluate after's piece on before's values; return its nodes in the probe graph."""
        pairs = {q: p for p, q in reversed(region.frontier)}
        env: dict[Node, Node] = {}
        starts = origins("after", region)
        for q, p in pairs.items():
            self.sweep("before", p) if p.op != "placeholder" else None
            env[q] = self._as(self.value("before", p), p, q)
        for q in region.loose_after:
            env[q] = self.value("free", q)
        for node in region.after:
            if node.op == "get_attr":
                env[node] = self.value("free", node)
                continue
            memo = (node, starts[node])
            if memo not in self._forced:
                self._forced[memo] = self._emit("forced", node, env.__getitem__)
            env[node] = self._forced[memo]
        return env

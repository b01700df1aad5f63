"""The exact lanes of a probe graph: both pieces of a region in float64, from before's values.

A node is evaluated once per distinct frontier above it; weights are raised where they are needed and live for one
region.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.lanes import exact
from graphprobe.lanes.emitting import emit
from graphprobe.lanes.native_lanes import NativeLanes
from graphprobe.lanes.regions import Origin, Region, origins


class ExactLanes:
    """Emits what the exact lanes compute."""

    def __init__(self, lanes: NativeLanes) -> None:
        self.lanes, self.plan, self.graph = lanes, lanes.plan, lanes.graph
        self._exact: dict[tuple[str, Node, Origin], Node] = {}
        self._lifted: dict[Node, Node] = {}  # native value of before -> its float64 copy
        self._weights: dict[int, Node] = {}  # float64 weights of the region being emitted

    def pieces(self, region: Region, forced: dict[Node, Node]) -> tuple[Node, Node]:
        """Evaluate both pieces of a region; `forced` are after's nodes in the forced lane."""
        self._weights = {}
        return self._piece("before", region, {}), self._piece("after", region, forced)

    def _piece(self, side: str, region: Region, forced: dict[Node, Node]) -> Node:
        """Evaluate one piece in float64 on before's values; return its last node."""
        piece: tuple[Node, ...] = getattr(region, side)
        env: dict[Node, Node] = {}
        starts = origins(side, region)
        for p, q in reversed(region.frontier):
            env[p if side == "before" else q] = self._raised(p)
        for leaf in region.loose_before if side == "before" else region.loose_after:
            lane = "before" if side == "before" else "free"
            env[leaf] = emit(self.graph, exact.lift, (self.lanes.native[lane][leaf],))
        for node in piece:
            if node.op == "get_attr":
                continue
            memo = (side, node, starts[node])
            if memo not in self._exact:
                native = self.lanes.native["before"] if side == "before" else forced
                self._exact[memo] = self._exact_node(side, node, env, native)
            env[node] = self._exact[memo]
        last = region.claim.before if side == "before" else region.claim.after
        return self._weight(side, last, raw=False) if last.op == "get_attr" else env[last]

    def _exact_node(self, side: str, node: Node, env: dict[Node, Node], native: dict[Node, Node]) -> Node:
        lane = f"exact_{side}"
        if exact.takes_native(node) or node.target in self.plan.native_only:
            return emit(self.graph, exact.lift, (native[node],))
        late = exact.lifts_late(node)

        def operand(n: Node) -> Node:
            if n.op == "get_attr":
                return self._weight(side, n, raw=n is late)
            return env[n]

        args = torch.fx.map_arg(node.args, operand)
        kwargs = torch.fx.map_arg(node.kwargs, operand)
        if late is not None:
            assert callable(node.target)
            made = self.lanes.made(lane, node, node.target, args, kwargs)
            return emit(self.graph, exact.lift, (made,))
        target, args, kwargs = exact.lifted_call(node, args, kwargs)
        return self.lanes.made(lane, node, target, args, kwargs)

    def _raised(self, p: Node) -> Node:
        if p not in self._lifted:
            value = self.lanes.value("before", p)
            mine = nodes.tensor_val(p)
            lifts = mine is None or mine.dtype in exact.LIFTED
            self._lifted[p] = emit(self.graph, exact.lift, (value,)) if lifts else value
        return self._lifted[p]

    def _weight(self, side: str, node: Node, raw: bool) -> Node:
        if side == "after" and node in self.plan.same_weight:
            side, node = "before", self.plan.same_weight[node]
        program = self.plan.before if side == "before" else self.plan.after
        lane = "before" if side == "before" else "free"
        read = self.lanes.value(lane, node)
        if raw:
            return read
        value = program.held(node)
        if not isinstance(value, torch.Tensor):
            return read
        if id(value) not in self._weights:
            self._weights[id(value)] = emit(self.graph, exact.lift, (read,))
        return self._weights[id(value)]

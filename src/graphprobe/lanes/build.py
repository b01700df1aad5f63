"""Build the probe graph: one FX graph in which all lanes of a comparison advance together from cut to cut.

Values die at their last use (FX's code generation sees to that), weights and their float64 copies are read where they
are needed and live for one region. A forced or exact node is evaluated once per distinct frontier above it.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from graphprobe import nodes
from graphprobe.execute import replayed, target_of, zeroed
from graphprobe.lanes import details, exact, measure
from graphprobe.lanes.plan import BUFFERS, DETAILS, Plan, Probe
from graphprobe.lanes.regions import Origin, Region, origins
from graphprobe.lanes.same import widened
from graphprobe.lanes.together import Together, small
from graphprobe.program import Program

#: Bytes from which on a value is compared with the free and the forced lane's one after the other, to save memory.
_LARGE = 1 << 28


def build(plan: Plan) -> Probe:
    """Return the probe graph for a plan. Its buffer ``slots`` has one row per region."""
    with _uncollected():
        return _Builder(plan).build()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Let the garbage collector wait: nothing that is built here is garbage, and it would be walked again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _Builder:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.root = torch.nn.Module()
        self.root.add_module("before", plan.before.gm)
        self.root.add_module("after", plan.after.gm)
        self.graph = Graph()
        self.paths: list[str] = []
        self.origin: dict[str, tuple[str, Node]] = {}
        self.native: dict[str, dict[Node, Node]] = {"before": {}, "free": {}, "before_redrawn": {}, "free_redrawn": {}}
        self.swept = dict.fromkeys(self.native, 0)
        self.forced: dict[tuple[Node, Origin], Node] = {}
        self.exact: dict[tuple[str, Node, Origin], Node] = {}
        self.lifted: dict[Node, Node] = {}  # native value of before -> its float64 copy
        self.cast: dict[tuple[Node, torch.dtype], Node] = {}
        self.weights: dict[int, Node] = {}  # float64 weights of the region being emitted
        self.dead = plan.dead()
        self.rows: dict[tuple[Node, Node], int] = {}  # claimed pair -> the row that measures it
        self.taken: list[tuple[int, int]] = []  # rows that are told by another one, and which

    def build(self) -> Probe:
        self._placeholders()
        self.slots, self.partials = (self.graph.get_attr(name) for name in BUFFERS)
        if self.plan.detailed:
            self.details = tuple(self.graph.get_attr(name) for name in DETAILS)
        self.together = Together(self.graph, self.slots, self.partials)
        regions = self.plan.regions
        for row, region in enumerate(regions):
            if row and row % measure.JOINED == 0:
                self._join(row - measure.JOINED, measure.JOINED)
            self._region(row, region)
            if self.plan.tick is not None and row % max(1, len(regions) // 100) == 0:
                self.graph.call_function(self.plan.tick, (row,))
        if regions:
            last = (len(regions) - 1) // measure.JOINED * measure.JOINED
            self._join(last, len(regions) - last)
        self.graph.output(None)
        for name in (*BUFFERS, *(DETAILS if self.plan.detailed else ())):
            self.root.register_buffer(name, torch.empty(0, dtype=torch.float64), persistent=False)
        self._stream()
        probe = Probe(self.root, self.graph, self.paths, self.origin, len(regions), self.plan.detailed)
        probe.place(torch.device("cpu"))
        return probe

    def _join(self, first: int, rows: int) -> None:
        self.together.flush()
        self.graph.call_function(measure.join, (self.slots, self.partials, first, rows))
        if self.plan.detailed:
            self.graph.call_function(details.join, (*self.details, first, rows))
        for row, source in self.taken:  # below the source, which is complete by now
            self.graph.call_function(measure.take, (self.slots, row, source))
        self.taken.clear()

    def _stream(self) -> None:
        """Let weights come when they are needed, where a side is not on the device itself."""
        streams = {"before": self.plan.before.stream, "after": self.plan.after.stream}
        for stream in dict.fromkeys(s for s in streams.values() if s is not None):
            sides = [side for side, mine in streams.items() if mine is stream]
            reads = [n for n in self.graph.nodes if n.op == "get_attr" and str(n.target).split(".")[0] in sides]
            stream.insert(self.root, self.graph, reads)

    # --- inputs -------------------------------------------------------------------------------------------------

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
        if key not in self.cast:
            self.cast[key] = self.graph.call_function(measure.taken, (value, mine.dtype))
        return self.cast[key]

    # --- native lanes -------------------------------------------------------------------------------------------

    def _sweep(self, lane: str, program: Program, upto: Node) -> None:
        """Emit a native lane's nodes up to and including `upto`."""
        last = program.order[upto]
        env, prefix = self.native[lane], "before" if lane.startswith("before") else "after"
        while self.swept[lane] <= last:
            node = program.live[self.swept[lane]]
            self.swept[lane] += 1
            if node in env or node.op in ("get_attr", "output") or (prefix == "after" and node in self.dead):
                continue
            env[node] = self._emit(lane, node, lambda n: self._native(lane, prefix, n))

    def _native(self, lane: str, prefix: str, node: Node) -> Node:
        if node.op == "get_attr" and node not in self.native[lane]:
            self.native[lane][node] = self.graph.get_attr(f"{prefix}.{node.target}")
        return self.native[lane][node]

    def _emit(self, lane: str, node: Node, operand: Callable[[Node], Node]) -> Node:
        args = torch.fx.map_arg(node.args, operand)
        kwargs = torch.fx.map_arg(node.kwargs, operand)
        assert callable(node.target)
        program = self.plan.before if lane.startswith("before") else self.plan.after
        if nodes.is_undefined(node):
            return self._made(lane, node, zeroed, (node.target, *args), kwargs)
        if node in program.seeds:
            return self._made(lane, node, replayed, (program.seeds[node], node.target, args, kwargs), {})
        return self._made(lane, node, target_of(node), args, kwargs)

    def _made(self, lane: str, node: Node, target: Callable[..., Any], args: Any, kwargs: Any) -> Node:
        """Emit a call that stands for a node in one lane, under a name that says so."""
        made = self.graph.create_node("call_function", target, args, kwargs, f"{lane}_{node.name}")
        self.origin[made.name] = (lane, node)
        if "val" in node.meta:
            made.meta["val"] = node.meta["val"]
        return made

    # --- one region ---------------------------------------------------------------------------------------------

    def _region(self, row: int, region: Region) -> None:
        x, y = region.claim.before, region.claim.after
        self._sweep("before", self.plan.before, x)
        if y in self.dead:
            return
        self._sweep("free", self.plan.after, y)
        b, f = self._native("before", "before", x), self._native("free", "after", y)
        if not _comparable(x, y):
            return
        moved, bounds = self._moved(x, y), measure.sentinel_bounds(x, y)
        self.rows[x, y] = row
        if self.plan.detailed:
            self.graph.call_function(details.compare, (*self.details, row, b, f, moved, bounds))
        if region in self.plan.repeated and region not in self.plan.exact_regions:
            narrow = widened(region) if moved is None else None
            source = self.rows.get(narrow) if narrow is not None else None
            if source is not None:
                self.taken.append((row, source))
            else:
                self._compare(row, region, (b, f, None), moved)
            return
        if _is_large(x):  # the free lane's value can go before the forced lane makes one
            self._call(measure.native, row, b, f, None, moved, bounds)
            forced = self._forced(region)
            self._call(measure.native, row, b, None, forced[y], moved, bounds)
        else:
            forced = self._forced(region)
            self._compare(row, region, (b, f, forced[y]), moved)
        if region in self.plan.exact_regions:
            self.weights = {}
            xb = self._exact("before", region, {})
            xa = self._exact("after", region, forced)
            self._call(measure.exact, row, b, forced[y], xb, xa, moved, bounds)

    def _compare(self, row: int, region: Region, lanes: tuple[Node, Node, Node | None], moved: Node | None) -> None:
        """Compare the native lanes, small values together with others."""
        x, y = region.claim.before, region.claim.after
        size = small(2 if lanes[2] is None else 3, x, y) if moved is None else None
        bounds = measure.sentinel_bounds(x, y)
        if size is None:
            self._call(measure.native, row, *lanes, moved, bounds)
        else:
            self.together.add(size, row, *lanes, bounds)

    def _call(self, function: Callable[..., None], row: int, *values: Node | measure.Bounds | None) -> None:
        self.graph.call_function(function, (self.slots, self.partials, row, *values))

    def _moved(self, x: Node, y: Node) -> Node | None:
        if not self.plan.redraw:
            return None
        self._sweep("before_redrawn", self.plan.before, x)
        mine = (self._native("before", "before", x), self._native("before_redrawn", "before", x))
        if self.plan.redraw == "before":
            return self.graph.call_function(measure.moved, mine)
        self._sweep("free_redrawn", self.plan.after, y)
        theirs = (self._native("free", "after", y), self._native("free_redrawn", "after", y))
        masks = [self.graph.call_function(measure.moved, pair) for pair in (mine, theirs)]
        return self.graph.call_function(measure.either, tuple(masks))

    def _forced(self, region: Region) -> dict[Node, Node]:
        """Evaluate after's piece on before's values; return its nodes in the probe graph."""
        pairs = {q: p for p, q in reversed(region.frontier)}
        env: dict[Node, Node] = {}
        starts = origins("after", region)
        for q, p in pairs.items():
            self._sweep("before", self.plan.before, p) if p.op != "placeholder" else None
            env[q] = self._as(self._native("before", "before", p), p, q)
        for q in region.loose_after:
            env[q] = self._native("free", "after", q)
        for node in region.after:
            if node.op == "get_attr":
                env[node] = self._native("free", "after", node)
                continue
            memo = (node, starts[node])
            if memo not in self.forced:
                self.forced[memo] = self._emit("forced", node, env.__getitem__)
            env[node] = self.forced[memo]
        return env

    # --- exact lanes --------------------------------------------------------------------------------------------

    def _exact(self, side: str, region: Region, forced: dict[Node, Node]) -> Node:
        """Evaluate one piece in float64 on before's values; return its last node."""
        piece: tuple[Node, ...] = getattr(region, side)
        env: dict[Node, Node] = {}
        starts = origins(side, region)
        for p, q in reversed(region.frontier):
            env[p if side == "before" else q] = self._lifted(p)
        for leaf in region.loose_before if side == "before" else region.loose_after:
            lane = "before" if side == "before" else "free"
            env[leaf] = self.graph.call_function(exact.lift, (self.native[lane][leaf],))
        for node in piece:
            if node.op == "get_attr":
                continue
            memo = (side, node, starts[node])
            if memo not in self.exact:
                native = self.native["before"] if side == "before" else forced
                self.exact[memo] = self._exact_node(side, node, env, native)
            env[node] = self.exact[memo]
        last = region.claim.before if side == "before" else region.claim.after
        return self._weight(side, last, raw=False) if last.op == "get_attr" else env[last]

    def _exact_node(self, side: str, node: Node, env: dict[Node, Node], native: dict[Node, Node]) -> Node:
        lane = f"exact_{side}"
        if exact.takes_native(node) or node.target in self.plan.native_only:
            return self.graph.call_function(exact.lift, (native[node],))
        late = exact.lifts_late(node)

        def operand(n: Node) -> Node:
            if n.op == "get_attr":
                return self._weight(side, n, raw=n is late)
            return env[n]

        args = torch.fx.map_arg(node.args, operand)
        kwargs = torch.fx.map_arg(node.kwargs, operand)
        if late is not None:
            assert callable(node.target)
            made = self._made(lane, node, node.target, args, kwargs)
            return self.graph.call_function(exact.lift, (made,))
        target, args, kwargs = exact.lifted_call(node, args, kwargs)
        return self._made(lane, node, target, args, kwargs)

    def _lifted(self, p: Node) -> Node:
        if p not in self.lifted:
            value = self._native("before", "before", p)
            mine = nodes.tensor_val(p)
            lifts = mine is None or mine.dtype in exact.LIFTED
            self.lifted[p] = self.graph.call_function(exact.lift, (value,)) if lifts else value
        return self.lifted[p]

    def _weight(self, side: str, node: Node, raw: bool) -> Node:
        if side == "after" and node in self.plan.same_weight:
            side, node = "before", self.plan.same_weight[node]
        program = self.plan.before if side == "before" else self.plan.after
        lane = "before" if side == "before" else "free"
        read = self._native(lane, side, node)
        if raw:
            return read
        value = program.held(node)
        if not isinstance(value, torch.Tensor):
            return read
        if id(value) not in self.weights:
            self.weights[id(value)] = self.graph.call_function(exact.lift, (read,))
        return self.weights[id(value)]


def _is_large(x: Node) -> bool:
    value = nodes.tensor_val(x)
    if value is None or not all(isinstance(size, int) for size in value.shape):
        return False
    return value.numel() * value.element_size() > _LARGE


def _comparable(x: Node, y: Node) -> bool:
    return nodes.shape(x) == nodes.shape(y) or nodes.tensor_val(x) is None or nodes.tensor_val(y) is None

"""Build the probe graph: one FX graph in which all lanes of a comparison advance together from cut to cut.

Values die at their last use (FX's code generation sees to that). What the lanes compute is emitted by `native_lanes`
and `exact_lanes`; here it is decided what is needed for each region, and in which order values are compared.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from torch.fx import Graph, Node

from graphprobe import nodes
from graphprobe.lanes import details, elements, measure
from graphprobe.lanes.emitting import emit
from graphprobe.lanes.exact_lanes import ExactLanes
from graphprobe.lanes.native_lanes import NativeLanes
from graphprobe.lanes.plan import BUFFERS, DETAILS, Plan, Probe
from graphprobe.lanes.regions import Region
from graphprobe.lanes.same import widened
from graphprobe.lanes.together import Together, small

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
        self.lanes = NativeLanes(plan, self.graph)
        self.exact = ExactLanes(self.lanes)
        self.rows: dict[tuple[Node, Node], int] = {}  # claimed pair -> the row that measures it
        self.taken: list[tuple[int, int]] = []  # rows that are told by another one, and which

    def build(self) -> Probe:
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
                emit(self.graph, self.plan.tick, (row,))
        if regions:
            last = (len(regions) - 1) // measure.JOINED * measure.JOINED
            self._join(last, len(regions) - last)
        self.graph.output(None)
        for name in (*BUFFERS, *(DETAILS if self.plan.detailed else ())):
            self.root.register_buffer(name, torch.empty(0, dtype=torch.float64), persistent=False)
        self._stream()
        probe = Probe(self.root, self.graph, self.lanes.paths, self.lanes.origin, len(regions), self.plan.detailed)
        probe.place(torch.device("cpu"))
        return probe

    def _join(self, first: int, rows: int) -> None:
        self.together.flush()
        emit(self.graph, measure.join, (self.slots, self.partials, first, rows))
        if self.plan.detailed:
            emit(self.graph, details.join, (*self.details, first, rows))
        for row, source in self.taken:  # below the source, which is complete by now
            emit(self.graph, measure.take, (self.slots, row, source))
        self.taken.clear()

    def _stream(self) -> None:
        """Let weights come when they are needed, where a side is not on the device itself."""
        streams = {"before": self.plan.before.stream, "after": self.plan.after.stream}
        for stream in dict.fromkeys(s for s in streams.values() if s is not None):
            sides = [side for side, mine in streams.items() if mine is stream]
            reads = [n for n in self.graph.nodes if n.op == "get_attr" and str(n.target).split(".")[0] in sides]
            stream.insert(self.root, self.graph, reads)

    def _region(self, row: int, region: Region) -> None:
        x, y = region.claim.before, region.claim.after
        self.lanes.sweep("before", x)
        if y in self.lanes.dead:
            return
        self.lanes.sweep("free", y)
        b, f = self.lanes.value("before", x), self.lanes.value("free", y)
        if not _comparable(x, y):
            return
        moved, bounds = self._moved(x, y), elements.sentinel_bounds(x, y)
        self.rows[x, y] = row
        if self.plan.detailed:
            emit(self.graph, details.compare, (*self.details, row, b, f, moved, bounds))
        if region in self.plan.repeated and region not in self.plan.exact_regions:
            narrow = widened(region) if moved is None else None
            source = self.rows.get(narrow) if narrow is not None else None
            if source is not None:
                self.taken.append((row, source))
            else:
                self._compare(row, region, (b, f, None), moved, bounds)
            return
        if _is_large(x):  # the free lane's value can go before the forced lane makes one
            self._call(measure.native, row, b, f, None, moved, bounds)
            forced = self.lanes.forced(region)
            self._call(measure.native, row, b, None, forced[y], moved, bounds)
        else:
            forced = self.lanes.forced(region)
            self._compare(row, region, (b, f, forced[y]), moved, bounds)
        if region in self.plan.exact_regions:
            self._call(measure.exact, row, b, forced[y], *self.exact.pieces(region, forced), moved, bounds)

    def _compare(
        self,
        row: int,
        region: Region,
        lanes: tuple[Node, Node, Node | None],
        moved: Node | None,
        bounds: elements.Bounds,
    ) -> None:
        """Compare the native lanes, small values together with others."""
        x, y = region.claim.before, region.claim.after
        size = small(2 if lanes[2] is None else 3, x, y) if moved is None else None
        if size is None:
            self._call(measure.native, row, *lanes, moved, bounds)
        else:
            self.together.add(size, row, *lanes, bounds)

    def _call(self, function: Callable[..., None], row: int, *values: Node | elements.Bounds | None) -> None:
        emit(self.graph, function, (self.slots, self.partials, row, *values))

    def _moved(self, x: Node, y: Node) -> Node | None:
        if not self.plan.redraw:
            return None
        self.lanes.sweep("before_redrawn", x)
        mine = (self.lanes.value("before", x), self.lanes.value("before_redrawn", x))
        if self.plan.redraw == "before":
            return emit(self.graph, elements.moved, mine)
        self.lanes.sweep("free_redrawn", y)
        theirs = (self.lanes.value("free", y), self.lanes.value("free_redrawn", y))
        masks = [emit(self.graph, elements.moved, pair) for pair in (mine, theirs)]
        return emit(self.graph, elements.either, tuple(masks))


def _is_large(x: Node) -> bool:
    value = nodes.tensor_val(x)
    if value is None or not all(isinstance(size, int) for size in value.shape):
        return False
    return value.numel() * value.element_size() > _LARGE


def _comparable(x: Node, y: Node) -> bool:
    return nodes.shape(x) == nodes.shape(y) or nodes.tensor_val(x) is None or nodes.tensor_val(y) is None

"""Small comparisons that wait for each other, so that a GPU makes many of them in one launch.

What waits is alive a little longer: `HELD` bytes at most in all lanes, and never beyond the join of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Graph, Node

from graphprobe import nodes
from graphprobe.lanes import elements, measure
from graphprobe.lanes.emitting import emit

#: So many comparisons wait at most, each of values of so many bytes, holding so many bytes together.
SEVERAL, SMALL, HELD = 32, 1 << 20, 8 << 20


@dataclass
class Together:
    """The comparisons that wait in a probe graph that is being built."""

    graph: Graph
    slots: Node
    partials: Node
    waiting: list[tuple[int, Node, Node, Node | None, elements.Bounds]] = field(default_factory=list)
    held: int = 0

    def add(self, size: int, row: int, b: Node, f: Node, r: Node | None, bounds: elements.Bounds) -> None:
        """Let a comparison wait whose values take `size` bytes in all lanes."""
        if len(self.waiting) == SEVERAL or self.held + size > HELD:
            self.flush()
        self.waiting.append((row, b, f, r, bounds))
        self.held += size

    def flush(self) -> None:
        """Make all comparisons that wait."""
        if len(self.waiting) == 1:
            row, b, f, r, bounds = self.waiting[0]
            emit(self.graph, measure.native, (self.slots, self.partials, row, b, f, r, None, bounds))
        elif self.waiting:
            columns = tuple(tuple(column) for column in zip(*self.waiting, strict=True))
            emit(self.graph, measure.native_several, (self.slots, self.partials, *columns))
        self.waiting.clear()
        self.held = 0


def small(lanes: int, *values: Node) -> int | None:
    """Return how many bytes values take in so many lanes; None where they are large, or no operation made them."""
    size = 0
    for value in values:
        tensor = nodes.tensor_val(value)
        if value.op != "call_function" or tensor is None or not all(isinstance(n, int) for n in tensor.shape):
            return None
        size = max(size, tensor.numel() * tensor.element_size())
    return lanes * size if size <= SMALL else None

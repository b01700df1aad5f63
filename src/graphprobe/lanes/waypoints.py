"""Values of before that the lanes leave behind: a second look goes on from them, and need not run all from the inputs.

At a few places of the run what is alive of the before lane is kept, and before's outputs: next to nothing beside the
weights, and never more than `LIMIT`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node

from graphprobe.execute import Values
from graphprobe.lanes.plan import Probe

PLACES = 8
LIMIT = 64 * 2**20  # bytes that are kept at most


class Waypoints:
    """Collects values while a probe graph is walked."""

    def __init__(self, probe: Probe, outputs: Iterable[Node]) -> None:
        self.values: Values = {}
        self._origin = probe.origin
        self._outputs = set(outputs)
        self._every = max(1, len(probe.graph.nodes) // PLACES)
        self._bytes = 0
        self._met: set[int] = set()  # memory that is counted already

    def passed(self, place: int, node: Node, env: Mapping[Node, Any]) -> None:
        """Take note that the probe graph's node at a place has been evaluated."""
        mine = self._of_before(node)
        if mine is not None and mine in self._outputs:
            self._keep(mine, env.get(node))
        if place % self._every == 0:
            for other, value in env.items():
                mine = self._of_before(other)
                if mine is not None:
                    self._keep(mine, value)

    def _of_before(self, node: Node) -> Node | None:
        lane, mine = self._origin.get(node.name, ("", None))
        return mine if lane == "before" else None

    def _keep(self, node: Node, value: Any) -> None:
        if node in self.values or not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return
        memory = value.untyped_storage()
        if memory.data_ptr() not in self._met:
            if self._bytes + memory.nbytes() > LIMIT:
                return
            self._met.add(memory.data_ptr())
            self._bytes += memory.nbytes()
        self.values[node] = value

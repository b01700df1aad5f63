"""What a probe graph is to hold, and the probe graph itself with what is known of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from graphprobe.lanes import details, measure
from graphprobe.lanes.regions import Region
from graphprobe.program import Program

#: The buffers of a probe graph: the rows, and partial results; and those of `lanes.details`.
BUFFERS, DETAILS = ("slots", "partials"), ("details", "details_partials")


@dataclass
class Plan:
    """What the probe graph is to hold."""

    before: Program
    after: Program
    regions: Sequence[Region]
    exact_regions: set[Region] = field(default_factory=set)  # regions whose exact lanes run
    repeated: set[Region] = field(default_factory=set)  # regions whose forced lane would only repeat before's
    same_weight: dict[Node, Node] = field(default_factory=dict)  # after's weight -> before's that it stands for
    redraw: str = ""  # lanes on redrawn padding that say where nobody cares: "", "before", "both"
    broken: set[Node] = field(default_factory=set)  # nodes of after that raise: they and all below are left out
    native_only: set[Any] = field(default_factory=set)  # operators that have no float64 form
    tick: Callable[[int], None] | None = None
    detailed: bool = False  # whether before and after are also compared in every detail

    def dead(self) -> set[Node]:
        """Return the nodes of after that cannot be run: those that raise, and all below."""
        dead = set(self.broken)
        for node in self.after.live if dead else ():
            if any(operand in dead for operand in node.all_input_nodes):
                dead.add(node)
        return dead


@dataclass
class Probe:
    """The probe graph, the buffer its comparisons write into, and where each of its nodes came from."""

    root: torch.nn.Module
    graph: Graph
    paths: list[str]  # input path of each placeholder; redrawn inputs carry the prefix "redrawn:"
    origin: dict[str, tuple[str, Node]]  # name in the probe graph -> (lane, node of before or after)
    rows: int
    detailed: bool = False

    @functools.cached_property
    def gm(self) -> GraphModule:
        """The graph as a module: to print, to compile, to capture. Generating its code takes a while."""
        return GraphModule(self.root, self.graph)

    @property
    def slots(self) -> torch.Tensor:
        """The buffer, one row per region."""
        return self.root.get_buffer("slots")

    @property
    def details(self) -> torch.Tensor | None:
        """The buffer of `lanes.details`, None where nobody asked for it."""
        return self.root.get_buffer("details") if self.detailed else None

    def place(self, device: torch.device) -> None:
        """Make new, empty buffers on the device where the values will be."""
        found = dict(zip(BUFFERS, measure.buffers(self.rows, device), strict=True))
        if self.detailed:
            found |= dict(zip(DETAILS, details.buffers(self.rows, device), strict=True))
        for module in (self.root, self.__dict__.get("gm")):
            if module is not None:
                for name, buffer in found.items():
                    module.register_buffer(name, buffer, persistent=False)

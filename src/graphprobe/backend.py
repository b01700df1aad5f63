"""A backend of torch.compile that taps what cannot be captured whole: `torch.compile(model, backend="graphprobe")`.

Dynamo cuts a model into graphs where it must. Each is instrumented and run as it stands, so a model returns bit for bit
what it returns under ``torch.compile(model, backend="eager")``. That is what it returns uncompiled, unless it asks
whether it is being traced: transformers, for one, builds its attention masks otherwise then.

``torch.compile`` finds the backend by its name; a `Recorder` of one's own keeps models apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from graphprobe.records import Tap
from graphprobe.taps import instrument_graph
from graphprobe.taps.copies import copied
from graphprobe.taps.rows import META, Sizes, Table, bind


class Recorder:
    """A backend: ``torch.compile(model, backend=recorder)``. It instruments every graph that Dynamo hands over."""

    def __init__(self) -> None:
        self._graphs: list[_Graph] = []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Instrument one graph; called by Dynamo. Raises InputError where it cannot be."""
        graph = _Graph(gm)
        self._graphs.append(graph)
        return graph

    @property
    def graphs(self) -> tuple[GraphModule, ...]:
        """The instrumented graphs, in the order in which Dynamo found them."""
        return tuple(graph.module for graph in self._graphs)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The statistics of the last run of every graph, in the order in which Dynamo found them.

        Names are "graph0/linear"; graphs that have not run yet are left out. Reading synchronises with the device.
        """
        return tuple(
            replace(tap, name=f"graph{index}/{tap.name}", of=f"graph{index}/{tap.of}" if tap.of else "")
            for index, graph in enumerate(self._graphs)
            for tap in graph.taps()
        )

    def clear(self) -> None:
        """Forget all graphs; call ``torch.compiler.reset()`` too, or Dynamo goes on with those it has."""
        self._graphs.clear()


class _Graph:
    """One graph of Dynamo's, instrumented."""

    def __init__(self, gm: GraphModule) -> None:
        self.source = copied(gm)
        for node in self.source.graph.nodes:
            if "example_value" in node.meta:
                node.meta.setdefault("val", node.meta["example_value"])
        with torch.inference_mode(False):
            self.module = instrument_graph(self.source)
        self.sizes: Sizes | None = None

    def __call__(self, *args: Any) -> Any:
        table: Table = self.module.meta[META]
        self.sizes = bind(self.module, args, {}) if table.is_dynamic else {}
        for name in table.stats:
            self.module.get_buffer(name).zero_()
        return self.module(*args)

    def taps(self) -> tuple[Tap, ...]:
        if self.sizes is None:
            return ()
        table: Table = self.module.meta[META]
        return table.taps(table.snapshot(self.module), self.sizes)


#: What ``backend="graphprobe"`` uses.
default = Recorder()


def graphprobe(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Instrument a graph of ``torch.compile(model, backend="graphprobe")``; `backend.default` tells the taps."""
    return default(gm, example_inputs)

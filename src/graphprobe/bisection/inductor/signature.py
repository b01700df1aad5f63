"""How a graph is called before and after AOTAutograd, which changes the signature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from graphprobe import torch_private
from graphprobe.pipeline import fresh_copy


@dataclass
class Adapter:
    """How the graph after AOTAutograd is called in the way of the graph before it."""

    inputs: tuple[Any, ...] = ()  # for each of its placeholders: an index into the outer inputs, or a tensor it holds
    outputs: tuple[int, ...] = ()  # which of its outputs are the outer ones, in their order

    def adapted(self, gm: GraphModule, names: Iterable[str]) -> GraphModule:
        """Return a copy with the outer calling convention; `names` are those of the outer placeholders."""
        source = fresh_copy(gm)
        graph = Graph()
        outer = [graph.placeholder(name) for name in names]
        made: dict[Node, Node] = {}
        for place, given in zip(source.graph.find_nodes(op="placeholder"), self.inputs, strict=True):
            if isinstance(given, int):
                made[place] = outer[given]
                outer[given].meta = dict(place.meta)
            else:
                made[place] = self._constant(source, graph, place, given)
        for node in source.graph.nodes:
            if node.op == "output":
                flat = list(node.args[0])
                kept = [flat[i] for i in self.outputs]
                graph.output(tuple(made[v] if isinstance(v, Node) else v for v in kept))
            elif node.op != "placeholder":
                made[node] = graph.node_copy(node, made.__getitem__)
        return GraphModule(source, graph)

    @staticmethod
    def _constant(gm: GraphModule, graph: Graph, place: Node, value: Any) -> Node:
        name = f"_held_{place.name}"
        gm.register_buffer(name, value)
        read = graph.get_attr(name)
        read.meta = dict(place.meta)
        return read


def output_count(gm: GraphModule) -> int:
    """Return how many values a graph returns."""
    return len(list(next(iter(gm.graph.find_nodes(op="output"))).args[0]))


def returned(gm: GraphModule) -> tuple[int, int]:
    """Return how many inputs a graph behind AOTAutograd hands back first, and how many outputs of the model follow."""
    context = torch_private.fetch("tracing_context")()
    metadata = getattr(context, "fw_metadata", None)
    if metadata is None:
        return 0, output_count(gm)
    return len(metadata.mutated_inp_runtime_indices), len(metadata.output_info)


def adapter(
    counts: tuple[int, int, tuple[int, int]], outer: Sequence[Any], inner: Sequence[Any], held: Sequence[Any]
) -> tuple[Adapter | None, str]:
    """Say how the inner graph is called in the outer way, or why it cannot be.

    `counts` are the outputs of the outer and of the inner graph, and what `returned` says of the inner one.
    """
    wanted, there, (first, count) = counts
    if count != wanted or first + count > there:
        return None, f"it returns {there} values for the {wanted} of the Dynamo graph"
    left = list(range(len(outer)))
    found: list[Any] = []
    for value in inner:
        index = next((i for i in left if _is_same(value, outer[i])), None)
        if index is not None:
            left.remove(index)
            found.append(index)
        elif any(_is_same(value, one) for one in held):
            found.append(value.detach())
        else:
            return None, "one of its inputs is none of the Dynamo graph's"
    return Adapter(tuple(found), tuple(range(first, first + count))), ""


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        return alike and one.data_ptr() == other.data_ptr() and one.numel() > 0
    return type(one) is type(other) and not isinstance(one, torch.Tensor) and bool(one == other)

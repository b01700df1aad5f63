"""What is computed twice from the same inputs is computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from graphprobe import nodes
from graphprobe.pipeline import Applied, NotApplied, Outcome
from graphprobe_transforms import graphs


@dataclass(frozen=True)
class MergeCommon:
    """Merge common subexpressions, reads of the same weight included.

    A graph that writes into its tensors is left alone: equal calls need not give equal values there. Tried on llama,
    qwen2, qwen3, mistral, gpt2 and bert.
    """

    name: ClassVar[str] = "merge_common"
    stage: ClassVar[str] = "post_export"

    def apply(self, gm: GraphModule) -> Outcome:
        """Merge every node of `gm` into the first of its kind."""
        writer = next((node for node in gm.graph.nodes if nodes.is_mutating(node)), None)
        if writer is not None:
            return NotApplied("the graph writes into its tensors", writer.name)
        first: dict[Any, Node] = {}
        merged: list[str] = []
        for node in list(gm.graph.nodes):
            key = _key(node)
            twin = node if key is None else first.setdefault(key, node)
            if twin is not node:
                merged.append(node.name)
                graphs.merge(node, twin)
        if not merged:
            return NotApplied("nothing is computed twice")
        graphs.tidy(gm, ())
        return Applied(tuple(merged))


def _key(node: Node) -> Any:
    """Return what two nodes have in common that compute the same, None for nodes that are never merged."""
    if node.op == "get_attr":
        return node.op, node.target
    if node.op != "call_function" or nodes.is_random(node) or nodes.returns_nothing(node) or node.is_impure():
        return None
    return node.target, _hashable(node.args), _hashable(node.kwargs)


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple, tuple(_hashable(v) for v in value)
    if isinstance(value, dict):
        return dict, tuple((k, _hashable(v)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return slice, _hashable((value.start, value.stop, value.step))
    if isinstance(value, torch.Tensor):
        return id(value)
    return type(value), repr(value) if isinstance(value, float) else value  # 0.0 and -0.0 are equal, but not the same

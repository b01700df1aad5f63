"""What a graph's placeholders stand for in one call, and shapes and dtypes for graphs that carry none."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Interpreter, Node

from graphprobe import nodes


def placeholder_values(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Node, Any]:
    """Map placeholders to what they receive when `gm` is called with these arguments."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is None or info.in_spec is None:
        given = dict(zip(placeholders, args, strict=False))
        return {**given, **{node: kwargs[node.target] for node in placeholders if node.target in kwargs}}
    order = info.in_spec.child(1).context or []
    leaves = pytree.tree_leaves((args, {name: kwargs[name] for name in order if name in kwargs}))
    return dict(zip(placeholders, leaves, strict=False))


def is_complete(gm: GraphModule) -> bool:
    """Whether every node that makes values tells what it makes."""
    return all("val" in node.meta for node in gm.graph.nodes if nodes.makes_values(node) or node.op == "placeholder")


def fill(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set the missing ``meta["val"]`` of `gm` for inputs of these shapes, by a run on fake tensors.

    A node that fails there, and those that need what it returns, stay without.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values = pytree.tree_map_only(torch.Tensor, mode.from_tensor, placeholder_values(gm, args, kwargs))
    with mode, torch.no_grad():
        _Filler(gm).run(initial_env=values)
    for node, value in values.items():
        if node.op == "placeholder":
            node.meta.setdefault("val", value)


_UNKNOWN = object()


class _Filler(Interpreter):
    """Runs a graph, writes down what every node returns, and goes on where one fails."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)

    def run_node(self, n: Node) -> Any:
        if n.op in ("placeholder", "output") or any(self.env[source] is _UNKNOWN for source in n.all_input_nodes):
            return _UNKNOWN
        try:
            value = super().run_node(n)
        except Exception:
            return _UNKNOWN
        n.meta.setdefault("val", value)
        return value

"""Weights that are tensor subclasses (quantised ones, mostly) laid open: the plain tensors inside become weights.

Export reads them through ``export.access_subclass_inner_tensor``; lanes and digests need what they hold.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch.fx import GraphModule, Node

_ACCESS = "access_subclass_inner_tensor"


def has_subclasses(gm: GraphModule) -> bool:
    """Whether the graph reads the inner tensors of a subclass."""
    return any(_is_access(node) for node in gm.graph.nodes)


def unwrapped(gm: GraphModule) -> GraphModule:
    """Return a copy of the graph in which every read of an inner tensor is a weight of its own; names are kept."""
    with warnings.catch_warnings():  # about torch's own pytree classes, which the calling convention holds
        warnings.simplefilter("ignore", FutureWarning)
        graph = copy.deepcopy(gm.graph)
    copied = GraphModule(gm, graph, type(gm).__name__)
    for old, new in zip(gm.graph.nodes, copied.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    for node in list(copied.graph.nodes):
        outer = node.args[0] if _is_access(node) else None
        if not isinstance(outer, Node) or outer.op != "get_attr":
            continue
        inner = getattr(_fetch(gm, str(outer.target)), str(node.args[1]))
        attribute = f"{str(outer.target).replace('.', '_')}_{node.args[1]}"
        copied.register_buffer(attribute, inner, persistent=False)
        with copied.graph.inserting_before(node):
            read = copied.graph.get_attr(attribute)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
        copied.graph.erase_node(node)
        if not outer.users:
            copied.graph.erase_node(outer)
    copied.recompile()
    return copied


def _is_access(node: Node) -> bool:
    return node.op == "call_function" and _ACCESS in str(node.target)


def _fetch(root: torch.nn.Module, target: str) -> Any:
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value

"""Which nodes share storage, and which operation wrote it last."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes

_IN_PLACE = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.imatmul}


class Aliases:
    """The storages of a graph, followed from node to node in graph order through `visit`."""

    def __init__(self) -> None:
        self._roots: dict[Node, Node] = {}
        self._writers: dict[Node, str] = {}

    def visit(self, node: Node) -> None:
        """Take the next node of the graph."""
        source = self._shared(node)
        self._roots[node] = node if source is None else self.root(source)
        if source is None:
            copied = _copied(node)
            self._writers[node] = self.writer(copied) if copied is not None else node.name

    def root(self, node: Node) -> Node:
        """Return the node whose storage this one uses; itself where it has its own."""
        return self._roots.get(node, node)

    def writer(self, node: Node) -> str:
        """Return the name under which the present content of the node's storage was observed."""
        return self._writers.get(self.root(node), self.root(node).name)

    def wrote(self, node: Node, name: str) -> None:
        """Note that the node's storage got new content, observed under `name`."""
        self._writers[self.root(node)] = name

    def _shared(self, node: Node) -> Node | None:
        if returns_written(node):
            return written(node)[0]
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            source = node.args[0]
            return source if nodes.is_view(source) else None
        source_of_view = _source(node) if nodes.is_view(node) else None
        if source_of_view is None or _copied(node) is not None:
            return None
        return source_of_view


def written(node: Node) -> list[Node]:
    """Return the nodes whose tensors this node writes into."""
    if not nodes.is_mutating(node) or node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        found: list[Node] = []
        for index, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
                found += _nodes_in(value)
        return found
    first = node.args[0] if node.args else None
    return [first] if isinstance(first, Node) else []


def returns_written(node: Node) -> bool:
    """Whether what the node returns is the tensor that it wrote into: ``add_``, ``copy_``, ``add.out``."""
    if not written(node) or node.target is operator.setitem:
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    returns = node.target._schema.returns
    return len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write


def _nodes_in(value: Any) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    return [item for item in value if isinstance(item, Node)] if isinstance(value, (list, tuple)) else []


def _source(node: Node) -> Node | None:
    return next((arg for arg in node.args if isinstance(arg, Node)), None)


def _copied(node: Node) -> Node | None:
    """Return what a copying operation copies: equal values, storage of its own."""
    if not nodes.is_view(node):
        return None
    source, name = _source(node), nodes.schema_name(node)
    if source is None:
        return None
    if name == "aten::clone" or name.endswith("_copy"):
        return source
    if name in ("aten::reshape", "aten::flatten", "aten::contiguous") and not _viewable(source, node):
        return source
    return None


def _viewable(source: Node, node: Node) -> bool:
    """Whether a reshape comes back as a view: known from the strides. Unknown counts as a view."""
    before, after = nodes.tensor_val(source), nodes.tensor_val(node)
    if before is None or after is None:
        return True
    if not all(isinstance(d, int) for d in (*before.shape, *before.stride(), *after.shape)):
        return True
    if nodes.schema_name(node) == "aten::contiguous":
        return before.is_contiguous()
    try:
        torch.empty_strided(before.shape, before.stride(), device="meta").view(after.shape)
    except RuntimeError:
        return False
    return True

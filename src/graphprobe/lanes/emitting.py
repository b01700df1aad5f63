"""How a call gets into a probe graph that is being built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node


def emit(
    graph: Graph, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Any = None, name: str | None = None
) -> Node:
    """Append a call. Its arguments are set behind `create_node`, which walks those it is given as a tree, in search of
    symbolic numbers: that takes longer than all else about a node."""
    made = graph.create_node("call_function", target, name=name)
    made.args = args
    if kwargs:
        made.kwargs = kwargs
    return made

"""What no input reaches is computed now and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from graphprobe import nodes
from graphprobe.pipeline import Applied, NotApplied, Outcome
from graphprobe_transforms import graphs


@dataclass(frozen=True)
class FoldConstants:
    """Compute nodes that depend on no input and store their values: masks, positions, rotary tables.

    A value of more than `max_elements` elements is left to be computed, and so is what is only a view of a weight, what
    the graph returns or writes into, and what is made of codes: folded, a quantised weight would be a wide one again.
    Tried on llama, qwen2, qwen3, mistral, gpt2 and bert.
    """

    max_elements: int = 1 << 24
    name: ClassVar[str] = "fold_constants"
    stage: ClassVar[str] = "post_load_fusion"

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every constant that something else uses in `gm`."""
        constant = constants(gm)
        needed = [n for n in constant if any(user not in constant for user in graphs.users(n))]
        stored = [n for n in needed if self._is_worth_it(n)]
        if not stored:
            return NotApplied("every value depends on an input, is a weight, is returned, written into or too large")
        values = evaluate(gm, constant, stored)
        made = [self._replace(gm, node, values[node]) for node in stored]
        graphs.erase_unused(reversed(list(constant)))
        names = tuple(node.name for node in stored)
        graphs.tidy(gm, made)
        return Applied(names)

    def _is_worth_it(self, node: Node) -> bool:
        value = graphs.tensor(node)
        if node.op != "call_function" or value is None or value.numel() > self.max_elements:
            return False
        return not _is_returned(node)  # the caller might write into what the next call returns

    def _replace(self, gm: GraphModule, node: Node, value: torch.Tensor) -> Node:
        new = graphs.insert_buffer(gm, node, f"_folded_{node.name}", value, like=node)
        graphs.replace(node, new)
        return new


def constants(gm: GraphModule) -> dict[Node, None]:
    """Return the nodes that depend on no input, in graph order; views of weights alone are none."""
    fixed: dict[Node, None] = {}
    plain: set[Node] = set()  # weights, and views of them
    written = graphs.written(gm)
    for node in gm.graph.nodes:
        if node in written:
            continue
        if node.op == "get_attr":
            plain |= set() if _holds_codes(node) else {node}
            continue
        sources = node.all_input_nodes
        if node.op != "call_function" or not all(s in fixed or s in plain for s in sources) or not _is_pure(node):
            continue
        if sources and nodes.is_view(node) and all(s in plain for s in sources):
            plain.add(node)
        else:
            fixed[node] = None
    return fixed


def _holds_codes(node: Node) -> bool:
    value = graphs.tensor(node)
    return value is not None and value.dtype.itemsize == 1 and value.dtype != torch.bool


def _is_returned(node: Node) -> bool:
    return any(user.op == "output" or (nodes.is_view(user) and _is_returned(user)) for user in node.users)


def _is_pure(node: Node) -> bool:
    return not (nodes.is_random(node) or nodes.is_mutating(node) or nodes.returns_nothing(node) or node.is_impure())


def evaluate(gm: GraphModule, constant: dict[Node, None], wanted: list[Node]) -> dict[Node, torch.Tensor]:
    """Compute the wanted constants natively."""
    env: dict[Node, Any] = {}

    def value(source: Node) -> Any:
        if source not in env:  # a weight or a view of one
            env[source] = graphs.weight(gm, source) if source.op == "get_attr" else run(source)
        return env[source]

    def run(node: Node) -> Any:
        assert callable(node.target)
        args: Any = map_arg(node.args, value)
        kwargs: Any = map_arg(node.kwargs, value)
        return node.target(*args, **kwargs)

    with torch.no_grad():
        for node in constant:
            env[node] = run(node)
    return {node: env[node].detach().clone() for node in wanted}

"""Where two graphs of one model differ, found by reading them: how many places a planted defect really changed.

Nodes are matched in graph order by operator, constants, module and the content of the weights they read. What has no
match was changed, and so was a matched node that is wired otherwise. Changed nodes that touch, or that feed the same
slot of a matched node (the one stands in place of the other), are one place. Nothing here runs a graph or asks the
judge.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphprobe import provenance
from graphprobe.program import fetch

Place = frozenset[str]  # names of changed nodes, "before:" or "after:" in front


def places(before: GraphModule, after: GraphModule) -> list[Place]:
    """Return the places in which two graphs differ."""
    left, right = _operations(before), _operations(after)
    labels = [[_label(gm, n) for n in mine] for gm, mine in ((before, left), (after, right))]
    joined = _Joined()
    partner: dict[Node, Node] = {}
    matcher = difflib.SequenceMatcher(None, *labels, autojunk=False)
    for kind, i, j, k, m in matcher.get_opcodes():
        if kind == "equal":
            partner.update(zip(left[i:j], right[k:m], strict=True))
        else:
            joined.add([("before", n) for n in left[i:j]])
            joined.add([("after", n) for n in right[k:m]])
    matched = set(partner.values())
    for x, y in partner.items():
        pairs = list(zip(_operands(x), _operands(y), strict=True))
        if any(_wired_otherwise(p, q, partner, matched) for p, q in pairs):
            joined.add([("before", x), ("after", y)])
            joined.join(("before", x), ("after", y))
        for p, q in pairs:
            if p not in partner and q not in matched:
                joined.join(("before", p), ("after", q))
    for side, nodes in (("before", left), ("after", right)):
        for node in nodes:
            for operand in _operands(node):
                joined.join((side, node), (side, operand))
    return joined.groups()


def inside(found: Iterable[Place], before: GraphModule, after: GraphModule, module: str) -> int:
    """Count the places that hold an operation of a module."""
    homes = {
        f"{side}:{n.name}": provenance.module_path(n)
        for side, gm in (("before", before), ("after", after))
        for n in gm.graph.nodes
    }
    return sum(any(_within(homes[name], module) for name in place) for place in found)


def _within(path: str, module: str) -> bool:
    return path == module or not module or path.startswith(module + ".")


def _operations(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op not in ("get_attr", "output") and "_assert_" not in str(n.target)]


def _operands(node: Node) -> list[Node]:
    """Return what a node is fed, in order and as often as it is; weights are part of the label."""
    found: list[Node] = []
    torch.fx.map_arg((node.args, node.kwargs), found.append)
    return [n for n in found if n.op != "get_attr"]


def _label(gm: GraphModule, node: Node) -> tuple[Any, ...]:
    """Return what a node does, without what it is fed: operator, constants, weights by content, module."""
    if node.op == "placeholder":
        return ("input", str(node.target))

    def shown(n: Node) -> str:
        return f"weight {_digest(fetch(gm, str(n.target)))}" if n.op == "get_attr" else "operand"

    args, kwargs = (torch.fx.map_arg(v, shown) for v in (node.args, node.kwargs))
    return (str(node.target), repr(args), repr(kwargs), provenance.module_path(node))


def _digest(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    flat = value.detach().contiguous().reshape(-1)
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha1(flat.view(torch.uint8).numpy().tobytes()).hexdigest()}"


def _wired_otherwise(p: Node, q: Node, partner: dict[Node, Node], matched: set[Node]) -> bool:
    """Whether two operands that stand in the same slot are not each other; both changed is the change above."""
    if p in partner or q in matched:
        return partner.get(p) is not q
    return False


class _Joined:
    """Groups of changed nodes: union and find."""

    def __init__(self) -> None:
        self._up: dict[tuple[str, Node], tuple[str, Node]] = {}

    def add(self, members: list[tuple[str, Node]]) -> None:
        for member in members:
            self._up.setdefault(member, member)

    def join(self, one: tuple[str, Node], other: tuple[str, Node]) -> None:
        """Make two changed nodes one place; nodes that were not changed are no concern."""
        if one in self._up and other in self._up:
            self._up[self._root(one)] = self._root(other)

    def _root(self, member: tuple[str, Node]) -> tuple[str, Node]:
        while self._up[member] != member:
            member = self._up[member]
        return member

    def groups(self) -> list[Place]:
        found: dict[tuple[str, Node], set[str]] = {}
        for member in self._up:
            found.setdefault(self._root(member), set()).add(f"{member[0]}:{member[1].name}")
        return [frozenset(group) for group in found.values()]

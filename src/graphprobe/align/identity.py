"""Evidence 2, identity: a node that still carries the id it got at capture claims the node it came from."""

from __future__ import annotations

from collections import defaultdict

from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.matching import Matching
from graphprobe.program import Program


def claim(matching: Matching) -> None:
    """Claim nodes by id. One id may have reached several nodes (a decomposition): then the last of each side.

    Where a decomposition ends in a view (a linear becomes addmm and a view of it), that view is what is claimed.
    """
    left, right = _by_id(matching.before), _by_id(matching.after)
    for id, ys in right.items():
        xs = left.get(id)
        if not xs:
            continue
        made_before, made_after = _making(xs), _making(ys)
        if [provenance.target_name(x) for x in made_before] == [provenance.target_name(y) for y in made_after]:
            pairs = list(zip(made_before, made_after, strict=True))
        else:
            pairs = [(x, _made(matching, x, y)) for x, y in _last_of_equal_shape(xs, ys)]
        for x, y in pairs:
            if nodes.shape(x) == nodes.shape(y) and not matching.alignment.of_after.get(y):
                matching.add(x, y, "id", certain=True)


def _made(matching: Matching, x: Node, y: Node) -> Node:
    """Return what made the values of a view, where it has the view's shape and order already."""
    if nodes.makes_values(y):
        return y
    root, steps = matching.terms("after").root(y)
    return root if not steps and nodes.makes_values(root) and nodes.shape(root) == nodes.shape(x) else y


def _making(group: list[Node]) -> list[Node]:
    return [n for n in group if nodes.makes_values(n)]


def _last_of_equal_shape(xs: list[Node], ys: list[Node]) -> list[tuple[Node, Node]]:
    """Pair what the two groups hand on; only where values were made on both sides."""
    if not _making(xs) or not _making(ys):
        return []
    x, y = xs[-1], ys[-1]
    # a trailing view that only one side has is stepped over, where what it views has the right shape
    for mine in (x, _making(xs)[-1]):
        for theirs in (y, _making(ys)[-1]):
            if nodes.shape(mine) == nodes.shape(theirs) and nodes.tensor_val(mine) is not None:
                return [(mine, theirs)]
    return []


def _by_id(program: Program) -> dict[tuple[str, int], list[Node]]:
    found: dict[tuple[str, int], list[Node]] = defaultdict(list)
    for node in program.live:
        id = provenance.node_id(node)
        if id is not None and (nodes.makes_values(node) or nodes.is_view(node)):
            found[id].append(node)
    return found

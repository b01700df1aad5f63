"""Evidence 2, identity: a node that still carries the id it got at capture claims the node it came from."""

from __future__ import annotations

from collections import defaultdict

from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.claims import Alignment, Claim
from graphprobe.program import Program


def claim(before: Program, after: Program, alignment: Alignment) -> None:
    """Claim nodes by id. One id may have reached several nodes (a decomposition): then the last of each side."""
    left, right = _by_id(before), _by_id(after)
    for id, ys in right.items():
        xs = left.get(id)
        if not xs:
            continue
        if [provenance.target_name(x) for x in xs] == [provenance.target_name(y) for y in ys]:
            pairs = list(zip(xs, ys, strict=True))
        else:
            pairs = [(xs[-1], ys[-1])]
        for x, y in pairs:
            if nodes.shape(x) == nodes.shape(y) and not alignment.of_after.get(y):
                alignment.add(Claim(x, y, "id"))


def _by_id(program: Program) -> dict[tuple[str, int], list[Node]]:
    found: dict[tuple[str, int], list[Node]] = defaultdict(list)
    for node in program.live:
        id = provenance.node_id(node)
        if id is not None and nodes.makes_values(node):
            found[id].append(node)
    return found

"""Evidence 3, occurrence: the k-th operator of its kind and shape in a module claims the k-th of the other side."""

from __future__ import annotations

from collections import defaultdict

from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.claims import Alignment, Claim
from graphprobe.program import Program

Key = tuple[str, str, tuple[int | str, ...] | None]


def claim(before: Program, after: Program, alignment: Alignment) -> None:
    """Claim by (module path, operator, shape, occurrence), where both sides hold the same number of them."""
    left = _groups(before, alignment.of_before)
    right = _groups(after, alignment.of_after)
    for key, ys in right.items():
        xs = left.get(key, [])
        if len(xs) == len(ys):
            for x, y in zip(xs, ys, strict=True):
                alignment.add(Claim(x, y, "occurrence", certain=False))


def _groups(program: Program, claimed: dict[Node, list[Claim]]) -> dict[Key, list[Node]]:
    found: dict[Key, list[Node]] = defaultdict(list)
    for node in program.live:
        if nodes.makes_values(node) and not claimed.get(node):
            found[provenance.module_path(node), provenance.target_name(node), nodes.shape(node)].append(node)
    return found

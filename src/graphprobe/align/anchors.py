"""Evidence 4, anchors: an operation on a weight that stands once on each side claims its counterpart."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.claims import Alignment, Claim
from graphprobe.program import Program

Digest = tuple[Any, ...]


def claim(before: Program, after: Program, alignment: Alignment) -> None:
    """Claim by (operator, content of its weights, shape), where that stands exactly once on each side."""
    left = _anchors(before, alignment.of_before)
    right = _anchors(after, alignment.of_after)
    for key, ys in right.items():
        xs = left.get(key, [])
        if len(xs) == len(ys) == 1:
            alignment.add(Claim(xs[0], ys[0], "weight", certain=False))


def _anchors(program: Program, claimed: dict[Node, list[Claim]]) -> dict[Digest, list[Node]]:
    found: dict[Digest, list[Node]] = defaultdict(list)
    for node in program.live:
        if not nodes.makes_values(node):
            continue
        weights = [_through_views(n) for n in node.all_input_nodes]
        digests = [digest(program, n) for n in weights if n.op == "get_attr"]
        if digests and len(digests) < len(weights):
            key = (provenance.target_name(node), nodes.shape(node), tuple(digests))
            found[key].append(node)
    # what is claimed already still counts towards "exactly once", but is not claimed again
    return {key: found_ for key, found_ in found.items() if not any(claimed.get(n) for n in found_)}


def _through_views(node: Node) -> Node:
    while nodes.is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def digest(program: Program, node: Node) -> Digest:
    """Name a weight by its content: sorted shape, sum, sum of squares and extremes, rounded as bf16 would.

    Blind to dtype and transposition, so that a weight that was cast or laid out anew keeps its name.
    """
    known: dict[str, Digest] = program.__dict__.setdefault("_digests", {})
    name = str(node.target)
    if name not in known:
        value = program.attribute(node)
        known[name] = _digest(value.detach()) if isinstance(value, torch.Tensor) else (repr(value),)
    return known[name]


def _digest(value: torch.Tensor) -> Digest:
    shape = tuple(sorted(int(d) for d in value.shape))
    if value.numel() == 0 or value.dtype.is_complex or value.device.type == "meta":
        return shape
    work = value.to(torch.bfloat16).float() if value.dtype.is_floating_point else value.float()
    low, high = torch.aminmax(work)
    numbers = (low, high, work.abs().mean(), work.mean() / (work.abs().mean() + 1e-30))
    return (*shape, *(f"{float(x):.2g}" for x in numbers))

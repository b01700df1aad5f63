"""Evidence by definition: what was rounded to codes and back claims what it was before, if it nearly holds the same."""

from __future__ import annotations

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.matching import Matching
from graphprobe.align.sketches import sketches
from graphprobe.chains import CASTS, chains
from graphprobe.quantizers import DEQUANTIZERS

NEAR = 0.15  # 4 bits a number change it by some percent; what is farther off is another value
_STEPS = 8
_BACK = {"aten::mul", "aten::div", "aten::sub", "aten::add", *CASTS, *DEQUANTIZERS}


def claim(matching: Matching) -> None:
    """Claim, below every chain of codes of after, the values that equal a claimed one above it."""
    before, after, of_after = matching.before, matching.after, matching.alignment.of_after
    pairs: dict[Node, set[Node]] = {}  # what may be dequantised -> nodes of before it may stand for
    for chain in chains(after.live):
        above = _partners(matching, chain.source)
        for y in _below(chain.last) if above else ():
            if not of_after.get(y):
                pairs.setdefault(y, set()).update(x for x in above if nodes.shape(x) == nodes.shape(y))
    wanted = sorted({x for xs in pairs.values() for x in xs}, key=before.order.__getitem__)
    if not wanted or matching.bound is None:
        return
    left, right = sketches(before, matching.bound, wanted), sketches(after, matching.bound, list(pairs))
    for y, xs in pairs.items():
        distances = {x: _distance(left[x], right[y]) for x in xs if x in left and y in right}
        best = min(distances, key=distances.__getitem__, default=None)
        if best is not None and distances[best] <= NEAR:
            matching.add(best, y, "codes")


def _partners(matching: Matching, source: Node) -> set[Node]:
    """Return the nodes of before that stand for the source of a chain, or for something a few steps above it."""
    before, after = matching.before, matching.after
    inputs = {node: path for path, node in after.inputs.items()}
    found: set[Node] = set()
    stack, seen = [(source, 0)], {source}
    while stack:
        node, steps = stack.pop()
        found.update(c.before for c in matching.alignment.of_after.get(node, ()))
        if node in inputs and inputs[node] in before.inputs:
            found.add(before.inputs[inputs[node]])
        for operand in node.all_input_nodes if steps < _STEPS else ():
            if operand not in seen:
                seen.add(operand)
                stack.append((operand, steps + 1))
    return {x for x in found if x in before.order}


def _below(codes: Node) -> list[Node]:
    """Return the floating values a few steps below codes: scaled, shifted and cast, but not combined otherwise."""
    found: list[Node] = []
    stack, seen = [(codes, 0)], {codes}
    while stack:
        node, steps = stack.pop()
        value = nodes.tensor_val(node)
        if node is not codes and value is not None and value.dtype.is_floating_point and nodes.makes_values(node):
            found.append(node)
        for user in node.users if steps < _STEPS else ():
            if user not in seen and (nodes.is_view(user) or nodes.schema_name(user) in _BACK):
                seen.add(user)
                stack.append((user, steps + 1))
    return found


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    if x.shape != y.shape:
        return float("inf")
    return float(torch.linalg.vector_norm(y - x) / torch.linalg.vector_norm(x))

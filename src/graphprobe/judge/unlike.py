"""Which operations of a guilty piece the same module does in none of the other layers.

Where the two versions are written differently, nothing of a piece has a partner on the other side, and any of its
operations may be the wrong one. But a layer is repeated, and a defect mostly lies in one of them: what this layer does
and the others do not is to blame before what all of them do.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from graphprobe import provenance

Kind = tuple[Any, ...]


def unlike_siblings(candidates: Sequence[Node]) -> list[Node]:
    """Return those that their module does more often here than in any other layer; none where no layer is repeated."""
    places = {node: provenance.repeated(provenance.module_path(node)) for node in candidates}
    wanted = {pattern for pattern, index in places.values() if index}
    targets = {node.target for node in candidates}
    counts: dict[tuple[str, Kind], Counter[tuple[str, ...]]] = defaultdict(Counter)
    layers: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for node in next(iter(candidates)).graph.nodes if wanted else ():
        pattern, index = provenance.repeated(provenance.module_path(node))
        if pattern in wanted and node.op == "call_function":
            layers[pattern].add(index)
            if node.target in targets:
                counts[pattern, _kind(node)][index] += 1

    def is_unlike(node: Node) -> bool:
        pattern, index = places[node]
        others = layers[pattern] - {index}
        count = counts[pattern, _kind(node)]
        return bool(others) and all(count[other] < count[index] for other in others)

    return [node for node in candidates if is_unlike(node)]


def _kind(node: Node) -> Kind:
    """Describe what a node does and to the results of what, without any name."""

    def described(operand: Node) -> Any:
        return f"<{operand.op if operand.op != 'call_function' else provenance.target_name(operand)}>"

    return provenance.target_name(node), repr(torch.fx.map_arg((node.args, node.kwargs), described))

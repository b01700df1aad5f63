"""Which operations of a guilty piece the same module does in none of the other layers.

Where the two versions are written differently, nothing of a piece has a partner on the other side, and any of its
operations may be the wrong one. But a layer is repeated, and a defect mostly lies in one of them: what this layer does
and the others do not is to blame before what all of them do. Without module paths the layers are what repeats.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import Graph, Node

from graphprobe import nodes, provenance
from graphprobe.align.periods import repeats


def unlike_siblings(candidates: Sequence[Node], radius: int = 1) -> list[Node]:
    """Return those that their module does more often here than in any other layer; none where no layer is repeated.

    What a node does is what it does to the results of which operators. With `radius` 0 it is the operator alone; with
    2 and 3 it is farther up, too: so what uses that which only this layer lacks shows.
    """
    if not candidates:
        return []
    places = {node: provenance.repeated(provenance.module_path(node)) for node in candidates}
    if any(index for _, index in places.values()):
        wanted = {pattern for pattern, index in places.values() if index}
        every = {n: provenance.repeated(provenance.module_path(n)) for n in candidates[0].graph.nodes}
        places = {n: place for n, place in every.items() if place[0] in wanted}
    else:
        places = {n: ("", (str(layer),)) for n, layer in _layers(candidates[0].graph).items()}
    if radius > 1 and not all(node in places for node in candidates):
        return []  # what lies in no layer may itself be to blame for what is fed otherwise
    return _unlike(candidates, places, radius)


Place = tuple[str, tuple[str, ...]]  # what the layers share, and which of them it is


def _unlike(candidates: Sequence[Node], places: Mapping[Node, Place], radius: int) -> list[Node]:
    targets = {node.target for node in candidates}
    counts: dict[tuple[str, Any], Counter[tuple[str, ...]]] = defaultdict(Counter)
    layers: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for node, (pattern, index) in places.items():
        if node.op == "call_function":
            layers[pattern].add(index)
            if node.target in targets:
                counts[pattern, _kind(node, radius)][index] += 1

    def is_unlike(node: Node) -> bool:
        if node not in places:
            return False
        pattern, index = places[node]
        others = layers[pattern] - {index}
        count = counts[pattern, _kind(node, radius)]
        return bool(others) and all(count[other] < count[index] for other in others)

    return [node for node in candidates if is_unlike(node)]


_KNOWN: WeakKeyDictionary[Graph, tuple[int, Mapping[Node, int]]] = WeakKeyDictionary()


def _layers(graph: Graph) -> Mapping[Node, int]:
    """Number the layers of a graph without module paths; asked for every finding, read once."""
    known = _KNOWN.get(graph)
    if known is None or known[0] != len(graph.nodes):
        found = repeats(graph.output_node().all_input_nodes)
        known = _KNOWN[graph] = len(graph.nodes), found.layers(found.rows[0]) if found else {}
    return known[1]


def _kind(node: Node, radius: int) -> Any:
    """Describe what a node does and to the results of what, so many steps upwards, without any name."""
    node = nodes.shown(node)
    if node.op != "call_function":
        return node.op
    if not radius:
        return provenance.target_name(node)
    if node.all_input_nodes and all(n.op == "get_attr" for n in node.all_input_nodes) and nodes.is_view(node):
        return provenance.target_name(node), "a part of a weight"  # of a stack each layer takes another
    operands = {n: repr(_kind(n, radius - 1)) for n in node.all_input_nodes}
    return provenance.target_name(node), repr(torch.fx.map_arg((node.args, node.kwargs), operands.__getitem__))

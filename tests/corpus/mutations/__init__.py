"""A generator of graph changes with known truth: one operation of an exported graph is made wrong, or rewritten
benignly. `draw` picks a kind and a place, `strip` takes evidence away from the changed graph.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from corpus.mutations.benign import BENIGN
from corpus.mutations.defects import DEFECTS
from corpus.mutations.graphs import Change, fork

__all__ = ["BENIGN", "DEFECTS", "Change", "Mutant", "draw", "fork", "reaching", "strip"]


@dataclass(frozen=True)
class Mutant:
    """One changed graph."""

    gm: GraphModule
    change: str
    nodes: tuple[str, ...]  # the node drawn, and the one that carries the change where that is another
    benign: bool


def draw(gm: GraphModule, rng: random.Random, benign: bool) -> Mutant | None:
    """Draw a kind of change, then a place for it; None where the drawn kind applies nowhere."""
    table = BENIGN if benign else DEFECTS
    return apply(gm, rng, rng.choice(list(table)), benign)


def apply(gm: GraphModule, rng: random.Random, kind: str, benign: bool) -> Mutant | None:
    """Draw a place for one kind of change; None where it applies nowhere."""
    table = BENIGN if benign else DEFECTS
    live = reaching(gm)
    names = [n.name for n in gm.graph.nodes if n.op == "call_function" and n in live]
    rng.shuffle(names)
    copied = fork(gm)
    by_name = {n.name: n for n in copied.graph.nodes}
    for name in names:
        made = table[kind](copied, by_name[name])
        if made is not None:
            copied.graph.lint()
            copied.recompile()
            carries = made.name if made.name not in by_name else name
            return Mutant(copied, kind, tuple(dict.fromkeys((name, carries))), benign)
    return None


def reaching(gm: GraphModule) -> set[Node]:
    """Return the nodes that reach an output."""
    output = next(n for n in gm.graph.nodes if n.op == "output")
    found, stack = set(), list(output.all_input_nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def strip(gm: GraphModule, level: str) -> GraphModule:
    """Take evidence away: "ids" keeps all, "modules" drops ids, "values" drops all metadata and every name."""
    out = fork(gm)
    for i, node in enumerate(out.graph.nodes):
        if level != "ids":
            node.meta.pop("custom", None)
        if level == "values":
            node.meta = {k: v for k, v in node.meta.items() if k == "val"}
            if node.op == "call_function":
                node.name = f"n{i}"
    out.recompile()
    return out

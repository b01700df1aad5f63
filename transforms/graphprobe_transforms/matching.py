"""The frame of a pattern transform: find anchors, match around each, replace what matched, say what did not and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torch.fx import GraphModule, Node

from graphprobe.pipeline import Applied, NotApplied, Outcome
from graphprobe.provenance import module_path
from graphprobe_transforms import graphs
from graphprobe_transforms.graphs import Target, is_call

M = TypeVar("M")


def anchors(gm: GraphModule, where: str, *targets: Target) -> list[Node]:
    """Return the calls of one of `targets` in modules that match the glob `where`."""
    return [n for n in gm.graph.nodes if is_call(n, *targets) and graphs.is_at(module_path(n), where)]


def rewrite(
    gm: GraphModule,
    candidates: Iterable[Node],
    match: Callable[[Node], M | NotApplied],
    fuse: Callable[[GraphModule, M], Sequence[Node]],
    nothing: str,
) -> Outcome:
    """Match around one candidate after the other and replace what matches; `fuse` returns what stands for the old.

    A match bears the module path of the first of these. Without candidates the reason is `nothing`, without matches it
    is the reason that most of the candidates have.
    """
    misses: list[NotApplied] = []
    made: list[list[Node]] = []
    for candidate in candidates:
        found = match(candidate) if not candidate._erased else None
        if isinstance(found, NotApplied):
            misses.append(found)
        elif found is not None:
            made.append(list(fuse(gm, found)))
    if not made:
        if not misses:
            return NotApplied(nothing)
        common, _ = Counter(miss.reason for miss in misses).most_common(1)[0]
        return next(miss for miss in misses if miss.reason == common)
    names = tuple(module_path(nodes[0]) or nodes[0].name for nodes in made)
    graphs.tidy(gm, [node for nodes in made for node in nodes])
    return Applied(names)

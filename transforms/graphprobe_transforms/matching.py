"""The frame of a pattern transform: find anchors, match around each, replace what matched, say what did not and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch.fx import GraphModule, Node

from graphprobe.pipeline import Applied, NotApplied, Outcome, commonest
from graphprobe.provenance import module_path
from graphprobe_transforms import graphs
from graphprobe_transforms.graphs import Target, is_call

M = TypeVar("M")


def unknown(*nodes: Any) -> NotApplied | None:
    """Return a miss where the shape and dtype of one of the nodes are not known, because a transform lost them."""
    for node in nodes:
        if isinstance(node, Node) and graphs.tensor(node) is None:
            return NotApplied("the meta['val'] of a node is missing, so that shapes and dtypes are unknown", node.name)
    return None


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

    A match bears the module path of the first of these. Where something is written in place, amid the match, into what
    it reads, there is none: it would be read at another moment. Without candidates the reason is `nothing`, without
    matches it is the reason that most of the candidates have.
    """
    misses: list[NotApplied] = []
    made: list[list[Node]] = []
    writers = graphs.writers(gm)
    for candidate in candidates:
        if candidate._erased:
            continue
        found = match(candidate)
        if not isinstance(found, NotApplied) and (writer := _writer_amid(found, writers)):
            found = NotApplied("something writes into a value that the match reads", writer.name)
        if isinstance(found, NotApplied):
            misses.append(found)
        else:
            made.append(list(fuse(gm, found)))
    if not made:
        return commonest(misses) if misses else NotApplied(nothing)
    names = tuple(graphs.place(nodes[0]) for nodes in made)
    graphs.tidy(gm, [node for nodes in made for node in nodes])
    return Applied(names, tuple(misses))


def _writer_amid(match: Any, writers: dict[Node, set[Node]]) -> Node | None:
    if not writers:
        return None
    mine = set(_nodes(match))
    read = mine.union(*(node.all_input_nodes for node in mine))
    first, last = min(mine), max(mine)
    amid = (node for node in writers if not node._erased and first < node < last)
    return next((node for node in amid if not writers[node].isdisjoint(read)), None)


def _nodes(match: Any) -> Iterator[Node]:
    if isinstance(match, Node):
        yield match
    elif dataclasses.is_dataclass(match):
        for field in dataclasses.fields(match):
            yield from _nodes(getattr(match, field.name))
    elif isinstance(match, tuple):
        for one in match:
            yield from _nodes(one)

"""Watch a graph while a transform works on it: what it creates, erases, rewrites, and what it claims to be equal.

The one place that uses FX's private node hooks (``GraphModule._register_{create,erase,replace}_node_hook``, seen in
torch 2.11 to 2.14). Assignments to ``node.args`` or ``node.target`` fire none, so snapshots are compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphprobe.errors import PipelineError
from graphprobe.records import Replacement


@dataclass
class Observation:
    """What one transform did to a graph, by node name; filled when the watch ends.

    A node in the body of a control-flow operator is named with the body's path: "true_graph_0/sin".
    """

    replacements: tuple[Replacement, ...] = ()
    created: tuple[str, ...] = ()
    erased: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()  # kept its place, but has another target, other arguments or reads another weight
    retraced: bool = False  # the graph was replaced as a whole, so that names are all that could be compared

    @property
    def changed(self) -> bool:
        """Whether the graph computes anything else than before, or the same in another way."""
        return bool(self.created or self.erased or self.rewritten)


@dataclass
class _Record:
    """The raw events: nodes, not names, because a transform may rename."""

    created: list[Node] = field(default_factory=list)
    erased: list[Node] = field(default_factory=list)
    moves: dict[Node, dict[Node, None]] = field(default_factory=dict)  # old -> where its users went, in order


@contextmanager
def watch(gm: GraphModule, transform: str = "") -> Iterator[Observation]:
    """Observe ``gm.graph`` inside the block; `transform` is the author whose name the claims will bear.

    Raises PipelineError where this torch has no node hooks.
    """
    gm.graph.owning_module = gm  # hooks fire on the owner, and a shallow copy of gm may have taken the graph over
    observation, record, graph = Observation(), _Record(), gm.graph
    start, bodies = {node: _Seen.of(gm, node) for node in gm.graph.nodes}, _bodies(gm)
    with _hooked(gm, _hooks(record, {node.name: node for node in start})):
        yield observation
    if gm.graph is graph:
        _by_event(observation, record, start, gm, transform)
    else:  # the transform put another graph in its place: names are all that is left
        observation.retraced = True
        _by_name(observation, {seen.name: seen for seen in start.values()}, _named(gm, ""))
    _by_name(observation, bodies, _bodies(gm))


@dataclass(frozen=True)
class _Seen:
    """What a node was at one moment."""

    name: str
    target: Any
    args: Any
    kwargs: Any
    reads: tuple[Any, int] | None = None  # of a ``get_attr``: the object, and how often it has been written into

    @staticmethod
    def of(gm: GraphModule, node: Node) -> _Seen:
        reads = None
        if node.op == "get_attr":
            found: Any = gm
            for part in str(node.target).split("."):
                found = getattr(found, part, None)
            counted = isinstance(found, torch.Tensor) and not found.is_inference()
            reads = (found, found._version if counted else 0)
        return _Seen(node.name, node.target, node.args, node.kwargs, reads)

    def reads_as(self, other: _Seen) -> bool:
        """Whether both read the same memory, or none."""
        if self.reads is None or other.reads is None:
            return self.reads is other.reads
        return self.reads[0] is other.reads[0] and self.reads[1] == other.reads[1]


def _bodies(gm: GraphModule) -> dict[str, _Seen]:
    """Return the nodes of all graphs inside a graph, by their names behind the path of the body."""
    inner = [(path, one) for path, one in gm.named_modules() if path and isinstance(one, GraphModule)]
    return {name: seen for path, one in inner for name, seen in _named(one, f"{path}/").items()}


def _named(gm: GraphModule, prefix: str) -> dict[str, _Seen]:
    return {f"{prefix}{node.name}": _Seen.of(gm, node) for node in gm.graph.nodes}


def _by_event(
    observation: Observation, record: _Record, start: dict[Node, _Seen], gm: GraphModule, transform: str
) -> None:
    names = {node: seen.name for node, seen in start.items()}
    alive = set(gm.graph.nodes)
    observation.created = tuple(node.name for node in record.created if node in alive)
    observation.erased = tuple(names[node] for node in record.erased if node in names)
    observation.replacements = tuple(_claims(record.moves, names, alive, transform))
    reached = {old: _reached(old, record.moves) for old in record.moves}
    observation.rewritten = tuple(
        node.name
        for node, was in start.items()
        if node in alive
        and not (
            was.target == node.target
            and _explained((was.args, was.kwargs), (node.args, node.kwargs), reached)
            and was.reads_as(_Seen.of(gm, node))
        )
    )


def _by_name(observation: Observation, was: dict[str, _Seen], now: dict[str, _Seen]) -> None:
    observation.created += tuple(name for name in now if name not in was)
    observation.erased += tuple(name for name in was if name not in now)
    observation.rewritten += tuple(name for name, seen in was.items() if name in now and not _alike(seen, now[name]))


def _alike(was: _Seen, now: _Seen) -> bool:
    """Whether two nodes of one name compute the same; their inputs are other objects where the graph is a new one."""
    return (
        was.target == now.target
        and str((was.args, was.kwargs)) == str((now.args, now.kwargs))
        and (was.reads is None or isinstance(was.reads[0], GraphModule) or was.reads_as(now))
    )


def _hooks(record: _Record, known: dict[str, Node]) -> dict[str, Callable[..., None]]:
    def on_create(node: Node) -> None:
        known[node.name] = node
        record.created.append(node)

    def on_replace(*, old: Node, new: str, user: Node) -> None:
        target = known.get(new)
        if target is None or target.name != new:  # renamed since it was made
            target = next((node for node in user.graph.nodes if node.name == new), None)
        if target is None:  # not a replacement: FX fires this hook for a rename, too
            return
        record.moves.setdefault(old, {})[target] = None

    return {"create": on_create, "erase": record.erased.append, "replace": on_replace}


@contextmanager
def _hooked(gm: GraphModule, hooks: dict[str, Callable[..., None]]) -> Iterator[None]:
    missing = [kind for kind in hooks if not hasattr(gm, f"_register_{kind}_node_hook")]
    if missing:
        raise PipelineError(
            f"this torch has no FX hook for {' and '.join(missing)} events, so a transform cannot be watched: "
            "use torch 2.11 to 2.14, or compare the graphs with graphprobe.diff alone"
        )
    for kind, hook in hooks.items():
        getattr(gm, f"_register_{kind}_node_hook")(hook)
    try:
        yield
    finally:
        for kind, hook in hooks.items():
            getattr(gm, f"_unregister_{kind}_node_hook")(hook)


def _claims(
    moves: dict[Node, dict[Node, None]], names: dict[Node, str], alive: set[Node], transform: str
) -> Iterator[Replacement]:
    """Yield a claim for each node whose uses have all gone to one other node, and which is left without any."""
    for old, targets in moves.items():
        new = next(iter(targets))
        is_gone = old not in alive or not old.users
        if len(targets) == 1 and is_gone and new is not old and (new in alive or new in moves):
            yield Replacement(names.get(old, old.name), new.name, transform)


def _reached(old: Node, moves: dict[Node, dict[Node, None]]) -> set[Node]:
    """Return all nodes at which a user of `old` may have arrived through replacements."""
    found: set[Node] = set()
    stack = [old]
    while stack:
        fresh = set(moves.get(stack.pop(), ())) - found
        found |= fresh
        stack.extend(fresh)
    return found


def _explained(was: Any, now: Any, reached: dict[Node, set[Node]]) -> bool:
    """Whether arguments are what they were, apart from inputs that were replaced."""
    if isinstance(was, Node):
        return now is was or now in reached.get(was, ())
    if isinstance(was, (list, tuple)):
        return (
            isinstance(now, (list, tuple))
            and len(was) == len(now)
            and all(_explained(w, n, reached) for w, n in zip(was, now, strict=True))
        )
    if isinstance(was, dict):
        return (
            isinstance(now, dict) and was.keys() == now.keys() and all(_explained(was[k], now[k], reached) for k in was)
        )
    if isinstance(was, slice):
        return isinstance(now, slice) and _explained(
            (was.start, was.stop, was.step), (now.start, now.stop, now.step), reached
        )
    return type(was) is type(now) and (was == now or was != was)

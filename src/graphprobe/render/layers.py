"""Which part of a graph is meant: a layer by number, a module by path, or everything a pattern matches."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass

from graphprobe.errors import RenderError, nearest
from graphprobe.records import GraphView
from graphprobe.render.places import inside, layer_prefix
from graphprobe.render.wiring import CALLS, Wiring, wire

_STACKS = re.compile(r"(?:^|\.)(layers?|blocks?|h)$")
_LISTED = 12
AROUND = 4  # operations above and below one that is asked for by name
_WINDOW = 80  # so many of them at most


def layers_of(graph: GraphView) -> tuple[str, ...]:
    """Return the module paths of the graph's layers, in graph order: 'model.layers.0', 'model.layers.1', ...

    A layer is the outermost numbered module of a path. Where some lie in a module called layers, layer, blocks,
    block or h, the others (the steps of an nn.Sequential, say) do not count.
    """
    return _layers(wire(graph))


def select(wiring: Wiring, layer: str | int) -> tuple[str, ...]:
    """Return the modules meant by a layer's number, a module path, or a pattern with * and ?.

    Raises RenderError naming the layers there are.
    """
    text = str(layer).strip()
    modules = _modules(wiring)
    if text.isdigit():
        return (_by_number(wiring, int(text)),)
    if text in modules:
        return (text,)
    found = [m for m in modules if fnmatch.fnmatchcase(m, text)]
    if found:
        # a part of a module that is meant already adds nothing
        return tuple(m for m in found if not any(other != m and inside(m, other) for other in found))
    near = nearest(text, (*modules, *wiring.shown))
    raise RenderError(f"no module or operation {text!r} in this graph{near or '.'} {_what_there_is(wiring)}")


@dataclass(frozen=True)
class Part:
    """What a picture of a part of a graph shows: its operations, what it is called, and its module or ''."""

    names: list[str]
    title: str
    module: str
    asked: str = ""  # the operation that was asked for by name


def part_of(wiring: Wiring, layer: str | int) -> Part:
    """Return the part that is meant by a layer's number, a module path, a pattern, or the name of an operation.

    An operation means itself and what lies up to `AROUND` operations above and below it. Raises RenderError.
    """
    text = str(layer).strip()
    node = wiring.graph.by_name.get(text)
    if node is not None and node.op in CALLS and text not in _modules(wiring):
        return Part(_around(wiring, text), f"around {text}", "", text)
    modules = select(wiring, layer)
    more = f" and {len(modules) - 4} more" if len(modules) > 4 else ""
    return Part(members(wiring, modules), ", ".join(modules[:4]) + more, modules[0] if len(modules) == 1 else "")


def _around(wiring: Wiring, name: str) -> list[str]:
    """Return the operations within AROUND steps of one; views count for nothing, and what feeds everything ends it."""
    found = {name}
    shown = set(wiring.shown)
    for step in (wiring.inputs, lambda n: wiring.users[n]):
        edge, seen = [name], {name}
        for _ in range(AROUND):
            reached: list[str] = []
            todo = [n for e in edge for n in step(e)]
            while todo:
                at = todo.pop()
                if at in seen or at not in shown or wiring.node(at).op not in CALLS or len(found) >= _WINDOW:
                    continue
                seen.add(at)
                found.add(at)
                (todo if wiring.node(at).is_view else reached).extend(step(at) if wiring.node(at).is_view else [at])
            edge = reached
    return sorted(found, key=wiring.order.__getitem__)


def members(wiring: Wiring, modules: tuple[str, ...]) -> list[str]:
    """Return the operations that lie in one of the modules, in graph order."""
    return [
        name
        for name in wiring.shown
        if wiring.node(name).op in CALLS and any(inside(wiring.place[name], m) for m in modules)
    ]


def _layers(wiring: Wiring) -> tuple[str, ...]:
    found = dict.fromkeys(layer_prefix(wiring.place[n]) for n in wiring.shown if wiring.node(n).op in CALLS)
    found.pop("", None)
    named = [prefix for prefix in found if _STACKS.search(prefix.rpartition(".")[0])]
    return tuple(named or found)


def _by_number(wiring: Wiring, number: int) -> str:
    found = [prefix for prefix in _layers(wiring) if prefix.rpartition(".")[2] == str(number)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise RenderError(f"no layer {number} in this graph. {_what_there_is(wiring)}")
    raise RenderError(f"layer {number} could be {' or '.join(found)}: give the module path")


def _modules(wiring: Wiring) -> dict[str, None]:
    """Return every module path that holds an operation, with the modules around it."""
    found: dict[str, None] = {}
    for name in wiring.shown:
        path = wiring.place[name]
        parts = path.split(".") if path and wiring.node(name).op in CALLS else []
        for end in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:end]))
    return found


def _what_there_is(wiring: Wiring) -> str:
    layers = _layers(wiring)
    if layers:
        stacks: dict[str, list[int]] = {}
        for prefix in layers:
            stack, _, number = prefix.rpartition(".")
            stacks.setdefault(stack, []).append(int(number))
        named = [_span(stack, numbers) for stack, numbers in stacks.items()]
        return f"There {'are' if len(layers) > 1 else 'is'} {', '.join(named)}"
    modules = list(_modules(wiring))
    if not modules:
        return "It names no modules at all: draw the whole graph"
    more = f" and {len(modules) - _LISTED} more" if len(modules) > _LISTED else ""
    return f"It has no numbered layers; its modules are {', '.join(modules[:_LISTED])}{more}"


def _span(stack: str, numbers: list[int]) -> str:
    dot = "." if stack else ""
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{stack}{dot}{numbers[0]} to {stack}{dot}{numbers[-1]}"
    shown = ", ".join(f"{stack}{dot}{n}" for n in numbers[:_LISTED])
    return shown + (f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else "")

"""Which part of a graph is meant: a layer by number, a module by path, or everything a pattern matches."""

from __future__ import annotations

import fnmatch
import re

from graphprobe.errors import RenderError, nearest
from graphprobe.records import GraphView
from graphprobe.render.places import inside, layer_prefix
from graphprobe.render.wiring import CALLS, Wiring, wire

_STACKS = re.compile(r"(?:^|\.)(layers?|blocks?|h)$")
_LISTED = 12


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
    raise RenderError(f"no module {text!r} in this graph{nearest(text, modules)}. {_what_there_is(wiring)}")


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

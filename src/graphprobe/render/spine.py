"""The residual stream of a transformer layer, found by dataflow alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from graphprobe.render.labels import short_op
from graphprobe.render.places import is_getitem
from graphprobe.render.wiring import Wiring

#: Additions, and norms that add the residual themselves.
_ADDS = re.compile(r"^add_?$|add_(rms|layer)_?norm|residual_(rms|layer)?_?norm")


def spine_of(wiring: Wiring, names: Sequence[str]) -> set[str]:
    """Return the residual stream: the additions x + f(x) that lead from the last value of `names` up to the first.

    Of an addition's two inputs the stream is the one that the other was computed from.
    """
    within = set(names)
    last = next((n for n in reversed(names) if adds(wiring, n)), None)
    found: set[str] = set()
    while last is not None and last in within:
        found.add(last)
        last = _stream_input(wiring, last, within)
    if last is not None:
        found.add(last)
    return found if len(found) > 1 else set()


def _stream_input(wiring: Wiring, name: str, within: set[str]) -> str | None:
    node = wiring.node(name)
    sources = wiring.inputs(name)
    if not adds(wiring, name):
        same = [s for s in sources if _alike(wiring.node(s).shape, node.shape)]
        return same[0] if len(same) == 1 else None
    first, second = sources
    if first not in within or _above(wiring, second, _maker(wiring, first)):
        return first
    if second not in within or _above(wiring, first, _maker(wiring, second)):
        return second
    return None


def _maker(wiring: Wiring, name: str) -> str:
    """Return the operation that made a value: a fused norm hands on the stream as one of its several results."""
    sources = wiring.inputs(name)
    return sources[0] if is_getitem(wiring.node(name)) and sources else name


def _alike(shape: tuple[int | str, ...] | None, other: tuple[int | str, ...] | None) -> bool:
    # an operation without meta["val"] has no shape to compare
    return shape is None or other is None or shape == other


def adds(wiring: Wiring, name: str) -> bool:
    """Whether the operation adds two values of one shape."""
    node = wiring.node(name)
    sources = wiring.inputs(name)
    fits = len(sources) == 2 and all(_alike(wiring.node(s).shape, node.shape) for s in sources)
    flat = node.shape is not None and len(node.shape) < 2
    return bool(_ADDS.search(short_op(node))) and fits and not flat


def _above(wiring: Wiring, name: str, wanted: str, limit: int = 400) -> bool:
    """Whether `wanted` is an ancestor of `name`."""
    floor, todo, seen = wiring.order[wanted], [name], set[str]()
    while todo and len(seen) < limit:
        current = todo.pop()
        if current == wanted:
            return True
        if current not in seen and wiring.order[current] > floor:
            seen.add(current)
            todo.extend(wiring.inputs(current))
    return False

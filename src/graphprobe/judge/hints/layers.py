"""Signs of a repeated module that one side has more: a layer left out, put in, or run twice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.judge.hints.look import EQUAL, Look, relative
from graphprobe.judge.hints.ratios import shown
from graphprobe.judge.same import difference, rms

_MOST_LAYERS = 6  # in one region
_FEWEST = 4  # operations of a layer in a region: fewer are named one by one
_STEPS = 2  # of the coarsest dtype at the frontier
_CLEARLY = 0.1
Layer = tuple[str, int]  # the path of what holds it, and its number there


def layer(look: Look) -> str | None:
    """One side has layers that the other lacks, and with what goes in handed on the sides agree."""
    plain = look.distance(look.raw[1])
    for side, other in (("before", look.raw[1]), ("after", look.raw[0])):
        for found in _runs(look, side):
            last = _handed_on(look, side, found)
            if last is None:
                continue
            taken = _taken(look, side, found, last)
            left = min((_distance(look, side, last, x, other) for x in taken), default=math.inf)
            if left <= _rounding(look) and left < _CLEARLY * plain:
                look.proved.append(last)
                kind = "a missing layer" if side == "before" else "a layer too many"
                holder, numbers = found[0][0], [number for _, number in found]
                name = f"{holder}.{numbers[0]}" + (f" to {holder}.{numbers[-1]}" if len(numbers) > 1 else "")
                falls = f"the difference falls from {shown(plain)} to {shown(left)}"
                return f"looks like {kind}: without {name} of {side} {falls}"
    return None


def _layer(node: Node) -> Layer | None:
    """Return the outermost numbered module that a node lies in."""
    for path, _ in provenance.module_stack(node):
        holder, _, number = path.rpartition(".")
        if holder and number.isdigit():
            return holder, int(number)
    return None


def _runs(look: Look, side: str) -> Iterator[list[Layer]]:
    """Yield layers of one piece that follow one another, single ones first."""
    met = Counter(_layer(n) for n in look.region.operations(side) if nodes.makes_values(n))
    layers = sorted(place for place, count in met.items() if place is not None and count >= _FEWEST)
    if len(layers) > _MOST_LAYERS:
        return
    for count in range(1, len(layers) + 1):
        for first in range(len(layers) - count + 1):
            run = layers[first : first + count]
            if all(run[k] == (run[0][0], run[0][1] + k) for k in range(count)):
                yield run


def _handed_on(look: Look, side: str, run: Iterable[Layer]) -> Node | None:
    """Return the only value that leaves some layers, where it is computed in the piece."""
    within = set(run)
    mine = [n for n in look.region.operations(side) if _layer(n) in within]
    out = [n for n in mine if nodes.makes_values(n) and any(_layer(user) not in within for user in n.users)]
    return out[0] if len(out) == 1 else None


def _taken(look: Look, side: str, run: Iterable[Layer], last: Node) -> list[torch.Tensor]:
    """Return the values that some layers take and that look like the one they hand on."""
    values, within = look.inside[side == "after"], set(run)
    mine = [n for n in look.region.operations(side) if _layer(n) in within]
    sources = dict.fromkeys(x for n in mine for x in n.all_input_nodes if _layer(x) not in within)
    found = [values[x] for x in sources if isinstance(values.get(x), torch.Tensor)]
    return [x for x in found if x.shape == values[last].shape and x.dtype == values[last].dtype]


def _distance(look: Look, side: str, last: Node, value: torch.Tensor, other: torch.Tensor) -> float:
    """Return how far a piece is from what the other side computes where `last` is another value."""
    tried = look.replay.exact(side, look.region, override={last: value})
    if tried.shape != other.shape:
        return math.inf
    change, kept, wrong = difference(look.replay, look.region, other, tried)
    return math.inf if bool(wrong.any()) else relative(rms(change), rms(kept))


def _rounding(look: Look) -> float:
    """Return by how much the sides may differ: one may start below a value that the other computes again."""
    values = [nodes.tensor_val(p) for p, _ in look.region.frontier]
    steps = [torch.finfo(v.dtype).eps for v in values if v is not None and v.dtype.is_floating_point]
    return max([EQUAL, *(_STEPS * step for step in steps)])

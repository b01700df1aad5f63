"""Evidence 5, values in another layout: [batch, heads, tokens, dim] here is [batch * tokens, heads * dim] there.

A claim that carries a view is made plain in the graph: behind node y of `after` its view in before's layout is
inserted, and behind that the view back, for all that consumes y. The first of the two is what is claimed. Nothing else
changes, so lanes and judge need to know nothing of layouts.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Claim
from graphprobe.align.matching import Matching, is_part
from graphprobe.align.sketches import moments, positions, rooted
from graphprobe.align.values import AGREE

_ROWS = 256  # moments are compared for so many values at once
_DIMENSIONS = 5  # more of them have too many orders

Shape = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """``y.reshape(split).permute(order).reshape(joined)``."""

    split: Shape
    order: tuple[int, ...]
    joined: Shape

    def positions(self, where: torch.Tensor) -> torch.Tensor:
        """Return where in y, in flat order, lies what stands at these places of y in before's layout."""
        strides = [math.prod(self.split[d + 1 :]) for d in range(len(self.split))]
        out, rest = torch.zeros_like(where), where
        for d in reversed(self.order):
            out, rest = out + rest % self.split[d] * strides[d], rest // self.split[d]
        return out

    def back(self, shape: Shape) -> View:
        """Return the view that undoes this one, for a value of that shape."""
        return View(
            tuple(self.split[d] for d in self.order), tuple(self.order.index(i) for i in range(len(self.order))), shape
        )

    def __str__(self) -> str:
        if self.order == tuple(range(len(self.order))):
            return f"reshape {list(self.joined)}"
        return f"reshape {list(self.split)}, permute {list(self.order)}, reshape {list(self.joined)}"


def claim(matching: Matching) -> None:
    """Claim values that agree up to the order of dimensions and how they are joined. `after` must be a copy."""
    found = {y: (x, view) for x, y, view in [*_arranged_pairs(matching), *_reshaped_pairs(matching)]}
    taken: set[Node] = set()
    for y, (x, view) in found.items():
        if x not in taken and not matching.alignment.of_before.get(x) and not matching.alignment.of_after.get(y):
            taken.add(x)
            claim_shown(matching, x, y, view, "layout")
    if taken:
        matching.after.refresh()
        matching.changed()


def _reshaped_pairs(matching: Matching) -> list[tuple[Node, Node, View]]:
    out = []
    for x, y in matching.reshaped:
        shape = nodes.shape(x) or ()
        if _fixed(shape):
            whole = tuple(int(d) for d in shape)
            out.append((x, y, View(whole, tuple(range(len(whole))), whole)))
    matching.reshaped.clear()
    return out


def _arranged_pairs(matching: Matching) -> list[tuple[Node, Node, View]]:
    """Try all views of every candidate in one run of `after`: some elements of each, where before's samples lie."""
    tried = {y: (x, views(_sizes(x), _sizes(y))) for x, y in _candidates(matching)}
    tried = {y: (x, found) for y, (x, found) in tried.items() if found}

    def observe(node: Node, value: Any) -> torch.Tensor | None:
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != _sizes(node):
            return None
        flat, where = value.detach().reshape(-1), positions(value.numel(), value.device)
        return torch.stack([flat[view.positions(where)] for view in tried[node][1]]).double()

    held = matching.observed("after", list(tried), observe) if tried else {}
    out = []
    for y, (x, found) in tried.items():
        seen = matching.sketches("before")[x].double()
        shown = held.get(y)
        if shown is None:
            continue
        apart = torch.linalg.vector_norm(shown - seen, dim=1) / torch.linalg.vector_norm(seen)
        near = [view for view, distance in zip(found, apart.tolist(), strict=True) if distance <= AGREE]
        if len(near) == 1:
            out.append((x, y, near[0]))
    return out


def _sizes(node: Node) -> Shape:
    return tuple(int(d) for d in nodes.shape(node) or ())


def _fixed(shape: tuple[int | str, ...]) -> bool:
    return all(isinstance(d, int) for d in shape)


def _candidates(matching: Matching) -> list[tuple[Node, Node]]:
    """Pair unclaimed values of the same size and moments, where nothing else on either side has them."""
    of_before, of_after = matching.alignment.of_before, matching.alignment.of_after
    left = [n for n in matching.sketches("before") if not of_before.get(n) and _arranged(n)]
    right = [n for n in matching.sketches("after") if not of_after.get(n) and _arranged(n)]
    sizes: dict[Any, tuple[list[Node], list[Node]]] = defaultdict(lambda: ([], []))
    for column, found in enumerate((left, right)):
        for node in found:
            sizes[math.prod(int(d) for d in nodes.shape(node) or ())][column].append(node)
    both = [group for group in sizes.values() if all(group) and not all(is_part(n) for side in group for n in side)]
    known = {
        **matching.observed("before", [x for xs, _ in both for x in xs], moments),
        **matching.observed("after", [y for _, ys in both for y in ys], moments),
    }
    pairs = []
    for xs, ys in ([[n for n in side if n in known] for side in group] for group in both):
        if not xs or not ys:
            continue
        a, b = (rooted(torch.stack([known[n] for n in side])) for side in (xs, ys))
        pairs += [
            (xs[column], ys[row]) for row, column in _alone(a, b) if not (is_part(xs[column]) and is_part(ys[row]))
        ]
    return pairs


def _alone(a: torch.Tensor, b: torch.Tensor) -> list[tuple[int, int]]:
    """Pair rows of b with rows of a whose moments agree, where no other row of either comes near."""
    best_of_a = torch.full((len(a),), float("inf"), dtype=a.dtype)
    found: list[tuple[int, int, float]] = []
    for start in range(0, len(b), _ROWS):
        mine = b[start : start + _ROWS]
        apart, rms = (mine[:, None] - a[None]).abs(), mine[:, None, 2]
        near = (apart.amax(2) <= 2 * AGREE * rms) & (rms > 0)
        distance = torch.where(near, apart.square().sum(2).sqrt() / rms, torch.inf)
        best_of_a = torch.minimum(best_of_a, distance.amin(0))
        best, column = distance.min(1)
        # values that several nodes hold are not claimed on moments
        alone = ((distance <= best[:, None] * 2 + 1e-5).sum(1) == 1) & (best < torch.inf)
        rows = torch.nonzero(alone).squeeze(1).tolist()
        found += [(start + row, int(column[row]), float(best[row])) for row in rows]
    return [(row, column) for row, column, distance in found if distance <= float(best_of_a[column])]


def _arranged(node: Node) -> bool:
    shape = nodes.shape(node) or ()
    return _fixed(shape) and sum(d != 1 for d in shape) >= 2


def views(x: Shape, y: Shape) -> list[View]:
    """List the ways to show shape y as shape x that move something: dimensions of one side split the other's."""
    fine_x, fine_y = tuple(d for d in x if d != 1), tuple(d for d in y if d != 1)
    found: dict[tuple[Any, ...], View] = {}
    if len(fine_x) <= _DIMENSIONS:
        for order in itertools.permutations(range(len(fine_x))):
            split = tuple(fine_x[d] for d in order)
            if _tiles(split, fine_y):
                back = tuple(order.index(d) for d in range(len(order)))
                found.setdefault((split, back), View(split, back, x))
    if len(fine_y) <= _DIMENSIONS:
        for order in itertools.permutations(range(len(fine_y))):
            if _tiles(tuple(fine_y[d] for d in order), fine_x):
                found.setdefault((fine_y, order), View(fine_y, order, x))
    return [view for view in found.values() if view.order != tuple(range(len(view.order)))]


def _tiles(fine: Shape, coarse: Shape) -> bool:
    """Whether neighbours of the one multiply to the other."""
    rest = list(fine)
    for size in coarse:
        product = 1
        while rest and product < size:
            product *= rest.pop(0)
        if product != size:
            return False
    return not rest


def claim_shown(matching: Matching, x: Node, y: Node, view: View, evidence: str) -> None:
    """Claim a value as it is shown in before's layout; the graph must then be read anew."""
    shown = _insert(matching, y, view)
    claim = Claim(x, shown, evidence, certain=False, view=str(view))
    matching.alignment.add(claim)
    matching.views[shown] = view
    matching.alignment.of_after[y].append(claim)  # y itself is taken, too


def _insert(matching: Matching, y: Node, view: View) -> Node:
    """Insert y's view in before's layout and the view back; all users of y read the latter. Returns the former."""
    after, users = matching.after, list(y.users)
    shape = tuple(int(d) for d in nodes.shape(y) or ())
    shown = _shown(matching, y, y, view)
    again = _shown(matching, y, shown, view.back(shape))
    for user in users:
        user.replace_input_with(y, again)
    for path, node in after.outputs.items():
        if node is y:
            after.outputs[path] = again
    return shown


def _shown(matching: Matching, y: Node, source: Node, view: View) -> Node:
    """Insert the operators of one view behind `source`; they go by the name of y."""
    aten, at = torch.ops.aten, source
    steps: list[tuple[Any, list[int]]] = []
    if view.split != nodes.shape(source):
        steps.append((aten.reshape.default, list(view.split)))
    if view.order != tuple(range(len(view.order))):
        steps.append((aten.permute.default, list(view.order)))
    if tuple(view.split[d] for d in view.order) != view.joined:
        steps.append((aten.reshape.default, list(view.joined)))
    for target, argument in steps or [(aten.alias.default, None)]:  # type: ignore[list-item]
        value = nodes.tensor_val(at)
        args = (at,) if argument is None else (at, argument)
        with matching.after.gm.graph.inserting_after(at):
            node = matching.after.gm.graph.call_function(target, args)
        node.meta = {k: v for k, v in y.meta.items() if k != "custom"} | {nodes.INSERTED: True}
        if value is not None:
            node.meta["val"] = target(value, *args[1:])
        matching.after.labels[node] = matching.after.label(y)
        at = node
    return at

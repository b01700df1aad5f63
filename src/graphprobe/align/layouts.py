"""Evidence 5, values in another layout: [batch, heads, tokens, dim] here is [batch * tokens, heads * dim] there.

A claim that carries a view is made plain in the graph: behind node y of `after` its view in before's layout is
inserted, and behind that the view back, for all that consumes y. The first of the two is what is claimed. Nothing else
changes, so lanes and judge need to know nothing of layouts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.claims import Claim
from graphprobe.align.matching import Matching, is_part
from graphprobe.align.ordered import Index, within
from graphprobe.align.sketches import moments, positions, rooted, unmasked
from graphprobe.align.values import AGREE, is_chain
from graphprobe.align.views import Call, Orders, View, inverse, views
from graphprobe.align.wholes import Behind

_ROWS = 256  # moments are compared for so many values at once


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


def orders_known(matching: Matching) -> Orders:
    """List the orders that dimensions may be in, by size, and the layers that have them: those of weights that are the
    other side's in another order."""
    found: dict[int, dict[Index, set[object]]] = defaultdict(lambda: defaultdict(set))
    for side in ("after", "before"):
        for key, order in matching.leaves(side).orders.items():
            for index in {p.index for p in order.pieces if p.index}:
                for size, parts in within(index).items():
                    for part in parts:
                        found[size][part if side == "after" else inverse(part)].add(provenance.repeated(key)[1])
    return found


def _reshaped_pairs(matching: Matching) -> list[tuple[Node, Node, View]]:
    out = []
    for x, y in matching.reshaped:
        shape = nodes.shape(x) or ()
        if _fixed(shape):
            whole = nodes.fixed(x)
            out.append((x, y, View(whole, tuple(range(len(whole))), whole)))
    matching.reshaped.clear()
    return out


def _arranged_pairs(matching: Matching) -> list[tuple[Node, Node, View]]:
    """Try all views of every candidate in one run of `after`: some elements of each, where before's samples lie."""
    orders = orders_known(matching)
    left, right = _once(matching, "before"), _once(matching, "after")
    pairs = _candidates(matching, list(left), list(right))
    tried = {y: (x, views(nodes.fixed(x), nodes.fixed(y), orders)) for x, y in pairs}
    tried = {y: (x, found) for y, (x, found) in tried.items() if found}

    def observe(node: Node, value: Any) -> torch.Tensor | None:
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != nodes.fixed(node):
            return None
        flat, where = value.detach().reshape(-1), positions(value.numel(), value.device)
        return unmasked(torch.stack([flat[view.positions(where)] for view in tried[node][1]])).double()

    held = matching.observed("after", list(tried), observe) if tried else {}
    out = []
    for y, (x, found) in tried.items():
        seen = matching.sketches("before")[x].double()
        shown = held.get(y)
        if shown is None:
            continue
        apart = torch.linalg.vector_norm(shown - seen, dim=1) / torch.linalg.vector_norm(seen)
        near = [i for i, distance in enumerate(apart.tolist()) if distance <= AGREE]
        if near and _are_one([found[i] for i in near], math.prod(nodes.fixed(y))):
            out += [(p, q, found[near[0]]) for p, q in _in_order(left[x], right[y])]
    return out


def _are_one(found: list[View], count: int) -> bool:
    """Whether views show the same, only written otherwise."""
    where = torch.arange(count) if len(found) > 1 else None
    return where is None or all(torch.equal(v.positions(where), found[0].positions(where)) for v in found[1:])


def _fixed(shape: tuple[int | str, ...]) -> bool:
    return all(isinstance(d, int) for d in shape)


def _once(matching: Matching, side: str) -> dict[Node, list[Node]]:
    """List the unclaimed values that may be arranged otherwise; with the first is what is computed again, cast, or
    handed on unchanged."""
    claimed, numbers = matching.alignment.of(side), matching.numbers(side)
    found: dict[Any, list[Node]] = defaultdict(list)
    for node, sketch in matching.sketches(side).items():
        if not claimed.get(node) and _arranged(node):
            found[nodes.shape(node), bytes(sketch.numpy().data)].append(node)
    out: dict[Node, list[Node]] = {}
    for members in found.values():
        if is_chain(members) or len({numbers[n] for n in members}) == 1:
            out[members[0]] = members
        else:
            out |= {n: [n] for n in members}
    return out


def _in_order(xs: list[Node], ys: list[Node]) -> list[tuple[Node, Node]]:
    """Pair what holds one value on both sides: by dtype, if they have any in common."""
    kinds = {getattr(nodes.tensor_val(n), "dtype", None): n for n in ys}
    pairs = [
        pair
        for dtype in kinds
        for pair in zip(*([n for n in side if nodes.same_dtype(n, kinds[dtype])] for side in (xs, ys)), strict=False)
    ]
    return pairs or list(zip(xs, ys, strict=False))


def _candidates(matching: Matching, left: list[Node], right: list[Node]) -> list[tuple[Node, Node]]:
    """Pair values of the same size and moments, where nothing else on either side has them."""
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
    shape = nodes.fixed(y)
    at = Behind(after, y, y)
    shown = _called(at, y, view.calls(shape) or [(torch.ops.aten.alias.default, (), shape)])
    again = _called(at, shown, view.calls_back(shape) or [(torch.ops.aten.alias.default, (), shape)])
    after.take_over(y, again, users)
    return shown


def _called(at: Behind, node: Node, calls: list[Call]) -> Node:
    """Insert the operators of one view behind a node."""
    for target, arguments, shape in calls:
        if target is torch.ops.aten.index_select.default:
            dim, index = arguments
            given = at.constant(torch.tensor(index, device=at.program.device_of(at.big)))
            node = at.call(target, node, dim, given, shape=shape)
            node.meta[nodes.ORDER] = (dim, index)
        else:
            node = at.call(target, node, *arguments, shape=shape)
    return node

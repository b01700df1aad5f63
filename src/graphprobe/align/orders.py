"""Evidence 4, weights in another order: what is computed with them holds the same numbers in that order.

Where a weight's rows are those of a weight of the other side, the two products have the same part to play, whatever
goes into them: outputs in another order, or, where columns change places, sums over the same terms. The claim says the
order, so that a wrong one shows where it is undone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from graphprobe import nodes
from graphprobe.align import slices
from graphprobe.align.expressions import Term
from graphprobe.align.forms import Form, Slice
from graphprobe.align.layouts import claim_shown
from graphprobe.align.matching import Matching, shown_as
from graphprobe.align.ordered import Ordered
from graphprobe.align.terms import Terms
from graphprobe.align.views import View


@dataclass(frozen=True)
class Product:
    """A node that multiplies a value with a weight."""

    node: Node
    source: Node  # the value
    axis: int  # of the weight, along which its outputs lie
    dim: int  # of the node's value, along which they lie there


def claim(matching: Matching) -> None:
    """Claim products with weights that are the other side's in another order. Both programs must be copies."""
    for side, other in (("after", "before"), ("before", "after")):
        orders = matching.leaves(side).orders
        found = {k: o for k, o in orders.items() if side == "after" or len(o.pieces) > 1}
        if not found:
            continue
        mine = _products(matching, side, found)
        theirs = _products(matching, other, {p.target for o in found.values() for p in o.pieces})
        inserted, joined = False, dict[Node, list[tuple[Node, Slice]]]()
        for key, order in found.items():
            for big, smalls in _pairs(matching, side, mine[key], [theirs[p.target] for p in order.pieces]):
                if not _is_along(order, big, smalls):
                    continue
                if len(smalls) == 1:
                    inserted |= _claim_one(matching, order, smalls[0], big)
                elif cuts := _cuts(side, order, big, smalls):
                    joined[big.node] = cuts
        if inserted:
            matching.after.refresh()
            matching.changed()
        if joined:
            slices.insert(matching, side, joined)


def _products(matching: Matching, side: str, keys: Iterable[str]) -> dict[str, list[Product]]:
    """List what is multiplied with each of these weights."""
    wanted, found = set(keys), defaultdict[str, list[Product]](list)
    terms, leaves = matching.terms(side), matching.leaves(side)
    for node in matching.makers(side):
        product = _product(node, terms.of[node], terms)
        if product is not None and (key := leaves.key(product[0])) in wanted:
            found[key].append(product[1])
    return found


def _product(node: Node, term: Term, terms: Terms) -> tuple[Node, Product] | None:
    """Read a node as a product with a weight, a bias aside: the weight, and how it is multiplied."""
    expression = term.expression
    if expression[:1] == ("add",) and isinstance(expression[2], tuple):
        expression = expression[2]
    if expression[:1] == ("convolution",):
        return term.operands[1], Product(node, term.operands[0], 0, 1)
    if expression[:1] != ("mm",):
        return None
    x, matrix = expression[2:4]
    flips = isinstance(matrix, tuple) and matrix[0] == "turned"
    column = matrix[2] if flips else matrix
    if not isinstance(x, int) or not isinstance(column, int):
        return None
    weight, steps = terms.root(term.operands[column])
    if any(step[0] != "perm" or len(step[1]) != 2 for step in steps):
        return None
    rank = len(nodes.shape(node) or ())
    return weight, Product(node, term.operands[x], (flips + len(steps) + 1) % 2, rank - 1)


def _pairs(
    matching: Matching, side: str, bigs: list[Product], each: list[list[Product]]
) -> list[tuple[Product, list[Product]]]:
    """Pair products with weights that stand for each other: the only ones, or those of equal values."""
    other = "before" if side == "after" else "after"
    mine, theirs = matching.alignment.of(side), matching.alignment.of(other)
    here, there = matching.numbers(side), matching.numbers(other)
    if len(bigs) == 1 and all(len(smalls) == 1 for smalls in each):
        found = [(bigs[0], [smalls[0] for smalls in each])]
        if here[bigs[0].source] in set(there.values()):  # it is known what goes in, and must go in there, too
            found = [(b, each_) for b, each_ in found if all(there[s.source] == here[b.source] for s in each_)]
    else:
        found = []
        for big in bigs:
            alike = [[s for s in smalls if there[s.source] == here[big.source]] for smalls in each]
            if all(len(a) == 1 for a in alike):
                found.append((big, [a[0] for a in alike]))
    return [
        (big, smalls) for big, smalls in found if not mine.get(big.node) and not any(theirs.get(s.node) for s in smalls)
    ]


def _is_along(order: Ordered, big: Product, smalls: list[Product]) -> bool:
    """Whether it is the outputs on both sides, or the inputs, that are in another order."""
    outputs = order.axis == big.axis
    each = zip(order.pieces, smalls, strict=True)
    return all(((order.axis ^ p.turned) == s.axis) == outputs for p, s in each)


def _claim_one(matching: Matching, order: Ordered, x: Product, y: Product) -> bool:
    """Claim one product for another; whether that inserts something."""
    if order.axis != y.axis:
        shown = shown_as(y.node, nodes.shape(x.node), matching.terms("after"))
        if shown is not None:
            matching.add(x.node, shown, "weight")
        return False
    if not (nodes.is_fixed(x.node) and nodes.is_fixed(y.node)):
        return False
    before, after = nodes.fixed(x.node), nodes.fixed(y.node)
    if before[x.dim :] != after[y.dim :] or x.dim < 0:
        return False
    view = View(after, tuple(range(len(after))), before, ((x.dim, order.pieces[0].index),))
    claim_shown(matching, x.node, y.node, view, "layout")
    return True


def _cuts(side: str, order: Ordered, big: Product, smalls: list[Product]) -> list[tuple[Node, Slice]]:
    """Return which slices of a product with a joined weight the products with its parts are."""
    if order.axis != big.axis or not all(nodes.is_fixed(n) for n in (big.node, *(s.node for s in smalls))):
        return []
    whole = nodes.fixed(big.node)
    cuts = [Slice(((big.dim, Form(side, whole[big.dim], p.index, True)),)) for p in order.pieces]
    if any(c.shape(whole) != nodes.fixed(s.node) for c, s in zip(cuts, smalls, strict=True)):
        return []
    return [(s.node, cut) for s, cut in zip(smalls, cuts, strict=True)]

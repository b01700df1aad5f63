"""Evidence 4, chains of weights: a product and the bias behind it may be one operator here and two operators there.

A chain is what is done with weights alone to one value: scaled, multiplied, shifted. Where both sides do the same with
the same weights, the ends of the two chains have the same part to play, and so has what goes into them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.expressions import Expression
from graphprobe.align.matching import Matching, shown_as
from graphprobe.align.numbering import Place


@dataclass(frozen=True)
class Chain:
    """What is done with weights, by number and sorted, up to a node; `source` is the one value that goes in, if one."""

    weights: tuple[int, ...]
    matrices: tuple[int, ...]  # those of two dimensions or more
    source: Node | None  # None where several values come together, or more is done to it than that
    above: Node | None  # the node before in the chain


def claim(matching: Matching) -> None:
    """Claim what has the same part to play on both sides."""
    for x, y, evidence in counterparts(matching):
        matching.add(x, y, evidence)


def counterparts(matching: Matching) -> list[tuple[Node, Node, str]]:
    """Pair unclaimed nodes that do the same with weights, and what goes into them; each only once, with the evidence.

    Either all weights are the same, or the matrices of a whole chain: what is wrong may be the bias.
    """
    if not matching.unclaimed_before() or not matching.unclaimed_after():
        return []
    left, right = chains(matching, "before"), chains(matching, "after")
    found: list[tuple[Node, Node, str]] = []
    for places in (_by_weights, _by_matrices):
        xs, ys = places(left), places(right)
        for place, y in ys.items():
            x = xs.get(place)
            if x is None:
                continue
            found.append((x, y, "weight"))
            into_x, into_y = left[x].source, right[y].source
            if into_x is not None and into_y is not None:
                found.append((into_x, into_y, "operand"))
    return list(_shown(matching, found))


def chains(matching: Matching, side: str) -> dict[Node, Chain]:
    """Read the chains of one side; they begin below what is claimed."""
    terms = matching.terms(side)
    claimed = matching.alignment.of(side)
    found: dict[Node, Chain] = {}
    for node in matching.makers(side):
        term = terms.of[node]
        roots = {n: terms.root(n)[0] for n in term.operands}
        weights = [r for r in roots.values() if terms.is_weight(r)]
        values = {r: n for n, r in roots.items() if not terms.is_weight(r)}
        if term.step is not None or not weights or not values:
            continue
        mine = [matching.weight(side, w) for w in weights]
        large = [n for n, w in zip(mine, weights, strict=True) if len(nodes.shape(w) or ()) > 1]
        root, source = next(iter(values.items())) if len(values) == 1 else (None, None)
        if source is not None and not _is_affine(term.expression, term.operands.index(source)):
            source = None
        above = root if root in found and not claimed.get(root) else None
        if above is not None:
            chain = found[above]
            mine, large, source = [*chain.weights, *mine], [*chain.matrices, *large], chain.source
        found[node] = Chain(tuple(sorted(mine)), tuple(sorted(large)), source, above)
    return found


def _is_affine(expression: Expression, operand: int) -> bool:
    """Whether an operand goes in once, and is only multiplied and shifted: a norm does more before it scales."""
    return _uses(expression, operand) == 1 and _reaches(expression, operand)


def _uses(expression: Expression, operand: int) -> int:
    return sum(_uses(c, operand) if isinstance(c, tuple) else type(c) is int and c == operand for c in expression[2:])


def _reaches(expression: Expression, operand: int) -> bool:
    if expression[0] not in ("mm", "mul", "add", "turned"):
        return False
    return any(_reaches(c, operand) if isinstance(c, tuple) else c == operand for c in expression[2:])


def _by_weights(chains: dict[Node, Chain]) -> dict[Place, Node]:
    """Map (elements, weights) to the only node there."""
    places: dict[Place, list[Node]] = defaultdict(list)
    for node, chain in chains.items():
        places[(nodes.elements(node), *chain.weights)].append(node)
    return {place: group[0] for place, group in places.items() if len(group) == 1}


def _by_matrices(chains: dict[Node, Chain]) -> dict[Place, Node]:
    """Map (elements, matrices) to the end of the only chain there."""
    continued = {chain.above for chain in chains.values()}
    ends = {node: chain for node, chain in chains.items() if node not in continued and chain.matrices}
    uses = Counter(number for chain in ends.values() for number in set(chain.matrices))
    return {
        (nodes.elements(node), *chain.matrices): node
        for node, chain in ends.items()
        if all(uses[number] == 1 for number in chain.matrices)
    }


def _shown(matching: Matching, pairs: list[tuple[Node, Node, str]]) -> Iterator[tuple[Node, Node, str]]:
    """Keep pairs of unclaimed operations that can be shown in one shape, each node once."""
    left, right = matching.terms("before"), matching.terms("after")
    of_before, of_after = matching.alignment.of_before, matching.alignment.of_after
    taken: set[Node] = set()
    for x, y, evidence in pairs:
        (x_root, x_steps), (y_root, y_steps) = left.root(x), right.root(y)
        if x_steps != y_steps or matching.apart(x, y):
            continue
        ends = (x, x_root, y, y_root)
        if any(n.op != "call_function" or n in taken or of_before.get(n) or of_after.get(n) for n in ends):
            continue
        shown: tuple[Node | None, Node | None] = x_root, shown_as(y_root, nodes.shape(x_root), right)
        if shown[1] is None:
            shown = shown_as(x_root, nodes.shape(y_root), left), y_root
        if shown[0] is not None and shown[1] is not None:
            taken.update(ends)
            yield shown[0], shown[1], evidence

"""Evidence 4, structure: what computes the same from the same claims its counterpart, forwards and backwards.

Forwards, equal terms over partnered operands are one value, whatever nodes are called and in which order they stand.
What is claimed takes its partner's place, so that everything grows on below a difference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.expressions import Expression
from graphprobe.align.matching import Matching, shown_as
from graphprobe.align.numbering import Place
from graphprobe.align.steps import is_cast
from graphprobe.align.terms import Terms

_MOST_ALIKE = 256  # pairs of equal values that are told apart by their use
_MOST_USES = 64


def claim(matching: Matching) -> None:
    """Claim what has equal terms and equal shape, one for one; a cast claims what its operand claims.

    Where one side holds a value more often, only what is used alike on both sides is claimed.
    """
    left, right = _both_places(matching)
    for place, ys in right.items():
        xs = left.get(place)
        if xs is None:
            continue
        open_xs, open_ys = _open(matching, xs, ys)
        pairs = _in_order(open_xs, open_ys) if len(open_xs) == len(open_ys) else _by_use(matching, open_xs, open_ys)
        for x, y in pairs:
            matching.add(x, y, "structure")
        _claim_rest(matching, xs, ys, _is_only_moved)
    _claim_views(matching, left, right)


def claim_undecided(matching: Matching) -> None:
    """Claim what has equal terms and equal shape where nothing has told which of several is meant.

    What is used by two that are claimed is meant, also where that makes one the partner of several; else in order.
    """
    left, right = _both_places(matching)
    known = len(matching.alignment.claims)
    for place, ys in reversed(right.items()):  # what is used by what is claimed now may tell of what it is made of
        for x, y in _by_users(matching, left.get(place, []), ys):
            matching.add(x, y, "structure")
    for place, ys in right.items() if len(matching.alignment.claims) == known else ():
        for x, y in _in_order(*_open(matching, left.get(place, []), ys)):
            matching.add(x, y, "structure")


def _open(matching: Matching, xs: list[Node], ys: list[Node]) -> tuple[list[Node], list[Node]]:
    of_before, of_after = matching.alignment.of_before, matching.alignment.of_after
    return [x for x in xs if not of_before.get(x)], [y for y in ys if not of_after.get(y)]


def claim_again(matching: Matching) -> None:
    """Claim a partner once more: what is computed twice on one side and once on the other.

    Comes last: a wrong operator may compute what another node computes, and has a place of its own.
    """
    left, right = _both_places(matching)
    for place, ys in right.items():
        if place in left:
            _claim_rest(matching, left[place], ys, lambda n, others, terms: True)


Which = Callable[[Node, list[Node], Terms], bool]


def _claim_rest(matching: Matching, xs: list[Node], ys: list[Node], which: Which) -> None:
    of_before, of_after = matching.alignment.of_before, matching.alignment.of_after
    for y in ys:
        if not of_after.get(y) and which(y, xs, matching.terms("after")):
            matching.add(_like(y, xs), y, "structure")
    for x in xs:
        if not of_before.get(x) and which(x, ys, matching.terms("before")):
            matching.add(x, _like(x, ys), "structure")


def _is_only_moved(node: Node, others: list[Node], terms: Terms) -> bool:
    """Whether a node makes no values of its own, and is like at most one of the others: else it is seen by its use."""
    return terms.of[node].step is not None and sum(_kind(n) == _kind(node) for n in others) < 2


def _both_places(matching: Matching) -> tuple[dict[Place, list[Node]], dict[Place, list[Node]]]:
    return _places(matching, "before", matching.numbers_before()), _places(matching, "after", matching.numbers_after())


def _places(matching: Matching, side: str, numbers: dict[Node, int]) -> dict[Place, list[Node]]:
    found: dict[Place, list[Node]] = defaultdict(list)
    for node, shape in zip(matching.makers(side), matching.shapes(side), strict=True):
        found[numbers[node], shape].append(node)
    return found


def _in_order(xs: list[Node], ys: list[Node]) -> list[tuple[Node, Node]]:
    """Pair equal values: the same operator and dtype first, then in order."""
    if len(xs) == len(ys) == 1:
        return [(xs[0], ys[0])]
    pairs: list[tuple[Node, Node]] = []
    left = list(ys)
    for alike in (True, False):
        for x in xs:
            if any(x is p for p, _ in pairs):
                continue
            y = next((y for y in left if not alike or _kind(x) == _kind(y)), None)
            if y is not None:
                left.remove(y)
                pairs.append((x, y))
    return pairs


def _by_use(matching: Matching, xs: list[Node], ys: list[Node]) -> list[tuple[Node, Node]]:
    """Pair equal values of which one side holds more: those that are used alike.

    One may be there by mistake: a sine in the place of the cosine beside it.
    """
    if not xs or not ys or len(xs) * len(ys) > _MOST_ALIKE:
        return []
    before = [_uses(x, matching.numbers_before()) for x in xs]
    after = [_uses(y, matching.numbers_after()) for y in ys]
    shared = {(x, y): len(b & a) for x, b in zip(xs, before, strict=True) for y, a in zip(ys, after, strict=True)}
    pairs: list[tuple[Node, Node]] = []
    taken: set[Node] = set()
    for x, y in sorted(shared, key=lambda pair: (_kind(pair[0]) != _kind(pair[1]), -shared[pair])):
        if shared[x, y] and x not in taken and y not in taken:
            taken |= {x, y}
            pairs.append((x, y))
    return pairs


def _by_users(matching: Matching, xs: list[Node], ys: list[Node]) -> list[tuple[Node, Node]]:
    """Pair equal values where what uses the one is claimed with what uses the other: the table of that very layer."""
    open_xs, open_ys = (set(group) for group in _open(matching, xs, ys))
    if len(xs) == len(ys) or not xs or not (open_xs or open_ys) or len(xs) * len(ys) > _MOST_ALIKE:
        return []
    before: dict[Node, list[Node]] = defaultdict(list)  # the users of xs, and what they use
    for x in xs:
        for user in _claimable_users(x):
            before[user].append(x)
    pairs = []
    for y in ys:
        partners = [nodes.shown(c.before) for user in _claimable_users(y) for c in matching.alignment.of_after[user]]
        used = list(dict.fromkeys(x for p in partners for x in before.get(p, ())))
        alike = [x for x in used if _kind(x) == _kind(y)] or used
        pairs += [(x, y) for x in alike if y in open_ys or x in open_xs]
    return pairs


def _claimable_users(node: Node) -> list[Node]:
    """Return the operations that use a value, or a view or a cast of it."""
    found, stack = list[Node](), list(node.users)
    while stack and len(found) < _MOST_USES:
        user = stack.pop()
        if nodes.is_view(user) or is_cast(user):
            stack.extend(user.users)
        else:
            found.append(user)
    return found


def _uses(node: Node, numbers: dict[Node, int]) -> set[Place]:
    """Return what is done with a value, and with what else, seen through what takes no other operand."""
    found: set[Place] = set()
    stack = [(user, node) for user in node.users]
    while stack and len(found) < _MOST_USES:
        user, source = stack.pop()
        others = sorted(numbers[n] for n in user.all_input_nodes if n is not source and n in numbers)
        if others:
            found.add((provenance.target_name(user), *others))
        else:
            stack.extend((further, user) for further in user.users)
    return found


def _like(node: Node, others: list[Node]) -> Node:
    """Return the one that is most like a node: by operator and dtype, then by precision, by dtype, by place."""
    return max(
        others,
        key=lambda n: (_kind(n) == _kind(node), _precision(n) == _precision(node), _dtype(n) == _dtype(node)),
    )


def _precision(node: Node) -> float:
    """Return the unit roundoff of the narrowest dtype that a value has been cast to on its way."""
    coarsest = 0.0
    while True:
        dtype = _dtype(node)
        if dtype is not None and dtype.is_floating_point:
            coarsest = max(coarsest, torch.finfo(dtype).eps)
        if not (is_cast(node) or nodes.is_view(node) or nodes.schema_name(node) == "aten::type_as"):
            return coarsest
        node = node.all_input_nodes[0]


def _dtype(node: Node) -> torch.dtype | None:
    value = nodes.tensor_val(node)
    return None if value is None else value.dtype


def _kind(node: Node) -> tuple[str, torch.dtype | None, float]:
    return provenance.target_name(node), _dtype(node), _precision(node)


def _claim_views(matching: Matching, left: dict[Place, list[Node]], right: dict[Place, list[Node]]) -> None:
    """Where one side makes a value in another shape, claim the view of it that has the shape (addmm for linear)."""
    of_before, of_after = matching.alignment.of_before, matching.alignment.of_after
    lone_before = {place: xs for place, xs in left.items() if place not in right and not of_before.get(xs[0])}
    lone_after = {place: ys for place, ys in right.items() if place not in left and not of_after.get(ys[0])}
    for lone, program, numbers, is_before in (
        (lone_before, matching.after, matching.numbers_after(), True),
        (lone_after, matching.before, matching.numbers_before(), False),
    ):
        makers = set(matching.makers("after" if is_before else "before")) if lone else set()
        for node in program.live if lone else ():
            if node in makers or node.op in ("placeholder", "get_attr"):
                continue
            for other in lone.pop((numbers[node], nodes.shape(node)), ()):
                matching.add(*((other, node) if is_before else (node, other)), evidence="structure")


# --- backwards --------------------------------------------------------------------------------------------------


def claim_operands(matching: Matching) -> None:
    """Claim what stands in the same place of a claimed pair of equal operators, where it is the only one in doubt."""
    before, after = matching.numbers_before(), matching.numbers_after()
    terms = matching.terms("before"), matching.terms("after")
    for claim in list(matching.alignment.claims):
        x, y = terms[0].root(claim.before)[0], terms[1].root(claim.after)[0]
        mine, theirs = terms[0].of.get(x), terms[1].of.get(y)
        if mine is None or theirs is None or mine.expression[:1] != theirs.expression[:1]:
            continue
        if shape_of(mine.expression) != shape_of(theirs.expression) or len(mine.operands) != len(theirs.operands):
            continue
        pairs = list(zip(mine.operands, theirs.operands, strict=True))
        unequal = [(p, q) for p, q in pairs if before[p] != after[q]]
        if len(pairs) == 2 and len(unequal) == 2:  # add(a, b) may be add(b, a) on the other side
            crossed = [(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1])]
            straight = unequal
            unequal = [(p, q) for p, q in crossed if before[p] != after[q]]
            if len(unequal) == 2:
                alike = _likeness(terms, before, after, straight) - _likeness(terms, before, after, crossed)
                swaps = mine.expression[0] in ("add", "mul") and mine.expression[2:] == (0, 1)
                unequal = straight if alike > 0 or not swaps else crossed if alike < 0 else []
        for p, q in unequal:
            _claim_operand(matching, terms, p, q)


def _likeness(
    terms: tuple[Terms, Terms], before: dict[Node, int], after: dict[Node, int], pairs: list[tuple[Node, Node]]
) -> int:
    """Count the operands that pairs of operands have in common."""
    count = 0
    for p, q in pairs:
        mine, theirs = terms[0].of.get(terms[0].root(p)[0]), terms[1].of.get(terms[1].root(q)[0])
        if mine is not None and theirs is not None:
            count += len({before[n] for n in mine.operands} & {after[n] for n in theirs.operands})
    return count


def shape_of(expression: Expression) -> Expression:
    """Strip an expression of its constants; a weight that is turned first is that weight."""
    if expression[0] == "turned":
        return shape_of(expression[2]) if isinstance(expression[2], tuple) else expression[2]
    return (expression[0], *(shape_of(c) if isinstance(c, tuple) else c for c in expression[2:]))


def _claim_operand(matching: Matching, terms: tuple[Terms, Terms], p: Node, q: Node) -> None:
    (x, steps_x), (y, steps_y) = terms[0].root(p), terms[1].root(q)
    if not (nodes.makes_values(x) and nodes.makes_values(y)):
        return
    if matching.alignment.of_before.get(x) or matching.alignment.of_after.get(y):
        return
    if steps_x == steps_y and nodes.shape(x) == nodes.shape(y) is not None:
        matching.add(x, y, "operand")
    elif steps_x == steps_y and (shown := shown_as(y, nodes.shape(x), terms[1])) is not None:
        matching.add(x, shown, "operand")
    elif steps_x == steps_y and (shown := shown_as(x, nodes.shape(y), terms[0])) is not None:
        matching.add(shown, y, "operand")
    elif nodes.shape(p) == nodes.shape(q) is not None and (nodes.makes_values(p) or nodes.makes_values(q)):
        matching.add(p, q, "operand")

"""Evidence 4, slots: what stands alone in its place between what is claimed, whatever it computes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.expressions import Term
from graphprobe.align.matching import Matching
from graphprobe.align.numbering import Place


def claim(matching: Matching) -> None:
    """Claim what stands alone in its place: the only unclaimed node of its shape on the same partnered operands.

    First places are told apart by weights too, then by operator; then only by what feeds them, so that a wrong operator
    or a wrong weight is met in its place instead of in all that consumes it. Last, one operation too many is seen
    through: what is done to its result stands where the same is done to its operand. Too many is only what more is left
    of than on the other side: what stands wrong in its own place is none.
    """
    mine, theirs = _kinds(matching.unclaimed_before()), _kinds(matching.unclaimed_after())
    plain = [(slot, Kinds(), Kinds()) for slot in (_slot_by_weight, _slot_by_operator, _slot_by_feeds)]
    for slot, spare_before, spare_after in (*plain, (_slot_by_operator, mine - theirs, theirs - mine)):
        left = _by_slot(matching, "before", slot, spare_before)
        right = _by_slot(matching, "after", slot, spare_after)
        known = len(matching.alignment.claims)
        for place, ys in right.items():
            xs = left.get(place, [])
            if len(xs) == len(ys) == 1 and (slot is not _slot_by_feeds or _used_alike(xs[0], ys[0])):
                matching.add(xs[0], ys[0], "slot")
        if len(matching.alignment.claims) > known:
            return


def _used_alike(x: Node, y: Node) -> bool:
    """Whether what consumes the two nodes, seen through views, has an operator in common."""
    return not _consumers(x).isdisjoint(_consumers(y))


def _consumers(node: Node) -> set[str]:
    found: set[str] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if nodes.is_view(user):
            stack.extend(user.users)
        else:
            found.add(provenance.target_name(user))
    return found


Kinds = Counter[str]
Slot = Callable[[Node, list[int], list[int]], Place]


def _kinds(unclaimed: list[Node]) -> Kinds:
    return Counter(provenance.target_name(n) for n in unclaimed)


def _by_slot(matching: Matching, side: str, slot: Slot, spare: Kinds) -> dict[Place, list[Node]]:
    claimed = matching.alignment.of(side)
    numbers = matching.numbers(side)
    terms = matching.terms(side)
    inputs = set(matching.before.inputs) & set(matching.after.inputs)
    program = matching.before if side == "before" else matching.after
    shared = {program.inputs[path] for path in inputs}
    found: dict[Place, list[Node]] = defaultdict(list)
    for node in matching.makers(side):
        if claimed.get(node):
            continue
        feeds: list[int] = []
        weights: list[int] = []
        for operand in node.all_input_nodes:
            source, through = operand, False
            while not claimed.get(source) and (term := terms.of.get(source)) is not None:
                if terms.is_weight(source):
                    break
                if term.step is None:
                    if through or provenance.target_name(source) not in spare or not _only_changes(source, term):
                        break
                    through = True
                source = term.operands[0]
            if terms.is_weight(source):
                weights.append(matching.weight(side, source))
            elif source in shared or claimed.get(source):
                feeds.append(numbers[source])
            else:
                break
        else:
            if feeds and (weights or slot is not _slot_by_weight):
                found[slot(node, sorted(feeds), sorted(weights))].append(node)
    return found


def _only_changes(node: Node, term: Term) -> bool:
    """Whether an operation makes of one value another one of its shape; `zeros_like` makes nothing of it."""
    operands = set(term.operands)
    return nodes.makes_values(node) and len(operands) == 1 and nodes.shape(node) == nodes.shape(term.operands[0])


def _slot_by_weight(node: Node, feeds: list[int], weights: list[int]) -> Place:
    return (nodes.shape(node), *feeds, "|", *weights)


def _slot_by_operator(node: Node, feeds: list[int], weights: list[int]) -> Place:
    return (nodes.shape(node), provenance.target_name(node), *feeds)


def _slot_by_feeds(node: Node, feeds: list[int], weights: list[int]) -> Place:
    return (nodes.shape(node), *feeds)

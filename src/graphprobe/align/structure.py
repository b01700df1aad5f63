"""Evidence 4, structure: the same operator on claimed operands claims its counterpart. Grown from anchored pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.claims import Alignment, Claim
from graphprobe.program import Program, fetch

Print = tuple[Any, ...]


def claim(before: Program, after: Program, alignment: Alignment) -> None:
    """Walk both graphs forwards; nodes with equal operator, shape and partnered operands claim each other.

    What is computed twice on one side and once on the other claims the same partner twice.
    """
    names_before: dict[Node, Any] = {n: ("input", p) for p, n in before.inputs.items()}
    names_after: dict[Node, Any] = {n: ("input", p) for p, n in after.inputs.items()}
    waiting: dict[Print, list[Node]] = defaultdict(list)
    first: dict[Print, Node] = {}  # of all nodes of before that compute one thing
    for x in before.live:
        if x in names_before:
            continue
        print_ = _print(x, before, names_before)
        if not nodes.makes_values(x):
            names_before[x] = print_
            continue
        twin = x if nodes.is_random(x) else first.setdefault(print_, x)
        names_before[x] = id(twin)
        if not alignment.of_before.get(x):
            waiting[print_].append(x)
    for claim in alignment.claims:
        names_after.setdefault(claim.after, names_before.get(claim.before, id(claim.before)))
    for y in after.live:
        if y in names_after:
            continue
        print_ = _print(y, after, names_after)
        if not nodes.makes_values(y):
            names_after[y] = print_
            continue
        found = waiting[print_].pop(0) if waiting.get(print_) else first.get(print_)
        if found is not None:
            alignment.add(Claim(found, y, "structure", certain=False))
        names_after[y] = ("new", id(y)) if found is None else names_before[found]
    for print_, left in waiting.items():
        for known in list(alignment.of_before.get(first[print_], ()))[:1] if print_ in first else ():
            for x in left:
                alignment.add(Claim(x, known.after, "structure", certain=False))


def claim_slots(before: Program, after: Program, alignment: Alignment) -> None:
    """Claim what stands alone in its place: the only unclaimed node of its shape on the same partnered operands.

    First places are told apart by weights too, then by operator; then only by what feeds them, so that a wrong operator
    or a wrong weight is met in its place instead of in all that consumes it.
    """
    for slot in (_slot_by_weight, _slot_by_operator, _slot_by_feeds):
        partner = {c.after: c.before for c in alignment.claims}
        paths = {after.inputs[p]: x for p, x in before.inputs.items() if p in after.inputs}
        left = _by_slot(before, alignment.of_before, slot, lambda n: n)
        right = _by_slot(after, alignment.of_after, slot, lambda n: partner.get(n, paths.get(n)))  # noqa: B023
        known = len(alignment.claims)
        for place, ys in right.items():
            xs = left.get(place, [])
            if len(xs) == len(ys) == 1 and (slot is not _slot_by_feeds or _used_alike(xs[0], ys[0])):
                alignment.add(Claim(xs[0], ys[0], "slot", certain=False))
        if len(alignment.claims) > known:
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


Partner = Callable[[Node], Node | None]


def _by_slot(
    program: Program,
    claimed: dict[Node, list[Claim]],
    slot: Callable[[Node, list[str], list[str]], Print],
    stands_for: Partner,
) -> dict[Print, list[Node]]:
    found: dict[Print, list[Node]] = defaultdict(list)
    for node in program.live:
        if not nodes.makes_values(node) or claimed.get(node):
            continue
        feeds = _feeds(node, stands_for)
        if feeds is not None and feeds[0]:
            found[slot(node, *feeds)].append(node)
    return found


def _feeds(node: Node, stands_for: Partner) -> tuple[list[str], list[str]] | None:
    """Name what feeds a node, seen through views: (partnered operands, weights); None where one has no partner."""
    operands, weights = [], []
    for operand in node.all_input_nodes:
        source = operand
        while nodes.is_view(source) and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if source.op == "get_attr":
            weights.append(str(source.target))
            continue
        known = stands_for(source)
        if known is None:
            return None
        operands.append(str(id(known)))
    return sorted(operands), sorted(weights)


def _slot_by_weight(node: Node, operands: list[str], weights: list[str]) -> Print:
    return (nodes.shape(node), *operands, "|", *weights)


def _slot_by_operator(node: Node, operands: list[str], weights: list[str]) -> Print:
    return (nodes.shape(node), provenance.target_name(node), *operands)


def _slot_by_feeds(node: Node, operands: list[str], weights: list[str]) -> Print:
    return (nodes.shape(node), *operands)


def _print(node: Node, program: Program, names: dict[Node, Any]) -> Print:
    """Fingerprint: operator, shape, and every argument, operands by the before node they stand for."""
    if node.op == "get_attr":
        value = fetch(program.gm, str(node.target))
        return ("weight", str(node.target), tuple(getattr(value, "shape", ())))

    def show(value: Any) -> Any:
        if isinstance(value, Node):
            return names.get(value, ("unknown", id(value)))
        if isinstance(value, (list, tuple)):
            return tuple(show(v) for v in value)
        if isinstance(value, dict):
            return tuple(sorted((k, show(v)) for k, v in value.items()))
        return repr(value)

    return (provenance.target_name(node), nodes.shape(node), show(node.args), show(dict(node.kwargs)))

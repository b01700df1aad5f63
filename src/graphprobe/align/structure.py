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
    """Walk both graphs forwards; nodes with equal operator, shape and partnered operands claim each other."""
    names_before: dict[Node, Any] = {n: ("input", p) for p, n in before.inputs.items()}
    names_after: dict[Node, Any] = {n: ("input", p) for p, n in after.inputs.items()}
    waiting: dict[Print, list[Node]] = defaultdict(list)
    for claim in alignment.claims:
        names_before.setdefault(claim.before, id(claim.before))
        names_after.setdefault(claim.after, id(claim.before))
    for x in before.live:
        names_before.setdefault(x, id(x) if nodes.makes_values(x) else _print(x, before, names_before))
        if nodes.makes_values(x) and not alignment.of_before.get(x):
            waiting[_print(x, before, names_before)].append(x)
    for y in after.live:
        if y in names_after:
            continue
        print_ = _print(y, after, names_after)
        if nodes.makes_values(y) and waiting.get(print_):
            x = waiting[print_].pop(0)
            alignment.add(Claim(x, y, "structure", certain=False))
            names_after[y] = id(x)
        else:
            names_after[y] = print_ if not nodes.makes_values(y) else ("new", id(y))


def claim_slots(before: Program, after: Program, alignment: Alignment) -> None:
    """Claim what stands alone in its place: the only unclaimed node of its shape on the same partnered operands.

    The operator or a constant may differ: that is how a wrong operator is met in its place instead of in all that
    consumes it.
    """
    left = _by_slot(before, alignment.of_before, lambda n: n)
    partner = {c.after: c.before for c in alignment.claims}
    paths = {after.inputs[p]: x for p, x in before.inputs.items() if p in after.inputs}
    right = _by_slot(after, alignment.of_after, lambda n: partner.get(n, paths.get(n)))
    for slot, ys in right.items():
        xs = left.get(slot, [])
        if len(xs) == len(ys) == 1:
            alignment.add(Claim(xs[0], ys[0], "slot", certain=False))


def _by_slot(
    program: Program, claimed: dict[Node, list[Claim]], stands_for: Callable[[Node], Node | None]
) -> dict[Print, list[Node]]:
    found: dict[Print, list[Node]] = defaultdict(list)
    for node in program.live:
        if not nodes.makes_values(node) or claimed.get(node):
            continue
        slot = _slot(node, stands_for)
        if slot is not None:
            found[slot].append(node)
    return found


def _slot(node: Node, stands_for: Callable[[Node], Node | None]) -> Print | None:
    """Name a place: shape, and what feeds it: partnered operands and weights, seen through views."""
    feeds = []
    for operand in node.all_input_nodes:
        source = operand
        while nodes.is_view(source) and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if source.op == "get_attr":
            feeds.append(("weight", str(source.target)))
            continue
        known = stands_for(source)
        if known is None:
            return None
        feeds.append(("node", str(id(known))))
    return (nodes.shape(node), tuple(sorted(feeds))) if feeds else None


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

"""What nothing claims, and why; and for one node, why it was or was not matched and what came nearest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.claims import Alignment, Claim
from graphprobe.align.matching import Matching
from graphprobe.align.sketches import sketches
from graphprobe.errors import InputError, nearest
from graphprobe.program import Program
from graphprobe.records import Leftover

#: Reasons, by the side a node stands on. What is fused, written out or rewritten is judged inside a region.
ELIMINATED = "eliminated"  # before only: nothing in after stands in its place
ADDED = "added"  # after only: nothing in before stands in its place
FUSED = "fused"  # one operation of the other side does this and more
REWRITTEN = "rewritten"  # several operations of each side, none of which is one of the other's
_COUNTED = "it holds indices or counts of tokens, and the sides have not as many: other numbers by right"
MET = ("same value",)  # another node of this side holds the same value and is claimed


def leftovers(matching: Matching) -> tuple[tuple[Leftover, ...], tuple[Leftover, ...]]:
    """List the value-making operations without a claim, (of before, of after), each with the reason."""
    return unclaimed(matching.before, matching.after, matching.alignment)


def unclaimed(
    before: Program, after: Program, alignment: Alignment
) -> tuple[tuple[Leftover, ...], tuple[Leftover, ...]]:
    """List the value-making operations without a claim, (of before, of after), each with the reason."""
    out = []
    for program, other, mine, is_before in (
        (before, after, alignment.of_before, True),
        (after, before, alignment.of_after, False),
    ):
        found = []
        for node in program.live:
            if nodes.makes_values(node) and not mine.get(node):
                found.append(_leftover(program, other, node, alignment, is_before))
        out.append(tuple(found))
    return out[0], out[1]


def _leftover(program: Program, other: Program, node: Node, alignment: Alignment, is_before: bool) -> Leftover:
    mine = alignment.of_before if is_before else alignment.of_after
    claim = _below(node, mine)
    if claim is None:
        return Leftover(program.label(node), ELIMINATED if is_before else ADDED, "nothing below it is claimed")
    pair = nodes.shown(claim.before), nodes.shown(claim.after)
    here, there = pair if is_before else pair[::-1]
    theirs = alignment.of_after if is_before else alignment.of_before
    inner = _inside(there, theirs)
    where = f"above {program.label(here)} = {other.label(there)}"
    if len(inner) <= 1:
        if provenance.target_name(here) == provenance.target_name(there):
            return Leftover(program.label(node), ELIMINATED if is_before else ADDED, where)
        return Leftover(program.label(node), FUSED, f"{where}: {provenance.target_name(there)} stands for all of it")
    shown = ", ".join(other.label(n) for n in inner[:4])
    return Leftover(
        program.label(node), REWRITTEN, f"{where}: in its place {shown}{' and more' if len(inner) > 4 else ''}"
    )


def _below(node: Node, claimed: dict[Node, list[Claim]]) -> Claim | None:
    """Return the first claim that a node feeds."""
    layer, seen = [node], {node}
    while layer:
        following: list[Node] = []
        for one in layer:
            for user in one.users:
                found = claimed.get(user)
                if found:
                    return found[0]
                if user not in seen:
                    seen.add(user)
                    following.append(user)
        layer = following
    return None


def _inside(node: Node, claimed: dict[Node, list[Claim]]) -> list[Node]:
    """Return the value-making operations between a claimed node and the claims above it, itself included."""
    out, stack, seen = [], [node], {node}
    while stack:
        one = stack.pop()
        if nodes.makes_values(one):
            out.append(one)
        for operand in one.all_input_nodes:
            if operand not in seen and not claimed.get(operand):
                seen.add(operand)
                stack.append(operand)
    return out


# --- one node ---------------------------------------------------------------------------------------------------


def explained(matching: Matching, name: str) -> str:
    """Say why the node of that name, on whichever side, was or was not matched. Raises InputError for no such node."""
    found = []
    for side, program in (("before", matching.before), ("after", matching.after)):
        node = next((n for n in program.live if name in (program.label(n), n.name)), None)
        if node is not None:
            found.append(_explained(matching, side, node))
    if not found:
        known = [p.label(n) for p in (matching.before, matching.after) for n in p.live]
        raise InputError(f"neither graph has an operation {name!r}{nearest(name, known)}; graphprobe show lists them")
    return "\n\n".join(found)


def _explained(matching: Matching, side: str, node: Node) -> str:
    program, other = (matching.before, matching.after) if side == "before" else (matching.after, matching.before)
    claims = matching.alignment.of(side).get(node, [])
    shape = "x".join(str(d) for d in nodes.shape(node) or ()) or "shape unknown"
    path = provenance.module_path(node)
    lines = [
        f"{program.label(node)} of {side}: {provenance.target_name(node)} [{shape}]" + (f" in {path}" if path else "")
    ]
    for claim in claims:
        partner = claim.after if side == "before" else claim.before
        view = f", shown as {claim.view}" if claim.view else ""
        doubt = "" if claim.certain else "; withdrawn if it fails and all below agrees without it"
        lines.append(
            f"  claimed: {other.label(partner)} ({provenance.target_name(nodes.shown(partner))}){view}\n"
            f"    evidence {claim.evidence}, confidence {claim.confidence:.2f}{doubt}"
        )
    if not claims:
        lines.append(_why_not(matching, side, node, program, other))
    lines += _near_misses(matching, side, node, other, {c.after if side == "before" else c.before for c in claims})
    return "\n".join(lines)


def _why_not(matching: Matching, side: str, node: Node, program: Program, other: Program) -> str:
    if node.op in ("placeholder", "get_attr"):
        return "  not claimed: inputs and weights are part of the regions that read them"
    if nodes.is_view(node):
        return "  not claimed: a view, it only re-arranges what another node has made"
    if not nodes.makes_values(node):
        return "  not claimed: it makes no tensor"
    found = _leftover(program, other, node, matching.alignment, side == "before")
    said = f"  not claimed: {found.why}, {found.detail}"
    return said + (f"\n  {_COUNTED}" if node in matching.counted else "")


def _near_misses(matching: Matching, side: str, node: Node, other: Program, taken: set[Node]) -> list[str]:
    if not nodes.makes_values(node):
        return []
    lines = []
    by_value = _nearest_value(matching, side, node, taken)
    if by_value:
        lines.append(by_value)
    by_structure = _nearest_structure(matching, side, node, taken)
    if by_structure:
        lines.append(by_structure)
    return lines


def _nearest_value(matching: Matching, side: str, node: Node, taken: set[Node]) -> str:
    if matching.bound is None:
        return "  by value: nothing was run"
    program, other = (matching.before, matching.after) if side == "before" else (matching.after, matching.before)
    mine = sketches(program, matching.bound, [node]).get(node)
    if mine is None:
        return "  by value: it holds too few different numbers to be told apart (a mask, a constant)"
    size = nodes.elements(node)
    wanted = [n for n in other.live if nodes.makes_values(n) and n not in taken and nodes.elements(n) == size]
    known = sketches(other, matching.bound, wanted)
    norm = torch.linalg.vector_norm(mine.double())
    distances = {
        n: float(torch.linalg.vector_norm(s.double() - mine.double()) / norm)
        for n, s in known.items()
        if s.shape == mine.shape
    }
    if not distances:
        return "  by value: nothing else on the other side has as many elements"
    best = min(distances, key=distances.__getitem__)
    claims = matching.alignment.of("after" if side == "before" else "before")
    whose = _whose(claims.get(best, []), program, side)
    return f"  by value: nearest is {other.label(best)}, {distances[best]:.1e} away relative to its size{whose}"


def _whose(claims: list[Claim], program: Program, side: str) -> str:
    if not claims:
        return ", claimed by nothing"
    partner = claims[0].before if side == "before" else claims[0].after
    return f", which {program.label(partner)} claims ({claims[0].evidence})"


def _same_operator(other: Program, node: Node, taken: set[Node]) -> str:
    """Say which node of the same module does the same to a value of another shape, if any."""
    name, path = provenance.target_name(node), provenance.module_path(node)
    alike = [n for n in other.live if provenance.target_name(n) == name and provenance.module_path(n) == path]
    alike = [n for n in alike if nodes.INSERTED not in n.meta and n not in taken and nodes.shape(n) is not None]
    told = f"  by structure: the other side has no other {name} of this shape"
    if not alike or not path:
        return told
    shape = "x".join(str(d) for d in nodes.shape(alike[0]) or ())
    return f"{told}; in the same module {other.label(alike[0])} does this, of shape [{shape}]"


def _nearest_structure(matching: Matching, side: str, node: Node, taken: set[Node]) -> str:
    """Name the node of the other side with the same operator and shape that shares the most operands."""
    before, after = matching.numbers_before(), matching.numbers_after()
    mine, theirs = (before, after) if side == "before" else (after, before)
    other: Program = matching.after if side == "before" else matching.before
    program: Program = matching.before if side == "before" else matching.after
    operands = {mine[n]: n for n in node.all_input_nodes}
    same: Callable[[Node], bool] = lambda n: (  # noqa: E731
        nodes.makes_values(n)
        and n not in taken
        and provenance.target_name(n) == provenance.target_name(node)
        and nodes.shape(n) == nodes.shape(node)
    )
    candidates = [n for n in other.live if same(n)]
    if not candidates:
        return _same_operator(other, node, taken)
    best = max(candidates, key=lambda n: len({theirs[m] for m in n.all_input_nodes} & operands.keys()))
    shared = {theirs[m] for m in best.all_input_nodes} & operands.keys()
    lacking = [program.label(n) for number, n in operands.items() if number not in shared]
    told = (
        f"all {len(shared)} operands agree"
        if not lacking
        else f"{', '.join(lacking)} has no counterpart among its operands"
    )
    claims = matching.alignment.of("after" if side == "before" else "before")
    return f"  by structure: nearest is {other.label(best)}, {told}{_whose(claims.get(best, []), program, side)}"

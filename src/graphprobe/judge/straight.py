"""Rule 5, claims crosswise: values that a defect makes equal claim each other below it.

A slice that starts one token too late makes after's first step hold what before's second does, and so on down a scan:
by their values the steps claim each other crosswise, and where they come together again the sides disagree. But two
nodes whose pieces are one program, operand by operand up to pairs that are claimed, are one function whatever the
values say. Where a failing claim is such a pair, the guesses across its pieces were wrong, and the pairs that play the
same part take their place. A wrong operand is no such case: what it leads to is not the same program, or is claimed by
something surer than a guess.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Alignment, Claim
from graphprobe.lanes.regions import SMALL
from graphprobe.lanes.same import Weights, same_arguments
from graphprobe.program import Program

EVIDENCE = "structure"
LARGEST = 512  # operations of the two pieces that are looked at
Pairs = dict[tuple[Node, Node], None]


@dataclass(frozen=True)
class Straight:
    """Guesses that run across two pieces of one program, and the claims that pair what plays the same part."""

    crosswise: list[Claim]
    instead: list[Claim]


def straight(
    claim: Claim, alignment: Alignment, weights: Weights, kept: Collection[Claim], other: int = 0
) -> Straight | None:
    """Return what stands crosswise above a claim, if its two pieces are one program but for at most `other` operations
    that do something else, or that one side has too much; None where nothing does. `kept` claims are no guesses."""
    if nodes.INSERTED in claim.before.meta and nodes.INSERTED in claim.after.meta:
        return None  # some rows of either: all of the one is not all of the other
    claimed = {(c.before, c.after) for c in alignment.claims if c.cut}
    pairs, differing = _one_program(claim, claimed, weights)
    if len(differing) > other:
        return None
    doubtful = bool(differing)
    for pair in differing:
        if _is_put_in(*pair, alignment):
            del pairs[pair]  # what takes it is no pair that agrees, and says so
        elif not _plays_the_part(*pair) or _partners(*pair, alignment):
            return None
    befores, afters = {p for p, _ in pairs}, {q for _, q in pairs}
    # a part of what is claimed as a whole says nothing more
    touching = [c for c in alignment.claims if nodes.shown(c.before) in befores or nodes.shown(c.after) in afters]
    crosswise = [c for c in touching if (c.before, c.after) not in pairs]
    if not crosswise or any(c.certain or c.output or c in kept for c in crosswise):
        return None
    others = claimed - {(c.before, c.after) for c in crosswise}
    if doubtful and any(not _one_program(c, others, weights)[1] for c in crosswise):
        return None  # they are one program whatever else is claimed: it is another operand that is taken
    known = {(c.before, c.after) for c in touching}
    new = [pair for pair in pairs if pair not in known and all(nodes.makes_values(n) for n in pair)]
    return Straight(crosswise, [Claim(p, q, EVIDENCE, certain=False) for p, q in new])


def _one_program(claim: Claim, claimed: Collection[tuple[Node, Node]], weights: Weights) -> tuple[Pairs, Pairs]:
    """Walk both pieces at once up to what is claimed, and return all pairs, and those that do not do the same."""
    pairs: Pairs = {}
    differing: Pairs = {}
    stack = [(claim.before, claim.after)]
    while stack:
        p, q = pair = stack.pop()
        if pair in pairs:
            continue
        pairs[pair] = None
        if len(pairs) > LARGEST or not _does_the_same(p, q):
            differing[pair] = None
            continue  # what it is made of is its own affair
        operands = zip(p.all_input_nodes, q.all_input_nodes, strict=True)
        stack += [pair for pair in (_underlying(p, q) for p, q in operands) if not _meets(pair, claimed, weights)]
    return pairs, differing


def _plays_the_part(p: Node, q: Node) -> bool:
    """Whether a node may stand for the other: an operation that makes values of the same shape."""
    return p.op == q.op == "call_function" and nodes.shape(p) == nodes.shape(q)


def _partners(p: Node, q: Node, alignment: Alignment) -> list[Claim]:
    """Return the claims of two nodes; a claim of a part of one leaves the whole open."""
    of_before = [c for c in alignment.of_before.get(p, ()) if c.before is p]
    return of_before + [c for c in alignment.of_after.get(q, ()) if c.after is q]


def _is_put_in(p: Node, q: Node, alignment: Alignment) -> bool:
    """Whether one of two nodes is made of the other's partner by operations that the other side does not have."""
    claims = _partners(p, q, alignment)
    if len(claims) != 1:
        return False
    start, partner = (q, claims[0].after) if claims[0].before is p else (p, claims[0].before)
    stack, seen = [start], {start}
    while stack and len(seen) <= SMALL:
        for operand in stack.pop().all_input_nodes:
            if nodes.shown(operand) is partner:
                return True
            known = alignment.of_after.get(operand) or alignment.of_before.get(operand)
            if operand not in seen and not known:
                seen.add(operand)
                stack.append(operand)
    return False


def _underlying(p: Node, q: Node) -> tuple[Node, Node]:
    """Step over what alignment has put behind a node to claim parts of it: read as a whole it is that node."""
    return nodes.shown(p), nodes.shown(q)


def _meets(pair: tuple[Node, Node], claimed: Collection[tuple[Node, Node]], weights: Weights) -> bool:
    p, q = pair
    if p.op == q.op == "get_attr":
        return weights.stands_for(p, q)
    return pair in claimed or _input(p, weights.before) == _input(q, weights.after) != ""


def _input(node: Node, program: Program) -> str:
    return next((path for path, n in program.inputs.items() if n is node), "") if node.op == "placeholder" else ""


def _does_the_same(p: Node, q: Node) -> bool:
    if not p.op == q.op == "call_function" or p.target is not q.target or nodes.is_random(p):
        return False
    same = nodes.shape(p) == nodes.shape(q) and len(p.all_input_nodes) == len(q.all_input_nodes)
    return same and same_arguments(p, q)

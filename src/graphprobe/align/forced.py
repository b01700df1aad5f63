"""Evidence 5 once more, below a difference: `after` runs again from before's values, as the forced lane will.

Below a bug nothing agrees any more, though everything there is the same. So where both sides are claimed to meet, and
where they have the same part to play, `after` goes on with before's value; what it makes of that agrees again,
everywhere but in the operations that are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align import sliced
from graphprobe.align.counterparts import counterparts
from graphprobe.align.matching import Matching
from graphprobe.execute import run_program

ROUNDS = 4
_MOST = 1 << 30  # bytes of before's values that are held at once


def claim(matching: Matching, ask: Callable[[], None]) -> None:
    """Give `after` before's values and `ask` the values again, until that adds nothing."""
    for _ in range(ROUNDS):
        if not (matching.unclaimed_before() or matching.unclaimed_after()):
            return
        pairs = [(x, y) for x, y, _ in counterparts(matching)]
        cut = sliced.parts(matching)
        # products with weights in another order were claimed at once, and are counterparts no more
        ordered = any(matching.leaves(side).orders for side in ("before", "after"))
        if not (pairs or cut or ordered) or matching.bound is None:
            return
        known = len(matching.alignment.claims)
        chosen = _affordable([*pairs, *_frontier(matching)])
        try:
            held = run_program(matching.before, matching.bound, list(chosen.values())) if chosen else {}
        except Exception:  # the lanes say what raises and where
            return
        matching.force({y: held[x] for y, x in chosen.items()} | sliced.given(matching, cut))
        ask()
        matching.force({})
        if len(matching.alignment.claims) == known:
            return


def _frontier(matching: Matching) -> list[tuple[Node, Node]]:
    """List the claimed pairs that feed what is unclaimed in after."""
    terms, claims = matching.terms("after"), matching.alignment.of_after
    found: dict[Node, Node] = {}
    stack, seen = [n for node in matching.unclaimed_after() for n in node.all_input_nodes], set[Node]()
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        term = terms.of.get(at)
        if claims.get(at):
            claim = claims[at][0]
            if claim.after is at and at.op == "call_function" and nodes.shape(claim.before) == nodes.shape(at):
                found[at] = claim.before
        elif nodes.INSERTED in at.meta:  # what slices of a value were put together into
            stack.extend(at.all_input_nodes)
        elif term is not None and term.step is not None:
            stack.append(term.operands[0])
    return [(x, y) for y, x in found.items()]


def _affordable(pairs: Sequence[tuple[Node, Node]]) -> dict[Node, Node]:
    """Map nodes of after to those of before whose values they are given, as far as memory allows."""
    chosen: dict[Node, Node] = {}
    total = 0
    for x, y in pairs:
        value = nodes.tensor_val(x)
        if not isinstance(value, torch.Tensor) or not all(isinstance(d, int) for d in value.shape):
            continue
        total += value.numel() * value.itemsize
        if total > _MOST:
            break
        chosen[y] = x
    return chosen

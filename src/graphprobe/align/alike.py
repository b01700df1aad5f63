"""Graphs that are one another's but for a few constants: node by node, and no value need be looked at.

A wrong scale leaves everything below it with other values, and yet in its place. So the first open node of one side is
set against the first of the other; if they differ in their constants alone, they are claimed, and structure grows on.
Only if everything finds its partner in this way is any of it believed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.matching import Matching
from graphprobe.align.structure import shape_of

MOST = 16  # constants that differ


def in_order(matching: Matching) -> bool:
    """Whether both sides make their values by the same operators in the same order: quick to ask."""
    left, right = matching.makers("before"), matching.makers("after")
    return len(left) == len(right) and all(x.target == y.target for x, y in zip(left, right, strict=True))


def claim(matching: Matching, grow: Callable[[Matching], None]) -> None:
    """Claim all that is open on both sides, or nothing; `grow` asks for structure again."""
    if not in_order(matching):
        return
    known = len(matching.alignment.claims)
    for _ in range(MOST):
        open_before, open_after = matching.unclaimed_before(), matching.unclaimed_after()
        if not open_before and not open_after:
            return
        if not open_before or not open_after or not _alike(matching, open_before[0], open_after[0]):
            break
        matching.add(open_before[0], open_after[0], "operand")
        grow(matching)
    matching.forget(known)


def _alike(matching: Matching, x: Node, y: Node) -> bool:
    """Whether two nodes apply one operator to the same operands and make values of the same kind."""
    mine, theirs = matching.terms("before").of.get(x), matching.terms("after").of.get(y)
    if mine is None or theirs is None or mine.step is not None or theirs.step is not None:
        return False
    a, b = nodes.tensor_val(x), nodes.tensor_val(y)
    if a is None or b is None or a.dtype != b.dtype or nodes.shape(x) != nodes.shape(y) or x.target != y.target:
        return False
    before, after = matching.numbers_before(), matching.numbers_after()
    operands = zip(mine.operands, theirs.operands, strict=False)
    same = len(mine.operands) == len(theirs.operands) and all(before[p] == after[q] for p, q in operands)
    return same and shape_of(mine.expression) == shape_of(theirs.expression)

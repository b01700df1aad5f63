"""Numbers: every value of both programs gets one, so that equal numbers are equal values in flat order.

What is claimed has its partner's number, so that what is computed from it in the same way has its partner's, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Alignment
from graphprobe.align.expressions import Term
from graphprobe.align.operators import Operators
from graphprobe.align.steps import Step
from graphprobe.align.terms import Numbers, Terms
from graphprobe.align.weights import Block, Leaves, folded, leaves
from graphprobe.program import Program

INTEGERS = {torch.int16, torch.int32, torch.int64}
Place = tuple[Any, ...]  # what nodes of both sides must have in common to be claimed by some evidence


@dataclass(eq=False)
class Numbering:
    """What is claimed between two programs, and the numbers of their values under these claims.

    Terms and weights are read when something first asks for them.
    """

    before: Program
    after: Program
    bound: Mapping[str, Any] | None = None  # the inputs, where the graphs may be run
    alignment: Alignment = field(default_factory=Alignment)
    wholes: dict[Node, Node] = field(default_factory=dict)  # what was put together from slices -> what it stands for
    counted: set[Node] = field(default_factory=set)  # indices into and counts of more tokens, and what follows of them

    def __post_init__(self) -> None:
        self._numbers = Numbers()
        self._operators = Operators()
        self._leaves: tuple[Leaves, Leaves] | None = None
        self._terms: dict[str, Terms] = {}
        self._before: dict[Node, int] | None = None
        self._constants: dict[str, int] | None = None
        self._after: tuple[int, dict[Node, int]] | None = None

    def changed(self) -> None:
        """Forget what was read of the graphs: nodes were inserted."""
        self._terms.clear()
        self._before = self._after = None

    def terms(self, side: str) -> Terms:
        """Return the terms of one side."""
        if side not in self._terms:
            self._terms[side] = Terms(getattr(self, side), self._operators, lambda: self.leaves(side).parts)
        return self._terms[side]

    def numbers_before(self) -> dict[Node, int]:
        """Number every value of before; equal numbers are equal values in flat order."""
        if self._before is None:
            self._before = self._numbered("before", {})
        return self._before

    def numbers_after(self) -> dict[Node, int]:
        """Number every value of after in the same way; what is claimed has its partner's number."""
        if self._after is None or self._after[0] != len(self.alignment.claims):
            known = self.numbers_before()
            stands: dict[Node, int] = {}
            for claim in self.alignment.claims:
                if claim.before in known:
                    stands.setdefault(claim.after, known[claim.before])
            self._after = (len(self.alignment.claims), self._numbered("after", stands))
        return self._after[1]

    def numbers(self, side: str) -> dict[Node, int]:
        """Return `numbers_before` or `numbers_after`."""
        return self.numbers_before() if side == "before" else self.numbers_after()

    def turned(self, number: int, step: Step) -> int:
        """Number a value that is re-arranged by one step."""
        return self._numbers.step(number, step)

    def _numbered(self, side: str, stands: Mapping[Node, int]) -> dict[Node, int]:
        program: Program = getattr(self, side)
        numbers, terms = self._numbers, self.terms(side).of
        paths = {node: path for path, node in program.inputs.items()}
        blocks, parts = self.leaves(side).blocks, self.leaves(side).parts
        out: dict[Node, int] = {}
        longer: set[Node] = set()  # what is computed from values that have more on this side
        for node in program.live:
            known = stands.get(node)
            if known is not None:
                out[node] = known
            elif node in self.wholes:  # the slice of a value is the value of the side that holds only that
                longer.add(node)
                out[node] = stands.get(self.wholes[node], out[self.wholes[node]])
            elif longer and not longer.isdisjoint(node.all_input_nodes) and _counts(node):
                longer.add(node)
                self.counted.add(node)
                out[node] = numbers.of(("count", side, node.name))
            elif node.op == "placeholder":
                out[node] = numbers.of(self._input(side, node, paths))
            elif node.op == "get_attr":
                out[node] = self._leaf(side, str(node.target))
            elif node in parts:
                out[node] = self._leaf(side, parts[node])
            else:
                if longer and not longer.isdisjoint(node.all_input_nodes):
                    longer.add(node)
                    if self.counted.issuperset(node.all_input_nodes):
                        self.counted.add(node)
                term = terms[node]
                if term.step is None:
                    out[node] = numbers.expression(term.expression, [out[n] for n in term.operands])
                else:
                    joined = self._of_block(side, term, out) if blocks and term.step[:1] == ("part",) else None
                    out[node] = joined if joined is not None else numbers.step(out[term.operands[0]], term.step)
        return out

    def _input(self, side: str, node: Node, paths: Mapping[Node, str]) -> Place:
        """Name an input. In a text inputs may have other names than there, or be weights: then the shape is known."""
        path = paths.get(node, node.name)
        other = self.after if side == "before" else self.before
        known = self.bound is not None or path in other.inputs or nodes.shape(node) is None
        return ("input", path) if known else ("unknown", nodes.shape(node))

    def leaves(self, side: str) -> Leaves:
        """Return the names of one side's weights."""
        if self._leaves is None:
            self._leaves = leaves(self.before, self.after, reordered=self.bound is not None)
        return self._leaves[side == "after"]

    def _leaf(self, side: str, target: str) -> int:
        folded = self._folded(side).get(target)
        if folded is not None:
            return folded
        name, turned = self.leaves(side).names.get(target, (("inserted", target), False))
        number = self._numbers.of(name)
        if not turned:
            return number
        shape = tuple(name[1])
        return self._numbers.step(number, ("perm", shape, (1, 0)))

    def weight(self, side: str, node: Node) -> int:
        """Number a weight whatever its orientation: one that is stored turned is the same weight."""
        key = self.leaves(side).key(node)
        name, turned = self.leaves(side).names.get(key or "", ((), False))
        numbers = self.numbers(side)
        return self._numbers.of(name) if turned else numbers[node]

    def _folded(self, side: str) -> dict[str, int]:
        """Number the constants of after that are bitwise what before computes from nothing but constants."""
        if side == "before" or self._before is None:
            return {}
        if self._constants is None:
            leaves = self.leaves("after")
            lone = {t for t, (name, _) in leaves.names.items() if name[0] == "name"} - leaves.cut
            found = folded(self.before, self.after, lone) if lone else {}
            self._constants = {target: self._before[node] for target, node in found.items()}
        return self._constants

    # --- parts of a product with a joined weight ---------------------------------------------------------------------

    def _of_block(self, side: str, term: Term, out: Mapping[Node, int]) -> int | None:
        """Number columns of ``x @ [W1, W2]`` as ``x @ W1``, where the part is just one of the joined weights."""
        assert term.step is not None
        _, _, dim, start, stop, stride = term.step
        terms = self.terms(side)
        made, steps = terms.root(term.operands[0])
        maker = terms.of.get(made)
        if steps or dim != -1 or stride != 1 or maker is None or maker.step is not None:
            return None
        return self._product(side, maker, terms, start, stop, out)

    def _product(
        self, side: str, maker: Term, terms: Terms, start: int, stop: int, out: Mapping[Node, int]
    ) -> int | None:
        name, _, *children = maker.expression
        if name == "add" and len(children) == 2 and isinstance(children[0], tuple) and children[0][0] == "mm":
            product, bias = children[0], children[1]
        elif name == "mm":
            product, bias = maker.expression, None
        else:
            return None
        x, matrix = product[2], product[3]
        turned = isinstance(matrix, tuple) and matrix[0] == "turned"
        column = matrix[2] if turned else matrix
        if not all(isinstance(operand, int) for operand in (x, column, bias or 0)):
            return None  # something is done to the weight first
        weight = self._block(side, maker.operands[column], turned, terms, start, stop)
        if weight is None:
            return None
        parts = [out[maker.operands[x]], weight]
        if bias is None:
            return self._numbers.expression(("mm", (), 0, 1), parts)
        shift = self._block(side, maker.operands[bias], False, terms, start, stop)
        if shift is None:
            return None
        return self._numbers.expression(("add", (), ("mm", (), 0, 1), 2), [*parts, shift])

    def _block(self, side: str, operand: Node, turned: bool, terms: Terms, start: int, stop: int) -> int | None:
        """Number columns `start` to `stop` of a weight, as a matrix that is multiplied from the right."""
        node, steps = terms.root(operand)
        key = self.leaves(side).key(node)
        if key is None:
            return None
        flips = turned + sum(step[0] == "perm" for step in steps)
        if len(steps) != sum(step[0] == "perm" for step in steps):
            return None
        blocks: Iterable[Block] = self.leaves(side).blocks.get(key, ())
        found = next((b for b in blocks if (b.start, b.stop) == (start, stop)), None)
        if found is None:
            return None
        other = "before" if side == "after" else "after"
        shape = found.shape
        number = self._leaf(other, found.target)
        if len(shape) == 1:
            return number
        if found.axis != (1 if flips % 2 == 0 else 0):
            return None
        # rows of the block are columns of the matrix: as [K, n] it is the turned block, or the weight as it is
        return number if found.turned else self._numbers.step(number, ("perm", shape, (1, 0)))


def _counts(node: Node) -> bool:
    """Whether the node holds indices or counts: those of more tokens are others by right."""
    value = nodes.tensor_val(node)
    return value is not None and value.dtype in INTEGERS

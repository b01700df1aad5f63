"""Terms: what a node computes, written so that two ways to write one thing read alike.

`Terms` reads a program once. Every node becomes a *step* (it only re-arranges its operand: a view, a part, a cast) or
an *expression* over operands. `Numbers` then gives equal things one number, across both programs: the number of a
value stands for its elements in flat order, whatever shape they are shown in. Casts among floating dtypes and dropout
outside training do not change a number; `linear`, `addmm` and `matmul` with a transposed weight are one expression.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch.fx import Node

from graphprobe.align.expressions import Expression, Term, expressed
from graphprobe.align.operators import Operators
from graphprobe.align.steps import Step, joined, step_of
from graphprobe.program import Program

_COMMUTE = {"add", "mul", "maximum", "minimum", "bitwise_and", "bitwise_or", "logical_and", "logical_or", "eq", "ne"}


class Terms:
    """The terms of one program, in graph order. Inputs and weights have none: they are leaves.

    `parts` says what is a weight, too, although it is cut out of a larger one; it is asked once something is.
    """

    def __init__(self, program: Program, operators: Operators, parts: Callable[[], Collection[Node]] = tuple) -> None:
        self.program = program
        self._parts = parts
        self.of: dict[Node, Term] = {}
        for node in program.live:
            if node.op not in ("placeholder", "get_attr"):
                self.of[node] = _term(node, program, operators)

    def root(self, node: Node) -> tuple[Node, tuple[Step, ...]]:
        """Follow steps upwards: the node that made the values, and the steps from there that move them."""
        steps: list[Step] = []
        path: list[tuple[Node, int]] = []  # the nodes that cut something out, and how many steps lie below them
        while (term := self.of.get(node)) is not None and term.step is not None:
            if term.step[:1] == ("part",):
                path.append((node, len(steps)))
            if term.step:
                steps.append(term.step)
            node = term.operands[0]
        if path and node.op == "get_attr":
            node, below = next(((n, at) for n, at in path if n in self._parts()), (node, len(steps)))
            del steps[below:]
        out: tuple[Step, ...] = ()
        for step in reversed(steps):
            out = joined(out, step)
        return node, out

    def is_weight(self, node: Node) -> bool:
        """Whether the root of something is a weight, or a part of one that is a weight of its own."""
        if node.op == "get_attr":
            return True
        term = self.of.get(node)
        return term is not None and term.step is not None and term.step[:1] == ("part",) and node in self._parts()


class Numbers:
    """Gives equal expressions over equal numbers one number. Shared by both programs."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}
        self._arranged: dict[int, tuple[int, tuple[Step, ...]]] = {}  # number -> (of which number, steps)
        self._stepped: dict[tuple[int, Step], int] = {}

    def of(self, key: Any) -> int:
        """Return the number of a key; a new one for a key that was never met."""
        return self._known.setdefault(key, len(self._known))

    def expression(self, expression: Expression, operands: Sequence[int]) -> int:
        """Return the number of an expression over numbered operands."""
        name, constants, *children = expression
        numbers = [operands[c] if type(c) is int else self.expression(c, operands) for c in children]
        if name == "turned":
            return self.step(numbers[0], constants)
        if name in _COMMUTE:
            numbers.sort()
        return self.of((name, constants, *numbers))

    def step(self, number: int, step: Step) -> int:
        """Return the number of a value that is re-arranged by one step."""
        if not step:
            return number
        known = self._stepped.get((number, step))
        if known is None:
            root, steps = self._arranged.get(number, (number, ()))
            steps = joined(steps, step)
            known = self.of(("step", root, steps)) if steps else root
            if steps:
                self._arranged[known] = (root, steps)
            self._stepped[number, step] = known
        return known


def _term(node: Node, program: Program, operators: Operators) -> Term:
    step = step_of(node)
    if step is not None:
        source = node.all_input_nodes[0]
        if node.target is operator.getitem:  # of a split: a part of what was split
            source = source.all_input_nodes[0]
        return Term((source,), step)
    if node in program.seeds:  # what is drawn equals what the other side draws with the same seed
        return Term(
            tuple(node.all_input_nodes), None, ("random", program.seeds[node], *range(len(node.all_input_nodes)))
        )
    if node.target is not operator.getitem:
        return operators.term(node) or expressed(node)
    called, index = node.args
    found = operators.term(called, index) if isinstance(called, Node) and isinstance(index, int) else None
    return found or expressed(node)

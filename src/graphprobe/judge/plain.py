"""Outputs that are no tensors: numbers, strings and None have no rounding, so they are equal or they are not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.execute import run_program
from graphprobe.program import Program
from graphprobe.records import Finding, OutputRow

RULE = "9 plain output"
_CLOSE = 1e-12  # relative: a float that is computed in another order


@dataclass(frozen=True)
class Plain:
    """One output that is no tensor on either side."""

    path: str
    before: Any
    after: Any

    @property
    def same(self) -> bool:
        """Whether both are equal numbers (NaN equals NaN, and 1 equals 1.0), or equal values of one type."""
        x, y = self.before, self.after
        if _is_number(x) and _is_number(y):
            return x == y or (x != x and y != y) or math.isclose(x, y, rel_tol=_CLOSE, abs_tol=0.0)
        return type(x) is type(y) and bool(x == y)

    def row(self) -> OutputRow:
        """Return the row of the table of outputs."""
        error = 0.0 if self.same else math.inf
        return OutputRow(self.path, (), type(self.after).__name__, error, error, self.same)

    def finding(self) -> Finding:
        """Return the finding for an output that differs."""
        said = f"the output {self.path!r} is {self.after!r:.80}, and {self.before!r:.80} in before"
        return Finding(
            "semantic", ("output",), ("output",), "", "output", None, None, None, None,
            rule=RULE, hint=said, culprit="output", outputs=("output", "output"),
            explanation=f"{said[0].upper()}{said[1:]}. It is no tensor, so no rounding explains that. "
            "Next: look where the graph gets this value from.",
        )  # fmt: skip


def plain_outputs(before: Program, after: Program, inputs: Mapping[str, Any]) -> list[Plain]:
    """Compare what both sides return that is no tensor, by path, else by position. What cannot be run is left out."""
    left, right = _values(before, inputs), _values(after, inputs)
    if set(left) & set(right):
        return [Plain(path, left[path], right[path]) for path in left if path in right]
    both = zip(left.items(), right.values(), strict=False)
    return [Plain(path, x, y) for (path, x), y in both]


def _values(program: Program, inputs: Mapping[str, Any]) -> dict[str, Any]:
    computed = {path: node for path, node in program.outputs.items() if _is_plain(node)}
    try:
        known = run_program(program, inputs, computed.values()) if computed else {}
    except Exception:  # the lanes say which node raises
        known = {}
    found = {path: known[node] for path, node in computed.items() if node in known}
    plain = {path: value for path, value in found.items() if not isinstance(value, torch.Tensor)}
    return {**program.constants, **plain}


def _is_plain(node: Node) -> bool:
    return "val" in node.meta and nodes.tensor_val(node) is None and not isinstance(nodes.val(node), (list, tuple))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))

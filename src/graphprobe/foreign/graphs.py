"""A text dump as an FX graph that can be aligned, not run: operators, shapes and dtypes, no content of weights.

Keyword arguments are not written in a dump and stay unknown. A symbolic size stands for a number of its own, the same
in every dump that names its symbols in the same order.
"""

from __future__ import annotations

import ast
import operator
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from graphprobe.errors import DumpError
from graphprobe.foreign import autodeploy
from graphprobe.foreign.autodeploy import MISSING, ROOT, Line, Section
from graphprobe.fxfile.operators import Opaque, resolve

_SIZES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049)  # what symbols stand for: sizes that nothing else has
_ARITHMETIC: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def load(path: str | os.PathLike[str]) -> GraphModule:
    """Read the root graph of a text dump. Raises DumpError."""
    dump = autodeploy.read(path)
    section = next((s for s in dump.sections if s.name == ROOT), next(iter(dump.sections), None))
    if section is None:
        raise DumpError(f"the dump {os.fspath(path)} holds no graph")
    return graph_module(section)


def graph_module(section: Section) -> GraphModule:
    """Build a section as a graph; what it does not say is left out. Raises DumpError where a name has no node."""
    return _Builder(section).build()


class _Builder:
    def __init__(self, section: Section) -> None:
        self.section, self.graph, self.root = section, Graph(), torch.nn.Module()
        self.made: dict[str, Node] = {}
        self.sizes: dict[str, int] = {}

    def build(self) -> GraphModule:
        for name, typed in autodeploy.weights(self.section).items():
            shape, _, dtype = typed.rpartition(" : ")
            self._weight(name, shape, dtype)
        for line in self.section.lines:
            if line.target == "output":
                returned = [self._argument(arg) for arg in line.args]
                self.graph.output(returned[0] if len(returned) == 1 else tuple(returned))
            else:
                self._add(line)
        if not any(n.op == "output" for n in self.graph.nodes):
            raise DumpError(f"the graph {self.section.name} of the dump has no output")
        return GraphModule(self.root, self.graph)

    def _weight(self, name: str, shape: str, dtype: str) -> None:
        value = self._value(shape, dtype)
        self.root.register_buffer(name, value if isinstance(value, torch.Tensor) else torch.empty(0, device="meta"))
        node = self.made[name] = self.graph.get_attr(name)
        if value is not None:
            node.meta["val"] = value

    def _add(self, line: Line) -> None:
        if line.target:
            node = self.graph.call_function(_target(line), tuple(self._argument(arg) for arg in line.args))
        else:
            node = self.graph.placeholder(line.name)
        node.name = line.name
        self.made[line.name] = node
        value = self._value(line.shape, line.dtype)
        if value is not None or line.dtype not in MISSING:
            node.meta["val"] = value

    def _value(self, shape: str, dtype: str) -> torch.Tensor | None:
        sizes, kind = autodeploy.dimensions(shape), getattr(torch, dtype.removeprefix("torch."), None)
        if sizes is None or not isinstance(kind, torch.dtype):
            return None
        known = [size if isinstance(size, int) else self._size(size) for size in sizes]
        return None if None in known else torch.empty(known, dtype=kind, device="meta")  # type: ignore[arg-type]

    def _size(self, text: str) -> int | None:
        try:
            return self._number(ast.parse(text, mode="eval").body)
        except (SyntaxError, KeyError, TypeError, ValueError, ZeroDivisionError):
            return None  # a function of sizes that is not known here: the shape stays unknown

    def _number(self, tree: ast.expr) -> int:
        if isinstance(tree, ast.Constant) and type(tree.value) is int:
            return tree.value
        if isinstance(tree, ast.Name):
            count = len(self.sizes)
            return self.sizes.setdefault(tree.id, _SIZES[count % len(_SIZES)] + 1000 * (count // len(_SIZES)))
        if isinstance(tree, ast.BinOp):
            return _ARITHMETIC[type(tree.op)](self._number(tree.left), self._number(tree.right))
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in ("Max", "Min"):
            return {"Max": max, "Min": min}[tree.func.id](self._number(arg) for arg in tree.args)
        raise ValueError

    def _argument(self, text: str) -> Any:
        """Read one argument: nodes by name, numbers, lists; what is none of these stays text."""
        if text.startswith("%"):
            name = text[1:].partition(" : ")[0]
            if name not in self.made:
                raise DumpError(f"the dump uses %{name} before it says what that is")
            return self.made[name]
        try:
            return self._literal(ast.parse(text, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError):
            return text

    def _literal(self, tree: ast.expr) -> Any:
        if isinstance(tree, (ast.List, ast.Tuple)):
            return [self._literal(item) for item in tree.elts]
        if isinstance(tree, ast.Name) and tree.id in self.made:
            return self.made[tree.id]
        if isinstance(tree, ast.Name) and tree.id in ("inf", "nan"):
            return float(tree.id)
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            return -self._literal(tree.operand)
        if isinstance(tree, ast.Attribute) and isinstance(tree.value, ast.Name) and tree.value.id == "torch":
            found = getattr(torch, tree.attr, None)
            return found if isinstance(found, torch.dtype) else f"torch.{tree.attr}"
        return ast.literal_eval(tree)


def _target(line: Line) -> Callable[..., Any]:
    name = autodeploy.operator(line)
    if "." in name:
        return resolve(f"torch.ops.{name}", {})
    found = getattr(operator, name, None)
    return found if callable(found) else Opaque(name, "a dump names functions and does not contain them")

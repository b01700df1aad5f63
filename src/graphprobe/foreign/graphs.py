"""A text as an FX graph that can be aligned, not run: operators, shapes and dtypes, no content of weights.

The text may be a dump as AutoDeploy writes it, code as torch.fx prints it, or a list of nodes. In a dump keyword
arguments are not written and stay unknown.
"""

from __future__ import annotations

import ast
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from graphprobe.errors import DumpError
from graphprobe.foreign import autodeploy, listed, printed
from graphprobe.foreign.autodeploy import MISSING, ROOT, Line, Section
from graphprobe.foreign.building import Sizes
from graphprobe.fxfile.operators import Opaque, resolve

SUFFIXES = (".txt", ".log", ".py")
_HEAD = "# Transform: "
_KNOWN = (
    "a dump of AutoDeploy ('# Transform: ...'), code of torch.fx (print_readable, TORCH_LOGS=post_grad_graphs, "
    "fx_graph_readable.py) or a list of nodes (print(gm.graph), print_tabular)"
)


def load(path: str | os.PathLike[str]) -> GraphModule:
    """Read the graph of a text; of a dump the root graph. Raises DumpError."""
    where = os.fspath(path)
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DumpError(f"cannot read the dump {where}: {error}") from error
    if _HEAD not in content:
        if printed.is_printed(content):
            return printed.parse(content, where)
        if listed.is_listed(content):
            return listed.parse(content, where)
        if not content.startswith("# "):
            raise DumpError(f"{where} holds no graph. What can be read is {_KNOWN}")
    dump = autodeploy.parse(content, where)
    section = next((s for s in dump.sections if s.name == ROOT), next(iter(dump.sections), None))
    if section is None:
        raise DumpError(f"the dump {where} holds no graph")
    return graph_module(section)


def graph_module(section: Section) -> GraphModule:
    """Build a section as a graph; what it does not say is left out. Raises DumpError where a name has no node."""
    return _Builder(section).build()


class _Builder:
    def __init__(self, section: Section) -> None:
        self.section, self.graph, self.root = section, Graph(), torch.nn.Module()
        self.made: dict[str, Node] = {}
        self.sizes = Sizes()

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
        known = [size if isinstance(size, int) else self.sizes.of(size) for size in sizes]
        return None if None in known else torch.empty(known, dtype=kind, device="meta")  # type: ignore[arg-type]

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

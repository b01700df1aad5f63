"""A graph put together from text: operators by name, arguments as literals, nothing evaluated, no content of weights.

A symbolic size stands for a number of its own, the same in every text that names its symbols in the same order.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from graphprobe.errors import DumpError
from graphprobe.fxfile.operators import Opaque, resolve

_SIZES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049)  # what symbols stand for: sizes that nothing else has
_ARITHMETIC: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip
_DEVICES = ("cpu", "cuda", "meta", "mps", "xpu")  # a list of nodes writes them without quotes
_FUNCTIONS = {"Max": max, "Min": min, "max": max, "min": min}


class Sizes:
    """What the symbols in sizes stand for."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def of(self, text: str) -> int | None:
        """Return the number that a size stands for; None for a function of sizes that is not known here."""
        try:
            return self._number(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, KeyError, TypeError, ValueError, ZeroDivisionError):
            return None

    def _number(self, tree: ast.expr) -> int:
        if isinstance(tree, ast.Constant) and type(tree.value) is int:
            return tree.value
        if isinstance(tree, ast.Name):
            count = len(self.known)
            return self.known.setdefault(tree.id, _SIZES[count % len(_SIZES)] + 1000 * (count // len(_SIZES)))
        if isinstance(tree, ast.BinOp):
            return _ARITHMETIC[type(tree.op)](self._number(tree.left), self._number(tree.right))
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
            return _FUNCTIONS[tree.func.id](self._number(arg) for arg in tree.args)
        raise ValueError


class Builder:
    """Takes the nodes of a text one by one; `where` names a place in errors."""

    def __init__(self) -> None:
        self.graph, self.root = Graph(), torch.nn.Module()
        self.made: dict[str, Node] = {}
        self.sizes = Sizes()

    def placeholder(self, name: str, value: Any = None) -> Node:
        """Add an input."""
        return self._named(name, self.graph.placeholder(name), value)

    def weight(self, name: str, target: str, value: Any = None) -> Node:
        """Add a weight that is read."""
        flat = target.replace(".", "_")
        if not hasattr(self.root, flat):
            held = value if isinstance(value, torch.Tensor) else torch.empty(0, device="meta")
            self.root.register_buffer(flat, held)
        return self._named(name, self.graph.get_attr(flat), value)

    def call(self, name: str, target: str, args: list[Any], kwargs: dict[str, Any], value: Any = None) -> Node:
        """Add a call of an operator or function."""
        return self._named(name, self.graph.call_function(_callable(target), tuple(args), kwargs), value)

    def method(self, name: str, method: str, args: list[Any], kwargs: dict[str, Any], value: Any = None) -> Node:
        """Add a call of a tensor's method."""
        return self._named(name, self.graph.call_method(method, tuple(args), kwargs), value)

    def built(self) -> GraphModule:
        """Return the graph. What an operator with several results returns is put together from what takes them."""
        for node in self.graph.nodes:
            taken = {u.args[1]: u.meta.get("val") for u in node.users if _takes_result(u)}
            if "val" not in node.meta and taken:
                node.meta["val"] = tuple(taken.get(i) for i in range(1 + max(taken)))
        return GraphModule(self.root, self.graph)

    def tensor(self, dtype: torch.dtype | None, sizes: list[str]) -> torch.Tensor | None:
        """Return a tensor without data, None where a size or the dtype is not known."""
        known = [self.sizes.of(size) for size in sizes]
        return None if dtype is None or None in known else torch.empty(known, dtype=dtype, device="meta")  # type: ignore[arg-type]

    def argument(self, tree: ast.expr, where: str) -> Any:
        """Read one argument: nodes by name, numbers, lists, slices, dtypes; what is none of these stays text."""
        if isinstance(tree, (ast.List, ast.Tuple)):
            items = [self.argument(item, where) for item in tree.elts]
            return tuple(items) if isinstance(tree, ast.Tuple) else items
        if isinstance(tree, ast.Dict):
            pairs = zip(tree.keys, tree.values, strict=True)
            keys = {k: k.id if isinstance(k, ast.Name) else getattr(k, "value", None) for k in tree.keys}  # {dim: 1}
            return {keys[k]: self.argument(v, where) for k, v in pairs}
        if isinstance(tree, ast.Name):
            return self._name(tree.id, where)
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            found = self.argument(tree.operand, where)
            return -found if isinstance(found, (int, float)) else ast.unparse(tree)
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "slice":
            return slice(*(self.argument(item, where) for item in tree.args))
        if isinstance(tree, ast.Attribute) and isinstance(tree.value, ast.Name) and tree.value.id == "torch":
            dtype = getattr(torch, tree.attr, None)
            return dtype if isinstance(dtype, torch.dtype) else f"torch.{tree.attr}"
        return tree.value if isinstance(tree, ast.Constant) else ast.unparse(tree)

    def _name(self, name: str, where: str) -> Any:
        if name in ("inf", "nan"):
            return float(name)
        if name in _DEVICES and name not in self.made:
            return name
        if name not in self.made:
            raise DumpError(
                f"{where}: {name} is used before the text says what it is. Give the graph whole, from its first line "
                "to what it returns"
            )
        return self.made[name]

    def _named(self, name: str, node: Node, value: Any) -> Node:
        node.name = name
        self.made[name] = node
        if value is not None:
            node.meta["val"] = value
        return node


def _takes_result(node: Node) -> bool:
    return node.target is operator.getitem and type(node.args[1]) is int and node.args[1] >= 0


def _callable(name: str) -> Callable[..., Any]:
    name = name.removeprefix("_")  # _operator.getitem
    found = resolve(name, {})
    if isinstance(found, Opaque) and name.split(".")[0] in ("aten", "prims", "higher_order"):
        found = resolve(f"torch.ops.{name}", {})
    if isinstance(found, Opaque):
        return Opaque(name, "a text names functions and does not contain them")
    return found

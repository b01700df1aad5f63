"""Graphs as Python code, as torch.fx prints them: read as text, never executed.

So print `GraphModule.print_readable`, `str(ExportedProgram)`, ``TORCH_LOGS=aot_graphs,post_grad_graphs,graph_code`` and
the compiler's debug folder (``fx_graph_readable.py``). What is between quotes behind a name is its dtype and shape.
"""

from __future__ import annotations

import ast
import re
import textwrap
from typing import Any

import torch
from torch.fx import GraphModule

from graphprobe.errors import DumpError
from graphprobe.foreign.building import Builder

_LOG = re.compile(r"^(\[rank\d+\]:\s?)?[VDIWEC]\d{4} [\d:.]+ \d+ \S+:\d+\](?: \[[^\]]*\])* ?")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FORWARD = re.compile(r"^\s*def forward\(self\b")
_TITLE = re.compile(r"^\s*===== (.*) =====\s*$")
#: How `str(ExportedProgram)` says that an input is a weight.
_WEIGHT = re.compile(r"^\s*(\w+): (?:PARAMETER|BUFFER|CONSTANT_TENSOR) target='([^']+)'", re.MULTILINE)
_TYPE = re.compile(r"^\s*(?:Parameter )?([a-z]\w*)\[(.*?)\](?:\[.*?\])?[\w:]*\s*$")
#: How torch.fx abbreviates dtypes.
DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
    "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "u16": torch.uint16,
    "u32": torch.uint32, "u64": torch.uint64, "b8": torch.bool, "c32": torch.complex32, "c64": torch.complex64,
    "c128": torch.complex128, "f8e4m3fn": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2,
    "f8e4m3fnuz": torch.float8_e4m3fnuz, "f8e5m2fnuz": torch.float8_e5m2fnuz,
}  # fmt: skip
_OPERATORS: dict[type, str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "truediv", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.MatMult: "matmul", ast.Pow: "pow", ast.BitAnd: "and_", ast.BitOr: "or_", ast.BitXor: "xor",
    ast.Eq: "eq", ast.NotEq: "ne", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge",
    ast.USub: "neg", ast.Invert: "invert", ast.Not: "not_",
}  # fmt: skip


def is_printed(content: str) -> bool:
    """Whether a text holds a graph as Python code."""
    return any(_FORWARD.match(_plain(line)) for line in content.splitlines())


def parse(content: str, where: str) -> GraphModule:
    """Read the only graph of a text. Raises DumpError, which says at which line of `where` and how to mend it."""
    lines = [_plain(line) for line in content.splitlines()]
    starts = [i for i, line in enumerate(lines) if _FORWARD.match(line)]
    outermost = min(_depth(lines[i]) for i in starts)  # deeper ones are the bodies of control flow
    starts = [i for i in starts if _depth(lines[i]) == outermost]
    if len(starts) > 1:
        listed = ", ".join(f"{_title(lines, i)} at line {i + 1}" for i in starts)
        raise DumpError(f"{where} holds {len(starts)} graphs: {listed}. Save the lines of one of them to a file")
    start = starts[0]
    body = _body(lines, start)
    try:
        (function,) = ast.parse(textwrap.dedent("\n".join(body))).body
    except (SyntaxError, ValueError) as error:
        at = start + (getattr(error, "lineno", None) or 1)
        shown = lines[at - 1].strip()[:60] if at <= len(lines) else "the end"
        raise DumpError(
            f"{where}, line {at}: {shown!r} is not Python as torch.fx prints it ({error.args[0]}). Give the text as "
            "it was printed, from 'def forward' to 'return', with no line broken"
        ) from error
    assert isinstance(function, ast.FunctionDef)
    return _Reader(where, start, dict(_WEIGHT.findall("\n".join(lines)))).read(function)


def _plain(line: str) -> str:
    return _LOG.sub("", _COLOUR.sub("", line)).replace("\t", "    ").rstrip()


def _title(lines: list[str], start: int) -> str:
    """Name a graph by what the log says above it."""
    for line in reversed(lines[max(0, start - 4) : start]):
        if (found := _TITLE.match(line)) is not None:
            return repr(found.group(1))
    return "one"


def _body(lines: list[str], start: int) -> list[str]:
    """Return the lines of a function: what is indented deeper than its first line."""
    out = [lines[start]]
    for line in lines[start + 1 :]:
        if line and _depth(line) <= _depth(lines[start]):
            break
        out.append(line)
    return out


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


class _Reader:
    def __init__(self, where: str, start: int, weights: dict[str, str]) -> None:
        self.where, self.start, self.weights, self.build = where, start, weights, Builder()
        self.typed: dict[str, Any] = {}

    def read(self, function: ast.FunctionDef) -> GraphModule:
        """Read the body of a forward."""
        for one in function.body:  # an input may have its type in a line of its own
            if isinstance(one, ast.AnnAssign) and one.value is None and isinstance(one.target, ast.Name):
                self.typed[one.target.id] = self._value(one.annotation)
        for argument in function.args.args[1:]:
            value = self._value(argument.annotation) if argument.annotation is not None else None
            value = value if value is not None else self.typed.get(argument.arg)
            if argument.arg in self.weights:
                self.build.weight(argument.arg, self.weights[argument.arg], value)
            else:
                self.build.placeholder(argument.arg, value)
        returned = False
        for one in function.body:
            if isinstance(one, ast.Return):
                self._output(one.value, self._at(one))
                returned = True
            else:
                self._statement(one)
        if not returned:
            raise DumpError(
                f"{self.where}: the graph that begins at line {self.start + 1} returns nothing: its end is missing"
            )
        return self.build.built()

    def _statement(self, one: ast.stmt) -> None:
        if isinstance(one, ast.Assign) and len(one.targets) == 1 and isinstance(one.targets[0], ast.Name):
            name, value, annotation = one.targets[0].id, one.value, None
        elif isinstance(one, ast.AnnAssign) and one.value is not None and isinstance(one.target, ast.Name):
            name, value, annotation = one.target.id, one.value, one.annotation
        else:
            return  # names that are given up, inputs that are unpacked, assertions
        if isinstance(value, ast.Constant) and value.value is None:
            return
        made = self._value(annotation) if annotation is not None else None
        if isinstance(value, ast.Name):  # another name for the same
            self.build.made[name] = self.build.argument(value, self._at(one))
        else:
            self._made(name, value, made, self._at(one))

    def _made(self, name: str, tree: ast.expr, value: Any, where: str) -> None:
        build = self.build
        if isinstance(tree, ast.Attribute) and (path := _path(tree)).startswith("self."):
            build.weight(name, path.removeprefix("self."), value)
        elif isinstance(tree, ast.Call):
            self._called(name, tree, value, where)
        elif isinstance(tree, ast.Subscript):
            build.call(name, "operator.getitem", self._all([tree.value, tree.slice], where), {}, value)
        elif isinstance(tree, ast.BinOp):
            build.call(name, self._operator(tree.op), self._all([tree.left, tree.right], where), {}, value)
        elif isinstance(tree, ast.UnaryOp):
            build.call(name, self._operator(tree.op), self._all([tree.operand], where), {}, value)
        elif isinstance(tree, ast.Compare) and len(tree.ops) == 1:
            build.call(name, self._operator(tree.ops[0]), self._all([tree.left, *tree.comparators], where), {}, value)
        elif isinstance(tree, ast.Attribute):
            build.call(name, "builtins.getattr", [build.argument(tree.value, where), tree.attr], {}, value)
        else:
            raise DumpError(f"{where}: {ast.unparse(tree)[:60]!r} is no call, no operator and no weight: no node of FX")

    def _called(self, name: str, tree: ast.Call, value: Any, where: str) -> None:
        path = _path(tree.func)
        if path.startswith("self._guards"):
            return  # export's checks of its inputs
        args = self._all(tree.args, where)
        kwargs = {k.arg: self.build.argument(k.value, where) for k in tree.keywords if k.arg is not None}
        owner = path.split(".")[0]
        if path.startswith("self."):
            self.build.call(name, f"module.{path.removeprefix('self.')}", args, kwargs, value)
        elif isinstance(tree.func, ast.Attribute) and (not path or owner in self.build.made):
            receiver = self.build.argument(tree.func.value, where)
            self.build.method(name, tree.func.attr, [receiver, *args], kwargs, value)
        else:
            self.build.call(name, path or ast.unparse(tree.func), args, kwargs, value)

    def _output(self, tree: ast.expr | None, where: str) -> None:
        while isinstance(tree, ast.Call):  # pytree.tree_unflatten((add, mean), self._out_spec)
            tree = tree.args[0]
        self.build.graph.output(self.build.argument(tree, where) if tree is not None else None)

    def _all(self, trees: list[ast.expr], where: str) -> list[Any]:
        return [self.build.argument(tree, where) for tree in trees]

    def _operator(self, tree: ast.AST) -> str:
        return f"operator.{_OPERATORS[type(tree)]}"

    def _value(self, annotation: ast.expr) -> Any:
        """Read ``"f32[2, s0][16, 1]cpu"``; strides and device do not count."""
        text = annotation.value if isinstance(annotation, ast.Constant) else None
        found = _TYPE.match(text) if isinstance(text, str) else None
        if found is None or found.group(1) not in DTYPES:
            return None
        sizes = [size for size in _split(found.group(2)) if size]
        return self.build.tensor(DTYPES[found.group(1)], sizes)

    def _at(self, tree: ast.AST) -> str:
        return f"{self.where}, line {self.start + getattr(tree, 'lineno', 1)}"


def _path(tree: ast.expr) -> str:
    """Return 'torch.ops.aten.add.Tensor' for what is written so, '' for what is no chain of names."""
    parts: list[str] = []
    while isinstance(tree, ast.Attribute):
        parts.append(tree.attr)
        tree = tree.value
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "getattr":
        parts.append(str(getattr(tree.args[1], "value", "")))  # getattr(self.layers, "0").weight
        inner = _path(tree.args[0])
        return ".".join([inner, *reversed(parts)]) if inner else ""
    return ".".join([tree.id, *reversed(parts)]) if isinstance(tree, ast.Name) else ""


def _split(sizes: str) -> list[str]:
    """Split at the commas that lie in no bracket."""
    out, depth = [""], 0
    for character in sizes:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            out.append("")
        else:
            out[-1] += character
    return [size.strip() for size in out]

"""Graphs as lists of nodes: ``print(gm.graph)`` and ``gm.graph.print_tabular()``. They tell no shapes and no dtypes."""

from __future__ import annotations

import ast
import re
from typing import Any

from torch.fx import GraphModule

from graphprobe.errors import DumpError
from graphprobe.foreign.building import Builder

_OPS = ("placeholder", "get_attr", "call_function", "call_module", "call_method", "output")
_NODE = re.compile(r"^\s*%(\w+)\s*:.*?\[(?:num_|#)users=\d+\] = (\w+)\[target=(.*?)\](?:\((args = .*)\))?\s*$")
_RETURN = re.compile(r"^\s*return (.*)$")
_TABLE = re.compile(r"^opcode\s+name\s+target\s+args\s+kwargs\s*$")
_FUNCTION = re.compile(r"<(?:built-in )?(?:function|method) ([\w.<>]+)[^>]*>")
_NAME = re.compile(r"%(\w+)")
_DEVICE = re.compile(r"\b((?:cuda|xpu|mps|cpu):\d+)\b")


def is_listed(content: str) -> bool:
    """Whether a text is a list of nodes."""
    return any(_NODE.match(line) or _TABLE.match(line) for line in content.splitlines())


def parse(content: str, where: str) -> GraphModule:
    """Read a list of nodes. Raises DumpError, which says at which line of `where`."""
    build, returned = Builder(), False
    for name, op, target, args, kwargs, at in _rows(content, where):
        if op == "output":
            given = _read(build, args, at)
            build.graph.output(given[0] if given else None)
            returned = True
        elif op == "placeholder":
            build.placeholder(name)
        elif op == "get_attr":
            build.weight(name, target)
        elif not target.startswith("_guards"):
            called = list(_read(build, args, at))
            named = {str(k): v for k, v in _read(build, kwargs, at).items()}
            if op == "call_method":
                build.method(name, target, called, named)
            else:
                build.call(name, f"module.{target}" if op == "call_module" else _function(target), called, named)
    if not returned:
        raise DumpError(f"{where} does not say what the graph returns: its last line is missing")
    return build.built()


def _rows(content: str, where: str) -> list[tuple[str, str, str, str, str, str]]:
    """Return (name, op, target, args, kwargs, place) of every node, in either form."""
    lines = content.splitlines()
    head = next((i for i, line in enumerate(lines) if _TABLE.match(line)), None)
    if head is not None:
        return [row for i in range(head + 1, len(lines)) if (row := _of_table(lines, head, i, where)) is not None]
    out = []
    for i, line in enumerate(lines):
        at = f"{where}, line {i + 1}"
        if (found := _NODE.match(line)) is not None:
            name, op, target, given = found.groups()
            args, _, kwargs = (given or "args = (), kwargs = {}").removeprefix("args = ").rpartition(", kwargs = ")
            out.append((name, op, target, args, kwargs, at))
        elif (end := _RETURN.match(line)) is not None:
            out.append(("output", "output", "output", f"({end.group(1)},)", "{}", at))
        elif line.strip() and not line.strip().startswith(("graph(", "#")):
            raise DumpError(
                f"{at}: expected '%name : [num_users=1] = call_function[target=...](...)', not {line[:60]!r}"
            )
    return out


def _of_table(lines: list[str], head: int, i: int, where: str) -> tuple[str, str, str, str, str, str] | None:
    """Cut a row of a table at the columns of its head."""
    line = lines[i]
    if not line.strip() or set(line.strip()) <= {"-", " "}:
        return None
    starts = [lines[head].index(word) for word in ("opcode", "name", "target", "args", "kwargs")]
    op, name, target, args, kwargs = (line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True))
    if op not in _OPS:
        raise DumpError(
            f"{where}, line {i + 1}: {op!r} is no kind of node. Give the table as print_tabular wrote it: columns are "
            "read where the words of its first line begin"
        )
    return name, op, target, args, kwargs, f"{where}, line {i + 1}"


def _function(target: str) -> str:
    found = _FUNCTION.match(target)
    return f"operator.{found.group(1)}" if found is not None and "built-in function" in target else target


def _read(build: Builder, text: str, where: str) -> Any:
    try:
        tree = ast.parse(_DEVICE.sub(r"'\1'", _NAME.sub(r"\1", text)), mode="eval").body
    except SyntaxError as error:
        raise DumpError(f"{where}: the arguments {text[:60]!r} cannot be read: {error.args[0]}") from error
    return build.argument(tree, where)

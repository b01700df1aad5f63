"""The text form in which AutoDeploy (TensorRT-LLM) dumps graphs: read it, write it, and see it as a GraphView.

One file holds the graph after one transform: three header lines, then a section for each GraphModule with one line a
node. Attributes have no lines of their own and keyword arguments are not written at all. `parse` and `text` are inverse
to each other, byte for byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graphprobe.errors import DumpError
from graphprobe.records import GraphView, NodeView

RULE = "=" * 80
ROOT = "(root)"
MISSING = ("N/A", "unknown")  # what stands in place of a dtype where meta["val"] is missing
#: Operators without a result: ``NoneType`` is all they can be.
_NOTHING = re.compile(r"\b(_assert|sym_constrain|_functional_assert|wait_aux_stream|begin_aux_stream|end_aux_stream)")
#: Operators that make no new values.
_VIEWS = re.compile(
    r"aten\.(view|reshape|_unsafe_view|transpose|permute|t|unsqueeze|squeeze|expand|slice|select|narrow|flatten|unflatten|"
    r"alias|detach|split|split_with_sizes|chunk|unbind|movedim|contiguous)\b|auto_deploy\.view\b"
)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_WORD = re.compile(r"[A-Za-z_]\w*")
_NO_NODE = {"None", "True", "False", "inf", "nan", "slice", "Ellipsis"}
_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Line:
    """One node as it is written: `args` are the texts of its positional arguments."""

    name: str  # '' for the output
    target: str = ""  # '' for a placeholder, 'output' for the output
    args: tuple[str, ...] = ()
    shape: str = ""
    dtype: str = ""

    @property
    def text(self) -> str:
        """The line."""
        if self.target == "output":
            return f"output {', '.join(self.args)}"
        made = f"%{self.name} = {self.target}({', '.join(self.args)})" if self.target else f"%{self.name}"
        return f"{made} : {self.shape} : {self.dtype}"

    @property
    def lacks_val(self) -> bool:
        """Whether the node has no metadata, or None where its operator has a result."""
        if self.target == "output" or self.returns_nothing:
            return False
        return self.dtype in MISSING or (self.dtype == "NoneType" and bool(self.target))

    @property
    def returns_nothing(self) -> bool:
        """Whether the operator has no result, so that it can have no metadata either."""
        return bool(_NOTHING.search(self.target))


@dataclass(frozen=True)
class Section:
    """One GraphModule of a dump."""

    name: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Dump:
    """One file: the graphs of a model after one transform."""

    transform: str
    stage: str
    sections: tuple[Section, ...]


def text(dump: Dump) -> str:
    """Return the content of the file."""
    parts = [
        f"# Transform: {dump.transform}\n# Stage: {dump.stage}\n# GraphModules found: {len(dump.sections)}\n\n",
    ]
    for section in dump.sections:
        body = "".join(f"{line.text}\n" for line in section.lines)
        parts.append(f"\n{RULE}\n# GraphModule: {section.name}\n{RULE}\n\n{body}")
    return "".join(parts)


def read(path: str | os.PathLike[str]) -> Dump:
    """Read a dump file. Raises DumpError."""
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DumpError(f"cannot read the dump {os.fspath(path)}: {error}") from error
    return parse(content, os.fspath(path))


def parse(content: str, where: str = "dump") -> Dump:
    """Read the content of a dump file; `where` names it in errors. Raises DumpError."""
    header: dict[str, str] = {}
    sections: list[tuple[str, list[Line]]] = []
    for number, line in enumerate(content.split("\n"), 1):
        if line.startswith("# GraphModule: "):
            sections.append((line.removeprefix("# GraphModule: "), []))
        elif line.startswith("# "):
            key, _, value = line[2:].partition(": ")
            header[key] = value
        elif line and line != RULE:
            if not sections:
                raise DumpError(f"{where}, line {number}: expected '# Transform: NAME', not {line[:60]!r}")
            sections[-1][1].append(_line(line, f"{where}, line {number}"))
    if not {"Transform", "Stage"} <= header.keys():
        raise DumpError(f"{where} is no graph dump: its first lines must be '# Transform: NAME' and '# Stage: NAME'")
    return Dump(header["Transform"], header["Stage"], tuple(Section(name, tuple(lines)) for name, lines in sections))


def _line(line: str, where: str) -> Line:
    if line.startswith("output"):
        return Line("", "output", tuple(_split(line.removeprefix("output").strip())))
    name, call, rest = line.partition(" = ")
    if line.startswith("%") and not call:
        name, shape, dtype = _typed(line, where)
        return Line(name[1:], "", (), shape, dtype)
    opened = _end_of_target(rest)
    if not line.startswith("%") or opened < 0:
        raise DumpError(f"{where}: expected '%name = target(...) : shape : dtype', not {line[:60]!r}")
    closed = _end_of_arguments(rest, opened)
    if closed < 0:
        raise DumpError(f"{where}: the arguments of {name} do not end in ') : shape : dtype'")
    shape, _, dtype = rest[closed + len(") : ") :].rpartition(" : ")
    return Line(name[1:], rest[:opened], tuple(_split(rest[opened + 1 : closed])), shape, dtype)


def _typed(item: str, where: str) -> tuple[str, str, str]:
    parts = item.split(" : ")
    if len(parts) != 3:
        raise DumpError(f"{where}: expected '%name : shape : dtype', not {item[:60]!r}")
    return parts[0], parts[1], parts[2]


def _end_of_target(rest: str) -> int:
    """Return where the arguments open; the repr of a Python function, ``<function f at 0x7f>``, may hold brackets."""
    if not rest.startswith("<"):
        return rest.find("(")
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "<") - (character == ">")
        if depth == 0:
            return i + 1 if rest[i + 1 : i + 2] == "(" else -1
    return -1


def _end_of_arguments(rest: str, opened: int) -> int:
    depth = 0
    for i in range(opened, len(rest)):
        depth += (rest[i] in _OPEN) - (rest[i] in _CLOSE)
        if depth == 0:
            return i if rest.startswith(") : ", i) else rest.rfind(") : ")
    return rest.rfind(") : ")  # an unquoted text with a bracket in it


def _split(items: str) -> Iterator[str]:
    """Split at the commas that lie in no bracket."""
    depth, start = 0, 0
    for i, character in enumerate(items):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth <= 0 and items.startswith(", ", i):
            yield items[start:i]
            start = i + 2
    if items:
        yield items[start:]


# --- as a graph ------------------------------------------------------------------------------------------------------


def view(section: Section, name: str = "") -> GraphView:
    """Return a section as a graph; weights, which have no line of their own, stand before their first user."""
    defined: set[str] = set()
    out: list[NodeView] = []
    for line in section.lines:
        inputs = list(_inputs(line))
        for source, shape, dtype in inputs:
            if source not in defined:
                defined.add(source)
                out.append(_weight(source, shape, dtype))
        out.append(_node(line, tuple(dict.fromkeys(source for source, _, _ in inputs))))
        defined.add(line.name)
    return GraphView(name or section.name, tuple(out))


def weights(section: Section) -> dict[str, str]:
    """Return {name: 'shape : dtype'} of what the section reads and does not define; '' where only the name is known."""
    defined = {line.name for line in section.lines}
    found: dict[str, str] = {}
    for line in section.lines:
        for source, shape, dtype in _inputs(line):
            if source not in defined:
                found[source] = found.get(source) or (f"{shape} : {dtype}" if dtype else "")
    return found


def operator(line: Line) -> str:
    """Return the target without memory addresses: ``<function f at 0x7f>`` becomes ``f``."""
    target = _ADDRESS.sub("", line.target)
    for kind in ("<function ", "<built-in function ", "<built-in method "):
        if target.startswith(kind) and target.endswith(">"):
            return target[len(kind) : -1].split(" ")[0]
    return target


def _node(line: Line, inputs: tuple[str, ...]) -> NodeView:
    op = "output" if line.target == "output" else "call_function" if line.target else "placeholder"
    return NodeView(
        name=line.name or "output",
        op=op,
        target=operator(line) or line.name,
        inputs=inputs,
        args=f"({', '.join(_bare(arg) for arg in line.args)})",
        shape=dimensions(line.shape),
        dtype=_dtype(line.dtype),
        has_val=not line.lacks_val,
        is_view=bool(_VIEWS.match(line.target)),
    )


def _weight(name: str, shape: str, dtype: str) -> NodeView:
    return NodeView(
        name=name,
        op="get_attr",
        target=name,
        shape=dimensions(shape),
        dtype=_dtype(dtype),
        has_val=dtype not in MISSING,
    )


def _inputs(line: Line) -> Iterator[tuple[str, str, str]]:
    """Yield (name, shape, dtype) of the nodes that a line reads; inside lists only the names are written."""
    for arg in line.args:
        if arg.startswith("%"):
            name, _, typed = arg[1:].partition(" : ")
            shape, _, dtype = typed.rpartition(" : ")
            yield name, shape, dtype
        elif arg.startswith(("[", "(", "{")):
            for found in _WORD.finditer(arg):
                around = arg[found.start() - 1], arg[found.end() : found.end() + 1]
                if found.group() not in _NO_NODE and around[0] in "[({ " and around[1] in ("", ",", "]", ")", "}"):
                    yield found.group(), "", ""


def _bare(arg: str) -> str:
    return arg.partition(" : ")[0] if arg.startswith("%") else arg


def dimensions(shape: str) -> tuple[int | str, ...] | None:
    """Return (s44, 4) for 's44x4', () for 'scalar', None for what has no shape."""
    if shape == "scalar":
        return ()
    if not shape or shape == "?" or shape.startswith("("):
        return None
    parts, depth, start = [], 0, 0
    for i, character in enumerate(shape):
        depth += (character == "(") - (character == ")")
        if character == "x" and depth == 0 and not shape.endswith("Ma", 0, i):  # the x of Max(1, u0)
            parts.append(shape[start:i])
            start = i + 1
    return tuple(int(p) if p.isdigit() else p for p in (*parts, shape[start:]))


def _dtype(dtype: str) -> str | None:
    return dtype.removeprefix("torch.") if dtype.startswith("torch.") else None

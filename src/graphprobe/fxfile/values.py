"""Arguments of nodes as JSON, and back.

Plain JSON stands for itself (None, bool, int, finite float, str, list); everything else is an object of one key, its
tag: ``{"n": 3}`` is the third node, ``{"tuple": [...]}`` a tuple, ``{"dtype": "bfloat16"}`` a dtype, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from graphprobe.fxfile import operators
from graphprobe.fxfile.archive import Damage
from graphprobe.fxfile.shapes import ShapeReader, ShapeWriter, dtype

_LAYOUTS = ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "jagged")
_MEMORY = ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")


class Unstorable(Exception):
    """A value that has no form in an ``.fx`` file; the message names it."""


class ValueWriter:
    """Turns arguments into JSON; `nodes` numbers the nodes that may be referred to."""

    def __init__(self, shapes: ShapeWriter, nodes: Mapping[Node, int]) -> None:
        self._shapes, self._nodes = shapes, nodes

    def encode(self, value: Any) -> Any:
        """Return the JSON form. Raises Unstorable."""
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, Node):
            return self._node(value)
        if isinstance(value, (list, tuple, dict, slice)):
            return self._container(value)
        return self._special(value)

    def _node(self, node: Node) -> dict[str, int]:
        if node not in self._nodes:
            raise Unstorable(f"the node {node.name!r} of another graph")
        return {"n": self._nodes[node]}

    def _container(self, value: Any) -> Any:
        if isinstance(value, slice):
            return {"slice": [self.encode(part) for part in (value.start, value.stop, value.step)]}
        if isinstance(value, dict):
            return {"dict": [[self.encode(k), self.encode(v)] for k, v in value.items()]}
        if isinstance(value, torch.Size):
            return {"size": [self.encode(part) for part in value]}
        if hasattr(value, "_fields"):
            raise Unstorable(f"a named tuple {type(value).__name__}")
        items = [self.encode(part) for part in value]
        return items if isinstance(value, list) else {"tuple": items}

    def _special(self, value: Any) -> dict[str, Any]:
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.layout):
            return {"layout": str(value).removeprefix("torch.")}
        if isinstance(value, torch.memory_format):
            return {"memory": str(value).removeprefix("torch.")}
        if isinstance(value, complex):
            return {"complex": [repr(value.real), repr(value.imag)]}
        if value is Ellipsis:
            return {"ellipsis": 0}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            try:
                return {"sym": self._shapes.sym(value)}
            except TypeError as error:
                raise Unstorable(str(error)) from error
        kinds = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator, operators.Opaque)
        name = operators.name_of(value) if isinstance(value, kinds) else None
        if name is None:
            raise Unstorable(f"a {type(value).__module__}.{type(value).__qualname__}")
        return {"op": name}


class ValueReader:
    """Turns JSON into arguments; `nodes` are the nodes built so far, so that no node can refer to a later one."""

    def __init__(
        self,
        shapes: ShapeReader,
        nodes: list[Node],
        device: Callable[[str], torch.device],
        extra: Mapping[str, Callable[..., Any]],
    ) -> None:
        self._shapes, self._nodes, self._device, self._extra = shapes, nodes, device, extra

    def decode(self, data: Any) -> Any:
        """Return the value. Raises Damage."""
        if data is None or isinstance(data, (bool, int, float, str)):
            return data
        if isinstance(data, list):
            return [self.decode(part) for part in data]
        if not isinstance(data, dict) or len(data) != 1:
            raise Damage(f"an argument has the unknown form {str(data)[:60]}")
        ((tag, content),) = data.items()
        read = _READERS.get(tag)
        if read is None:
            raise Damage(f"an argument has the unknown form {tag!r}")
        return read(self, content)

    def node(self, index: Any) -> Node:
        """Return the node of that number. Raises Damage where it is not built yet."""
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(self._nodes):
            raise Damage(f"an argument refers to node number {index!r}, which is not defined before it")
        return self._nodes[index]

    def each(self, content: list[Any]) -> list[Any]:
        """Decode every element of a list."""
        if not isinstance(content, list):
            raise Damage(f"a list was expected, not {str(content)[:60]}")
        return [self.decode(part) for part in content]

    def pairs(self, content: list[Any]) -> dict[Any, Any]:
        """Decode a list of pairs into a dict."""
        return {self.decode(key): self.decode(value) for key, value in content}

    def operator(self, name: str) -> Callable[..., Any]:
        """Return the operator of that name, an Opaque where it is not available."""
        if not isinstance(name, str) or not name.startswith("torch.ops."):
            raise Damage(f"an argument names {name!r}, which is no operator")
        return operators.resolve(name, self._extra)

    def device(self, text: str) -> torch.device:
        """Return the device."""
        return self._device(text)

    def sym(self, content: dict[str, Any]) -> Any:
        """Return the symbolic number."""
        return self._shapes.sym(content)


def _named(names: tuple[str, ...]) -> Callable[[ValueReader, Any], Any]:
    def read(_: ValueReader, content: Any) -> Any:
        if content not in names:
            raise Damage(f"an argument names the unknown {content!r}")
        return getattr(torch, content)

    return read


_READERS: dict[str, Callable[[ValueReader, Any], Any]] = {
    "n": lambda reader, c: reader.node(c),
    "tuple": lambda reader, c: tuple(reader.each(c)),
    "dict": lambda reader, c: reader.pairs(c),
    "slice": lambda reader, c: slice(*reader.each(c)),
    "size": lambda reader, c: torch.Size(reader.each(c)),
    "range": lambda reader, c: range(*reader.each(c)),
    "dtype": lambda _, c: dtype(c),
    "device": lambda reader, c: reader.device(c),
    "layout": _named(_LAYOUTS),
    "memory": _named(_MEMORY),
    "float": lambda _, c: float(c),
    "complex": lambda _, c: complex(float(c[0]), float(c[1])),
    "ellipsis": lambda _, c: Ellipsis,
    "sym": lambda reader, c: reader.sym(c),
    "op": lambda reader, c: reader.operator(c),
}

"""Provenance of a node as JSON, and back: ids, module stack, source, origin, ``val`` and other tools' plain entries.

Stack traces, module stacks, origins and ids' lineages repeat from node to node and are stored once, in tables.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

from torch.fx import Node
from torch.fx.traceback import NodeSource

from graphprobe import provenance
from graphprobe.fxfile.archive import Damage
from graphprobe.fxfile.shapes import ShapeReader, ShapeWriter
from graphprobe.fxfile.values import Unstorable, ValueReader, ValueWriter

_OWN_FORM = {"val", "custom", "nn_module_stack", "stack_trace", "torch_fn", "from_node"}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_MAX_FRAMES = 256  # modules inside one another
_MAX_ORIGINS = 10_000  # ancestors of one node; a tampered table could name more than there are atoms


class Table:
    """A list of JSON values without repetition."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._seen: dict[str, int] = {}

    def add(self, row: Any) -> int:
        """Return the row's number."""
        key = repr(row)
        if key not in self._seen:
            self._seen[key] = len(self.rows)
            self.rows.append(row)
        return self._seen[key]


class MetaWriter:
    """Collects the tables of one file."""

    def __init__(self, shapes: ShapeWriter) -> None:
        self._shapes = shapes
        self._plain = ValueWriter(shapes, {})
        self._tables = {name: Table() for name in ("lineages", "frames", "traces", "passes", "origins")}

    def tables(self) -> dict[str, list[Any]]:
        """Return the tables as they are to be stored."""
        return {name: table.rows for name, table in self._tables.items()}

    def encode(self, node: Node) -> dict[str, Any]:
        """Return what is stored of the node's metadata; entries without a JSON form are left out."""
        meta = node.meta
        out: dict[str, Any] = {}
        if "val" in meta:
            with contextlib.suppress(TypeError):
                out["val"] = self._shapes.val(meta["val"])
        found = provenance.node_id(node)
        if found is not None:
            out["id"] = [self._tables["lineages"].add(found[0]), found[1]]
        custom = meta.get("custom")
        if isinstance(custom, dict):
            self._put(out, "custom", {key: value for key, value in custom.items() if key != provenance.KEY})
        if isinstance(meta.get("nn_module_stack"), dict):
            out["stack"] = self._stack(meta["nn_module_stack"])
        if isinstance(meta.get("stack_trace"), str):
            out["trace"] = self._tables["traces"].add(meta["stack_trace"])
        if isinstance(meta.get("torch_fn"), (tuple, list)):
            out["torch_fn"] = [str(part) for part in meta["torch_fn"]]
        if meta.get("from_node"):
            out["from"] = [self._origin(source.to_dict()) for source in meta["from_node"]]
        self._put(out, "meta", {key: value for key, value in meta.items() if key not in _OWN_FORM})
        return out

    def _put(self, out: dict[str, Any], key: str, entries: dict[Any, Any]) -> None:
        rows = []
        for name, value in entries.items():
            with contextlib.suppress(Unstorable):
                rows.append([self._plain.encode(name), self._plain.encode(value)])
        if rows:
            out[key] = rows

    def _origin(self, source: dict[str, Any]) -> int:
        earlier = [self._origin(inner) for inner in source.get("from_node") or ()]
        target = _ADDRESS.sub("", str(source["target"]))
        made_by = self._tables["passes"].add([source["pass_name"], source["action"]])
        return self._tables["origins"].add([source["name"], target, made_by, earlier])

    def _stack(self, stack: dict[str, Any]) -> int:
        """Store a module stack as frames that name the frame around them; -1 is the empty stack."""
        frame = -1
        for key, (path, kind) in stack.items():
            text = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            frame = self._tables["frames"].add([frame, str(key), str(path), text])
        return frame


class MetaReader:
    """Gives loaded nodes their metadata."""

    def __init__(self, tables: dict[str, list[Any]], shapes: ShapeReader, values: ValueReader) -> None:
        self._tables, self._shapes, self._values = tables, shapes, values
        self._origins = _origins(tables["origins"], tables["passes"])
        self._stacks: list[dict[str, tuple[str, str]]] = []
        for frame, key, path, kind in tables["frames"]:
            around = {} if frame == -1 else _pick(self._stacks, frame, "frames")
            if len(around) > _MAX_FRAMES:
                raise Damage("a module stack is too deep")
            self._stacks.append({**around, clean(key): (clean(path), clean(kind))})

    def apply(self, node: Node, data: dict[str, Any]) -> None:
        """Set ``node.meta`` from what `MetaWriter.encode` stored."""
        meta = node.meta
        plain = self._pairs(data.get("meta", []))
        meta.update({key: value for key, value in plain.items() if key not in _OWN_FORM})
        if "val" in data:
            meta["val"] = self._shapes.val(data["val"])
        if "stack" in data:
            frame = data["stack"]
            meta["nn_module_stack"] = {} if frame == -1 else dict(_pick(self._stacks, frame, "frames"))
        if "trace" in data:
            meta["stack_trace"] = clean(self._row("traces", data["trace"]))
        if "torch_fn" in data:
            meta["torch_fn"] = tuple(clean(part) for part in data["torch_fn"])
        if "from" in data:
            meta["from_node"] = [_pick(self._origins, index, "origins") for index in data["from"]]
        if "custom" in data:
            custom = self._pairs(data["custom"])
            meta["custom"] = {key: value for key, value in custom.items() if key != provenance.KEY}
        if "id" in data:
            lineage, index = data["id"]
            provenance.set_id(node, (clean(self._row("lineages", lineage)), int(index)))

    def _pairs(self, rows: list[Any]) -> dict[Any, Any]:
        return {_tidy(self._values.decode(key)): _tidy(self._values.decode(value)) for key, value in rows}

    def _row(self, table: str, index: Any) -> Any:
        return _pick(self._tables[table], index, table)


def _pick(rows: list[Any], index: Any, table: str) -> Any:
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(rows):
        raise Damage(f"the table {table!r} has no row {index!r}")
    return rows[index]


def _origins(rows: list[Any], passes: list[Any]) -> list[Any]:
    """Build the NodeSources; a row may name earlier rows only, so that no origin is its own ancestor."""
    built: list[Any] = []
    ancestors: list[int] = []
    for name, target, made_by, earlier in rows:
        pass_name, action = (clean(text) for text in _pick(passes, made_by, "passes"))
        plain = {"name": clean(name), "target": clean(target), "pass_name": pass_name, "action": action}
        source: Any = NodeSource._from_dict({**plain, "graph_id": -1})
        source.from_node = [_pick(built, index, "origins") for index in earlier]
        ancestors.append(1 + sum(ancestors[index] for index in earlier))
        if ancestors[-1] > _MAX_ORIGINS:
            raise Damage("the origins of a node are too many")
        built.append(source)
    return built


def clean(text: Any) -> str:
    """Return the text, which must be one, in a form that cannot end the comments FX writes into its source."""
    if not isinstance(text, str):
        raise Damage(f"a text was expected, not {str(text)[:60]!r}")
    return text.replace('"""', "'''")


def _tidy(value: Any) -> Any:
    walk: dict[type, Callable[[Any], Any]] = {
        str: clean,
        list: lambda items: [_tidy(item) for item in items],
        tuple: lambda items: tuple(_tidy(item) for item in items),
        dict: lambda items: {_tidy(key): _tidy(item) for key, item in items.items()},
    }
    return walk.get(type(value), lambda same: same)(value)

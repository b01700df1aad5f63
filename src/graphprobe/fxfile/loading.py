"""Read a graph from an ``.fx`` file, trusting nothing in it.

FX runs Python source that it generates from a graph, so every text that ends up there (names of nodes, arguments and
attributes) is checked to be a plain identifier, and every callable comes from the tables of `operators`.
"""

from __future__ import annotations

import keyword
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from graphprobe import records
from graphprobe.errors import FxFileError, GraphprobeError, OperatorError
from graphprobe.fxfile import mapping, nnmodules, operators, trees
from graphprobe.fxfile.archive import Archive, Damage
from graphprobe.fxfile.memory import TensorReader
from graphprobe.fxfile.metadata import MetaReader, clean
from graphprobe.fxfile.placement import Devices
from graphprobe.fxfile.saving import EVENTS, MISSING, NOTES
from graphprobe.fxfile.shapes import ShapeReader
from graphprobe.fxfile.values import ValueReader

_OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")
_ATTRIBUTE = re.compile(r"[\w \-+@:/]+", re.ASCII)

Paths = str | os.PathLike[str]


def load(
    path: Paths,
    *,
    weights: bool = True,
    weights_from: Paths | Sequence[Paths] = (),
    device: str | torch.device | None = None,
    operators: Mapping[str, Callable[..., Any]] | None = None,
    mapped: bool = False,
) -> GraphModule:
    """Read a graph that `save` wrote; no code from the file is executed.

    `weights=False` leaves the values out (the graph can then be shown and aligned, not run). `weights_from` names the
    safetensors files that a file with references belongs to, where they have moved. Tensors, and devices in arguments,
    go to `device`, or to the device that they were saved on where this machine has it, else to the CPU. `operators`
    gives functions for names that are not registered here. `mapped` leaves large parameters in their files, on the CPU:
    they are read when they are used and take no memory that the system cannot take back; that their values are those
    which were written is then not checked. What had to be replaced is told in
    ``gm.meta["graphprobe_notes"]``. Raises FxFileError.
    """
    files = [weights_from] if isinstance(weights_from, (str, os.PathLike)) else list(weights_from)
    with _opened(path) as archive:
        reader = _Reader(archive, device, [os.fspath(file) for file in files], operators or {})
        return reader.module(weights, mapped)


def load_inputs(
    path: Paths, *, device: str | torch.device | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the (args, kwargs) stored in an ``.fx`` file, None where it holds none. Raises FxFileError."""
    with _opened(path) as archive:
        return _Reader(archive, device, [], {}).inputs()


@contextmanager
def _opened(path: Paths) -> Iterator[Archive]:
    name = os.fspath(path)
    try:
        with Archive(name) as archive:
            yield archive
    except GraphprobeError:
        raise
    except Damage as error:
        raise FxFileError(f"{name} is damaged or was changed by hand: {_one_line(error)}") from error
    except KeyError as error:
        raise FxFileError(f"{name} is damaged or was changed by hand: the entry {error} is missing") from error
    except Exception as error:  # whatever a file's content makes Python, zlib or torch raise
        text = f"{type(error).__name__}: {_one_line(error)}"
        raise FxFileError(f"{name} is damaged or was changed by hand ({text})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class _Reader:
    """Builds one GraphModule, with the graphs nested in it, from JSON."""

    def __init__(
        self,
        archive: Archive,
        device: str | torch.device | None,
        weights_from: list[str],
        extra: Mapping[str, Callable[..., Any]],
    ) -> None:
        self.data = data = archive.graph()
        self.notes: list[str] = []
        self.device = Devices(device, self.notes)
        self.extra = extra
        self.tensors = TensorReader(archive, data, self.device, weights_from)
        self.shapes = ShapeReader(data["symbols"], data["vals"], self.device)
        self.plain = ValueReader(self.shapes, [], self.device, extra)
        self.meta = MetaReader(data, self.shapes, self.plain)
        self.paths: set[str] = set()

    def module(self, weights: bool, mapped: bool) -> GraphModule:
        """Return the root graph with everything in it."""
        rows = {row["path"]: row for row in self.data["graphs"]}
        if "" not in rows:
            raise Damage("it holds no graph")
        root = GraphModule(torch.nn.Module(), Graph())
        modules = {"": root}
        for path in sorted(rows, key=lambda path: path.count(".")):
            if path and "same" not in rows[path]:
                modules[path] = GraphModule(torch.nn.Module(), Graph())
                self._attach(root, path, modules[path])
        for path, row in rows.items():
            if "same" in row:
                self._attach(root, path, modules[row["same"]])
        self._add_modules(root)
        missing = self._add_state(root, weights, mapped)
        for path, gm in modules.items():
            self._fill(gm, path, rows[path])
        for key, value in self.data["meta"]:
            root.meta[self.plain.decode(key)] = self.plain.decode(value)
        if self.data["events"]:
            root.meta[EVENTS] = tuple(_event(row) for row in self.data["events"])
        root.meta[NOTES] = list(dict.fromkeys(self.notes))
        if missing:
            root.meta[MISSING] = missing
            root.register_forward_pre_hook(_refuse)
        return root

    def _attach(self, root: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
        home, name = self._home(root, path)
        home.add_module(name, module)
        self.paths.add(path)

    def _home(self, root: torch.nn.Module, path: str) -> tuple[torch.nn.Module, str]:
        """Return the module that `path` ends in, made on the way, and the last name."""
        *parents, name = path.split(".")
        for part in (*parents, name):
            if not _ATTRIBUTE.fullmatch(part) or part.startswith("__"):
                raise Damage(f"the attribute {path!r} has an impossible name")
        home = root
        for part in parents:
            if part not in home._modules:
                home.add_module(part, torch.nn.Module())
            found = home._modules[part]
            if found is None:
                raise Damage(f"the attribute {path!r} lies in nothing")
            home = found
        return home, name

    def _add_modules(self, root: torch.nn.Module) -> None:
        for path, row in self.data["modules"].items():
            if path.rpartition(".")[2].startswith("_guards"):
                module: torch.nn.Module | None = operators.Guards()
            else:
                module = nnmodules.rebuild(row, self.plain)
            self._attach(root, path, module or operators.OpaqueModule(path, clean(row["class"])))

    def _add_state(self, root: torch.nn.Module, weights: bool, mapped: bool) -> list[str]:
        rows = self.data["state"]
        # buffers may be written to, and those of equal content would write into each other's memory
        constant = {row["tensor"] for row in rows if row["kind"] == "parameter"} if mapped else set()
        constant -= {row["tensor"] for row in rows if row["kind"] != "parameter"}
        found = self.tensors.read([row["tensor"] for row in rows], constant) if weights else {}
        made: dict[tuple[int, bool], torch.Tensor] = {}
        missing = []
        for row in rows:
            number, path = row["tensor"], row["path"]
            key = (number, row["kind"] == "parameter")
            if key not in made:
                value = found.get(number)
                if value is None:
                    value = self.tensors.description(number)
                    missing.append(path)
                made[key] = _parameter(value, bool(row["grad"])) if key[1] else value
            home, name = self._home(root, path)
            _set_tensor(home, name, made[key], row["kind"])
            self.paths.add(path)
        return missing

    def _fill(self, gm: GraphModule, path: str, row: dict[str, Any]) -> None:
        """Give the module its graph."""
        graph = Graph()
        built: list[Node] = []
        values = ValueReader(self.shapes, built, self.device, self.extra)
        prefix = path + "." if path else ""
        names: set[str] = set()
        for data in row["nodes"]:
            node = self._node(graph, data, values, prefix)
            if data["name"] in names:
                raise Damage(f"two nodes have the name {data['name']!r}")
            names.add(data["name"])
            if node.name != data["name"]:
                self.notes.append(f"the node {data['name']!r} is called {node.name!r} here: FX reserves its name")
            self.meta.apply(node, data)
            built.append(node)
        if [node.op for node in built].count("output") != 1 or built[-1].op != "output":
            raise Damage("a graph does not end in its one output")
        if "call" in row:
            graph.set_codegen(_PyTreeCodeGen(self._calling_convention(row["call"], built)))
        graph.lint()
        gm.graph = graph
        gm.training = bool(row["training"])

    def _node(self, graph: Graph, data: dict[str, Any], values: ValueReader, prefix: str) -> Node:
        op, name = data["op"], data["name"]
        if op not in _OPS or not _is_name(name):
            raise Damage(f"{str(name)[:60]!r} ({str(op)[:20]}) is no node")
        args, kwargs = tuple(values.each(data["args"])), values.pairs(data.get("kwargs", []))
        if not all(_is_name(key) for key in kwargs):
            raise Damage(f"the node {name!r} has a keyword that is no identifier")
        op, target = self._target(op, data, args, prefix)
        return graph.create_node(op, target, args, kwargs, name)

    def _target(self, op: str, data: dict[str, Any], args: tuple[Any, ...], prefix: str) -> tuple[str, Any]:
        target = clean(data["target"])
        if "missing" in data:
            return "call_function", operators.Opaque(target, clean(data["missing"]), clean(data.get("schema", "")))
        if op == "call_function":
            found = operators.resolve(target, self.extra, clean(data.get("schema", "")))
            if not operators.may_call(found, args):
                found = operators.Opaque(target, "graphprobe does not read this attribute from a file")
            return op, found
        if op == "call_method" and not operators.may_call_method(target):
            return "call_function", operators.Opaque(target, "graphprobe does not call this method from a file")
        if op in ("get_attr", "call_module") and prefix + target not in self.paths:
            raise Damage(f"the node {data['name']!r} reads {target!r}, which the file does not hold")
        if op == "placeholder" and not _is_name(target.lstrip("*")):
            raise Damage(f"the input {target!r} is no identifier")
        return op, target

    def _calling_convention(self, data: dict[str, Any], built: list[Node]) -> _PyTreeInfo:
        names = list(data["names"])
        if not all(_is_name(name) for name in names) or len(set(names)) != len(names):
            raise Damage("the arguments of the graph have impossible names")
        notes: list[str] = []
        given, returned = trees.load(data["in"], notes), trees.load(data["out"], notes)
        self.notes += notes
        results = built[-1].args[0]
        count = len(results) if isinstance(results, (list, tuple)) else 1
        inputs = sum(node.op == "placeholder" for node in built)
        if given.num_leaves != inputs or returned.num_leaves != count:
            raise Damage("the graph's inputs or outputs do not fit their structure")
        for key in trees.keywords(given):
            if not _is_name(key):
                raise Damage("a keyword of the graph is no identifier")
        return _PyTreeInfo(names, given, returned)

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the stored inputs."""
        data = self.data.get("inputs")
        if data is None:
            return None
        numbers = [row["tensor"] for row in data["leaves"] if "tensor" in row]
        tensors = self.tensors.read(numbers)
        leaves = []
        for row in data["leaves"]:
            if "tensor" not in row:
                leaves.append(self.plain.decode(row["value"]))
                continue
            tensor = tensors[row["tensor"]]
            if tensor is None:
                raise Damage("the values of the inputs are missing")
            leaves.append(tensor.requires_grad_(bool(row["grad"])))
        return trees.unflatten(leaves, data["tree"], self.notes)


def _parameter(value: torch.Tensor, grad: bool) -> torch.nn.Parameter:
    made = torch.nn.Parameter(value, grad)
    place = mapping.place_of(value)
    if place is not None:
        mapping.at(made, place)
    return made


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and text.isidentifier() and not keyword.iskeyword(text)


def _event(row: dict[str, Any]) -> records.Replacement:
    event = records.from_data(records.Replacement, row)
    if not all(isinstance(text, str) for text in (event.old, event.new, event.transform)):
        raise Damage("a replacement event is malformed")
    return event


def _set_tensor(home: torch.nn.Module, name: str, tensor: torch.Tensor, kind: str) -> None:
    if kind == "parameter":
        if not isinstance(tensor, torch.nn.Parameter):
            raise Damage(f"{name!r} is no parameter")
        home.register_parameter(name, tensor)
    elif kind in ("buffer", "transient"):
        home.register_buffer(name, tensor, persistent=kind == "buffer")
    elif kind == "constant" and not hasattr(home, name):
        setattr(home, name, tensor)
    else:
        raise Damage(f"the tensor {name!r} is of the unknown kind {kind!r}")


def _refuse(module: GraphModule, _: Any) -> None:
    missing = module.meta.get(MISSING, [])
    if missing:
        raise OperatorError(
            f"this graph was loaded without the values of {len(missing)} weights ({missing[0]}, ...) and cannot be "
            'run: load it with its weights, from a file saved with weights="store" or "reference"'
        )

"""Write a graph as an ``.fx`` file."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from graphprobe import __version__, provenance, records
from graphprobe.errors import FxFileError
from graphprobe.fxfile import archive, nnmodules, operators, trees, weights
from graphprobe.fxfile.metadata import MetaWriter
from graphprobe.fxfile.shapes import ShapeWriter
from graphprobe.fxfile.values import Unstorable, ValueWriter

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
#: Keys of ``gm.meta``: the replacements recorded, what loading had to replace, the weights loaded without values.
EVENTS, NOTES, MISSING = "graphprobe_events", "graphprobe_notes", "graphprobe_missing_weights"

Paths = str | os.PathLike[str]


def save(
    gm: GraphModule,
    path: Paths,
    *,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    weights: Literal["store", "reference"] | None = "store",
    weights_from: Paths | Sequence[Paths] | None = None,
) -> None:
    """Write a graph with its provenance, and inputs if given, as an ``.fx`` file; the file appears whole or not at all.

    `weights`: "store" puts every tensor of the graph into the file, once by content; "reference" refers to the
    safetensors files `weights_from` (by relative path, key and SHA-256) and stores only what is not found there; None
    leaves the values out, and the loaded graph can be shown and aligned but not run. The replacements recorded in
    ``gm.meta["graphprobe_events"]`` (records.Replacement) are kept. `args` and `kwargs` may hold
    tensors of any shape and dtype, numbers, strings, None, and containers that torch's pytrees know.
    Raises FxFileError where something cannot be stored: a tensor subclass, an input of an unknown class.
    """
    if not isinstance(gm, GraphModule):
        raise FxFileError(
            f"cannot save a {type(gm).__name__}: give a GraphModule, such as graphprobe.capture(model, args, kwargs)"
        )
    if weights not in ("store", "reference", None):
        raise FxFileError(f"weights={weights!r} is unknown: choose 'store', 'reference' or None")
    sources = _paths(weights_from)
    if (weights == "reference") != bool(sources):
        raise FxFileError('weights="reference" and weights_from="model.safetensors" (one file or several) go together')
    target = os.fspath(path)
    if not os.path.isdir(os.path.dirname(os.path.abspath(target))):
        raise FxFileError(f"cannot write {target}: there is no folder {os.path.dirname(target)}")
    writer = _Writer(gm, keep_values=weights is not None)
    graph = writer.graph()
    if args is not None or kwargs is not None:
        graph["inputs"] = writer.inputs(tuple(args or ()), dict(kwargs or {}))
    plan = writer.tensors.plan()
    if sources:
        _weights_refer(plan, sources, target)
    graph |= {"tensors": plan.tensors, "storages": plan.storages, "contents": plan.contents, "files": plan.files}
    archive.write(target, graph, plan.stored())


def _paths(given: Paths | Sequence[Paths] | None) -> list[str]:
    if given is None:
        return []
    if isinstance(given, (str, os.PathLike)):
        return [os.fspath(given)]
    return [os.fspath(path) for path in given]


_weights_refer = weights.refer  # `save` has an argument of the module's name


class _Writer:
    """Turns one GraphModule, with the graphs nested in it, into JSON."""

    def __init__(self, gm: GraphModule, keep_values: bool) -> None:
        self.gm, self.keep_values = gm, keep_values
        self.shapes = ShapeWriter()
        self.meta = MetaWriter(self.shapes)
        self.plain = ValueWriter(self.shapes, {})
        self.tensors = weights.TensorWriter()
        self.state: list[dict[str, Any]] = []
        self.paths: set[str] = set()  # what get_attr may name
        self.modules: dict[str, Any] = {}

    def graph(self) -> dict[str, Any]:
        """Return everything but the tables of tensors."""
        inner = [(p, m) for p, m in self.gm.named_modules(remove_duplicate=False) if isinstance(m, GraphModule)]
        self.paths |= {path for path, _ in inner if path}
        self._collect_state(inner)
        first: dict[int, str] = {}
        graphs = []
        for path, module in inner:
            same = first.setdefault(id(module), path)
            graphs.append(self._graph(path, module) if same == path else {"path": path, "same": same})
        return {
            "format": "graphprobe.fx",
            "version": archive.FORMAT,
            "written_by": {"graphprobe": __version__, "torch": str(torch.__version__)},
            "graphs": graphs,
            "modules": self.modules,
            "state": self.state,
            "meta": self._meta(),
            "events": [records.to_data(event) for event in self.gm.meta.get(EVENTS, ())],
            "symbols": self.shapes.symbols,
            "vals": self.shapes.vals,
            **self.meta.tables(),
        }

    def _collect_state(self, graphs: list[tuple[str, GraphModule]]) -> None:
        for path, module in self.gm.named_modules(remove_duplicate=False):
            prefix = path + "." if path else ""
            for name, parameter in module._parameters.items():
                self._add_state(prefix + name, parameter, "parameter")
            for name, buffer in module._buffers.items():
                lasting = name not in module._non_persistent_buffers_set
                self._add_state(prefix + name, buffer, "buffer" if lasting else "transient")
        for path, gm in graphs:
            prefix = path + "." if path else ""
            for node in gm.graph.nodes:
                if node.op == "get_attr" and prefix + node.target not in self.paths:
                    self._add_state(prefix + node.target, _attribute(gm, node.target), "constant")
                if node.op == "call_module":
                    self._describe_module(prefix + node.target)

    def _add_state(self, path: str, tensor: Any, kind: str) -> None:
        if isinstance(tensor, torch.Tensor) and path not in self.paths:
            self.paths.add(path)
            number = self.tensors.add(path, tensor, values=self.keep_values)
            self.state.append({"path": path, "kind": kind, "tensor": number, "grad": tensor.requires_grad})

    def _describe_module(self, path: str) -> None:
        module = _attribute(self.gm, path)
        if isinstance(module, torch.nn.Module) and not isinstance(module, GraphModule):
            for name, child in module.named_modules():
                self.modules[f"{path}.{name}" if name else path] = nnmodules.describe(child, self.plain)

    def _graph(self, path: str, gm: GraphModule) -> dict[str, Any]:
        numbers: dict[Node, int] = {}
        values = ValueWriter(self.shapes, numbers)
        rows = []
        for node in gm.graph.nodes:
            rows.append({**self._node(path, gm, node, values), **self.meta.encode(node)})
            numbers[node] = len(numbers)
        out = {"path": path, "nodes": rows, "training": gm.training}
        info = getattr(gm.graph._codegen, "pytree_info", None)
        if info is not None and info.out_spec is not None:
            out["call"] = {
                "names": list(info.orig_args),
                "in": trees.dump(info.in_spec),
                "out": trees.dump(info.out_spec),
            }
        return out

    def _node(self, path: str, gm: GraphModule, node: Node, values: ValueWriter) -> dict[str, Any]:
        target, missing = self._target(path, gm, node)
        try:
            arguments = [values.encode(list(node.args)), [[k, values.encode(v)] for k, v in node.kwargs.items()]]
        except Unstorable as error:
            missing = f"its argument, {error}, has no form in an .fx file"
            arguments = [_shown(node.args, values), [[k, _shown(v, values)] for k, v in node.kwargs.items()]]
        if missing and node.op in ("output", "placeholder"):
            raise FxFileError(f"cannot store the node {node.name!r} ({node.op}): {missing}")
        row: dict[str, Any] = {"op": node.op, "name": node.name, "target": target, "args": arguments[0]}
        if arguments[1]:
            row["kwargs"] = arguments[1]
        if missing:
            row["missing"] = missing
        schema = operators.schema_of(node.target)
        return row | {"schema": schema} if schema else row

    def _target(self, path: str, gm: GraphModule, node: Node) -> tuple[str, str]:
        """Return the target's name, and why it cannot be run from the file ('' where it can)."""
        name = str(node.target)
        if node.op == "call_function":
            found = operators.name_of(node.target)
            return (found, "") if found else (_ADDRESS.sub("", provenance.target_name(node)), "")
        if node.op == "get_attr" and (f"{path}.{name}" if path else name) not in self.paths:
            return name, f"it reads a {type(_attribute(gm, name)).__name__}, which an .fx file does not hold"
        if node.op == "call_method" and not operators.may_call_method(name):
            return name, f"graphprobe does not call the method {name!r} from a file"
        return name, ""

    def _meta(self) -> list[list[Any]]:
        rows = []
        for key, value in self.gm.meta.items():
            if key not in (EVENTS, NOTES, MISSING):
                with contextlib.suppress(Unstorable):
                    rows.append([self.plain.encode(key), self.plain.encode(value)])
        return rows

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return stored inputs as JSON; their tensors join those of the graph. Raises FxFileError."""
        leaves, spec = trees.flatten(args, kwargs)
        rows = []
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                rows.append({"tensor": self.tensors.add(f"inputs.{index}", leaf), "grad": leaf.requires_grad})
                continue
            try:
                rows.append({"value": self.plain.encode(leaf)})
            except Unstorable as error:
                raise FxFileError(
                    f"cannot store the inputs: {error} is neither a tensor nor a container that torch's pytrees know. "
                    "Register its class with torch.utils._pytree.register_pytree_node, or save without it"
                ) from error
        return {"leaves": rows, "tree": spec}


def _attribute(gm: torch.nn.Module, target: str) -> Any:
    found: Any = gm
    for part in target.split("."):
        found = getattr(found, part, None)
    return found


def _shown(value: Any, values: ValueWriter) -> Any:
    """Encode an argument, with text in place of what cannot be encoded."""
    try:
        return values.encode(value)
    except Unstorable:
        if isinstance(value, (list, tuple)):
            return [_shown(part, values) for part in value]
        return _ADDRESS.sub("", str(value))[:200]

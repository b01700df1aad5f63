"""A graph made ready for the lanes: functional, flat, its inputs and outputs named by their path.

Lanes must never disturb each other, so a graph that writes into tensors, calls modules or methods, or holds an
autocast region is exported again and functionalised; names of the user's nodes are carried through as labels.
"""

from __future__ import annotations

import copy
import operator
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from graphprobe import nodes, provenance, subclasses
from graphprobe.caches import register_caches
from graphprobe.calling import constants, input_paths, output_paths, placeholder_values, returned
from graphprobe.capturing import quiet
from graphprobe.errors import CaptureError, InputError
from graphprobe.streaming import Stream

_LABEL = "graphprobe_label"
_CONSTANT = "_constant_"  # begins the name of a buffer that was a plain attribute
_PARTS = "graphprobe_parts"  # of an operator with several results: by index, what the user calls them
#: Bases of what quantisers of torch.ao and torchao look at values with, by name: neither need be installed.
_OBSERVERS = {"ObserverBase", "AffineQuantizedObserverBase"}
#: In place on paper, but no value changes: they only leave the autograd graph.
DETACHES = ("aten::detach_",)


@dataclass(eq=False)
class Program:
    """One side of a comparison."""

    gm: GraphModule
    inputs: dict[str, Node]  # path in the calling convention -> placeholder, tensors and numbers alike
    outputs: dict[str, Node]  # path -> node; only leaves that are nodes
    labels: dict[Node, str]  # what the user calls a node
    live: list[Node] = field(default_factory=list)  # nodes that reach an output, in graph order
    order: dict[Node, int] = field(default_factory=dict)
    seeds: dict[Node, int] = field(
        default_factory=dict
    )  # random operations: the k-th of its kind and shape draws alike
    constants: dict[str, Any] = field(default_factory=dict)  # path -> what is returned and is no node: a number, None
    stream: Stream | None = None  # what brings the weights to the device where the program runs
    device: torch.device | None = None  # where it runs, if that is one device

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Take note of the graph as it is now: which nodes live, in which order, which are random."""
        alive: set[Node] = set()
        stack = list(self.outputs.values())
        while stack:
            node = stack.pop()
            if node not in alive:
                alive.add(node)
                stack.extend(node.all_input_nodes)
        self.live = [n for n in self.gm.graph.nodes if n in alive]
        self.order = {n: i for i, n in enumerate(self.live)}
        met: Counter[object] = Counter()
        for node in self.live:
            if nodes.is_random(node):
                kind = (nodes.schema_name(node), nodes.shape(node))
                self.seeds[node] = zlib.crc32(repr((kind, met[kind])).encode())
                met[kind] += 1

    def take_over(self, old: Node, new: Node, users: Iterable[Node]) -> None:
        """Let these users, and the outputs, read `new` where they read `old`; `refresh` when all is done."""
        for user in users:
            user.replace_input_with(old, new)
        self.outputs.update({path: new for path, node in self.outputs.items() if node is old})

    def label(self, node: Node) -> str:
        """Return the user's name for a node."""
        return self.labels.get(node, node.name)

    def device_of(self, node: Node) -> torch.device:
        """Return where a node's value lies: the graph's own note may be of where it was captured."""
        value = nodes.tensor_val(node)
        noted = None if value is None or value.device.type == "meta" else value.device
        return self.device or noted or torch.device("cpu")

    def is_leaf(self, node: Node) -> bool:
        """Whether the node is a weight or constant of the module: part of a region, never an input of it."""
        return node.op == "get_attr"

    def attribute(self, node: Node) -> Any:
        """Return what a ``get_attr`` node reads, on the device where the program runs."""
        value = self.held(node)
        return value if self.stream is None else self.stream.here(value)

    def held(self, node: Node) -> Any:
        """Return what a ``get_attr`` node reads, where it is held."""
        return fetch(self.gm, str(node.target))


def fetch(root: torch.nn.Module, target: str) -> Any:
    """Return ``root.a.b.c`` for 'a.b.c'."""
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


def program(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Make a captured graph ready for the lanes. `args` and `kwargs` are used only if it must be exported again.

    Raises CaptureError where a graph that must be functionalised cannot be.
    """
    if any(needs_export(node) for node in gm.graph.nodes):
        return without_patterns(_functionalised(gm, args, kwargs))
    if subclasses.has_subclasses(gm):
        gm = subclasses.unwrapped(gm)
    return without_patterns(as_is(gm))


def as_is(gm: GraphModule) -> Program:
    """Take a graph as it stands."""
    return Program(gm, input_paths(gm), output_paths(gm), {}, constants=constants(gm))


def needs_export(node: Node) -> bool:
    """Whether lanes cannot run this node as it stands: it mutates, calls a module or method, maps, or autocasts."""
    if node.op in ("call_module", "call_method"):
        return not nodes.returns_nothing(node)
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "autocast" in node.target._name or "set_grad" in node.target._name
    if getattr(node.target, "__module__", "") == "torch._functorch.predispatch":  # vmap: a value within holds a level
        return True
    return nodes.is_mutating(node) and nodes.schema_name(node) not in DETACHES


class _Walked(GraphModule):
    """A graph that is evaluated node by node: nobody calls its code, and generating that takes as long as copying."""

    def recompile(self) -> Any:
        """Generate nothing."""


def copied(one: Program) -> Program:
    """Copy a program's graph, that its nodes may be changed; weights stay shared, labels stay the user's names."""
    graph = torch.fx.Graph()
    made: dict[Node, Node] = {}
    for node in one.gm.graph.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].meta = dict(node.meta)
    return Program(
        _Walked(one.gm, graph),
        {p: made[n] for p, n in one.inputs.items()},
        {p: made[n] for p, n in one.outputs.items()},
        {made[n]: one.label(n) for n in made},
        constants=one.constants,
        stream=one.stream,
        device=one.device,
    )


def without_patterns(one: Program) -> Program:
    """Replace operands that are only taken for their dtype or shape: no value comes from them.

    As operands they would tie a region to everything that they are computed from.
    """
    if not any(nodes.schema_name(node) in _LIKE for node in one.live):
        return one
    one = copied(one)
    for node in one.live:
        made = _LIKE.get(nodes.schema_name(node), _kept)(node)
        if made is not None:
            node.target, node.args, node.kwargs = made[0], (node.args[0], made[1]), {}
    one.refresh()
    return one


Spelled = tuple[Any, Any] | None  # an operator, and what it takes after its first operand


def _kept(node: Node) -> Spelled:
    return None


def _as_dtype(node: Node) -> Spelled:
    value, pattern = nodes.tensor_val(node), nodes.tensor_val(node.all_input_nodes[-1])
    if value is None or pattern is None or value.device != pattern.device:
        return None
    return torch.ops.aten.to.dtype, value.dtype


def _as_shape(target: Any) -> Callable[[Node], Spelled]:
    def spelled(node: Node) -> Spelled:
        shape = nodes.shape(node)
        fixed = shape is not None and all(type(size) is int for size in shape)
        return (target, list(shape)) if shape is not None and fixed else None

    return spelled


_LIKE: dict[str, Callable[[Node], Spelled]] = {
    "aten::type_as": _as_dtype,
    "aten::expand_as": _as_shape(torch.ops.aten.expand.default),
    "aten::view_as": _as_shape(torch.ops.aten.view.default),
    "aten::reshape_as": _as_shape(torch.ops.aten.reshape.default),
}


def _functionalised(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    register_caches()
    given = placeholder_values(gm, args, kwargs)
    inputs = input_paths(gm)
    for path, node in inputs.items():
        if node not in given and node.users:
            raise InputError(f"the graph needs the input {path!r}, which was not given. It takes {', '.join(inputs)}")
    try:
        with torch.no_grad(), quiet():
            flat = tuple(_as_taken(given.get(node), node) for node in inputs.values())
            exported = torch.export.export(_flattened(gm), flat, strict=False).run_decompositions({})
    except Exception as error:
        raise CaptureError(
            f"the graph writes into its tensors or calls modules, and could not be made functional: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0][:400]}. "
            "Give the arguments it runs on, or call ExportedProgram.run_decompositions({}) first"
        ) from error
    return _from_exported(exported, list(inputs), returned(gm)[0])


def _as_taken(value: Any, node: Node) -> Any:
    """Cast a floating input to the dtype that the graph was captured with: the other side may take another."""
    taken = nodes.tensor_val(node)
    if not isinstance(value, torch.Tensor) or taken is None or not value.is_floating_point():
        return value
    return value.to(taken.dtype) if taken.dtype.is_floating_point else value


def _flattened(gm: GraphModule) -> GraphModule:
    """Copy a graph into one that takes and returns plain values; its nodes carry their old names as labels.

    Export would build what a model returns, and what building a cache does would become part of the graph.
    """
    with quiet():  # about torch's own pytree classes, which the calling convention holds
        graph = copy.deepcopy(gm.graph)
    flat = GraphModule(gm, graph, type(gm).__name__)  # copy.copy would take the original's graph over
    for old, new in zip(gm.graph.nodes, flat.graph.nodes, strict=True):
        if new.op == "get_attr":
            _as_buffer(flat, new)
        new.meta["custom"] = {**(new.meta.get("custom") or {}), _LABEL: old.name, _PARTS: _parts(old)}
    for node in list(flat.graph.nodes):
        if node.op == "call_module" and _is_observer(flat.get_submodule(str(node.target))):
            node.replace_all_uses_with(node.args[0])
            flat.graph.erase_node(node)
    output = next(n for n in flat.graph.nodes if n.op == "output")
    output.args = (tuple(returned(flat)[1]),)
    flat.graph.set_codegen(CodeGen())
    flat.recompile()
    return flat


def _parts(node: Node) -> dict[int, str]:
    """Name the results that are taken out of a node: export makes them anew and gives them the node's own label."""
    taken = [n for n in node.users if n.target is operator.getitem and n.args[0] is node and isinstance(n.args[1], int)]
    return {n.args[1]: n.name for n in reversed(taken) if isinstance(n.args[1], int)}


def _is_observer(module: torch.nn.Module) -> bool:
    """Whether a quantiser calibrates here: it returns what it is given, after branches that export cannot follow."""
    return any(base.__name__ in _OBSERVERS for base in type(module).__mro__)


def _as_buffer(gm: GraphModule, node: Node) -> None:
    """Register a constant that is a plain attribute as a buffer: export loses track of the others."""
    value = fetch(gm, str(node.target))
    known = {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}
    if isinstance(value, torch.Tensor) and str(node.target) not in known:
        name = _CONSTANT + str(node.target).replace(".", "_")
        gm.register_buffer(name, value, persistent=True)
        node.target = name
    node.meta["custom"] = {k: v for k, v in (node.meta.get("custom") or {}).items() if k != provenance.KEY}


def _from_exported(exported: torch.export.ExportedProgram, inputs: list[str], returned: list[str]) -> Program:
    """Turn a functional ExportedProgram into a Program: weights become ``get_attr``, new state becomes an output."""
    signature = exported.graph_signature
    with quiet():
        gm = GraphModule(exported.graph_module, copy.deepcopy(exported.graph_module.graph))
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted |= signature.inputs_to_lifted_tensor_constants
    state: dict[str, Any] = {**exported.state_dict, **exported.constants}
    user: list[Node] = []
    for node in [n for n in gm.graph.nodes if n.op == "placeholder"]:
        if str(node.target) not in lifted:
            user.append(node)
            continue
        name = lifted[str(node.target)]
        attribute = "_state_" + name.replace(".", "_")
        gm.register_buffer(attribute, state[name], persistent=False)
        with gm.graph.inserting_before(node):
            read = gm.graph.get_attr(attribute)
        read.meta = {**node.meta, provenance.WEIGHT: name.removeprefix(_CONSTANT)}
        node.replace_all_uses_with(read)
        gm.graph.erase_node(node)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    outputs: dict[str, Node] = {}
    constants: dict[str, Any] = {}
    names = iter(returned)
    for spec, leaf in zip(signature.output_specs, output.args[0], strict=True):
        name = next(names) if spec.kind.name == "USER_OUTPUT" else f"state:{spec.target}"
        if isinstance(leaf, Node):
            outputs[name] = leaf
        else:
            constants[name] = leaf
    labels = {n: _label(n) for n in gm.graph.nodes if _LABEL in (n.meta.get("custom") or {})}
    return Program(gm, dict(zip(inputs, user, strict=True)), outputs, labels, constants=constants)


def _label(node: Node) -> str:
    """Return what the user calls a node that export has made."""
    custom = node.meta["custom"]
    known: str = custom[_LABEL]
    index = node.args[1] if node.target is operator.getitem else None
    return str(custom.get(_PARTS, {}).get(index, known)) if isinstance(index, int) else known

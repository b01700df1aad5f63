"""Questions that every picture asks of a GraphView: who uses what, which module a node lies in, what is a weight."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from graphprobe.records import GraphView, NodeView
from graphprobe.render.places import places

CALLS = ("call_function", "call_method", "call_module")
#: Operators that check and return nothing; no picture shows them.
_SILENT = re.compile(r"_assert|sym_constrain|_guards|_print\b")
_CAST = re.compile(r"^aten\.(to|_to_copy|type_as)\.|^prims\.convert_element_type|^(to|float|half|bfloat16|double)$")
#: Sizes of values, and what is computed from nothing but such numbers.
_SIZE = re.compile(r"(^|\.)(aten\.)?sym_(size|stride|numel|storage_offset)\b")
_ARITHMETIC = re.compile(
    r"^(operator|_operator|math)\.|(^|\.)sym_(max|min|sum|not|ite|int|float|sqrt)\b|^(add|sub|mul)$"
)
#: Names under which torch.export lifts parameters, buffers and constants to inputs.
_LIFTED = re.compile(r"^[pbc]_\w")


@dataclass(frozen=True)
class Wiring:
    """A graph with its users, module places and weights looked up once."""

    graph: GraphView
    users: dict[str, tuple[str, ...]]
    order: dict[str, int]
    place: dict[str, str]  # node -> module path, guessed from weights and inputs where the graph does not say
    kinds: dict[str, str]  # module path -> class name, where a node says so
    weights: frozenset[str]  # parameters, buffers, constants, and views and casts of nothing but these
    sizes: frozenset[str]  # symbolic sizes and arithmetic on them: the shapes of the values say what they are
    lone: frozenset[str]  # modules that hold a single operation
    shown: tuple[str, ...]  # what a picture shows: everything but weights, sizes, checks and dead inputs

    def node(self, name: str) -> NodeView:
        """Return the node of that name."""
        return self.graph.by_name[name]

    def inputs(self, name: str) -> tuple[str, ...]:
        """Return the names of the node's inputs that are no weights and no sizes."""
        hidden = (self.weights, self.sizes)
        return tuple(i for i in self.node(name).inputs if i in self.order and not any(i in these for these in hidden))

    def weight_inputs(self, name: str) -> tuple[str, ...]:
        """Return the names of the node's inputs that are weights."""
        return tuple(i for i in self.node(name).inputs if i in self.weights)

    def origin(self, name: str) -> str:
        """Follow views and casts upwards to the weight or value that they show."""
        node = self.node(name)
        while (node.is_view or is_cast(node)) and node.inputs and node.inputs[0] in self.order:
            node = self.node(node.inputs[0])
        return node.name


def wire(graph: GraphView) -> Wiring:
    """Look up everything a picture needs of a graph; linear in its size."""
    users: dict[str, list[str]] = {node.name: [] for node in graph.nodes}
    for node in graph.nodes:
        for source in dict.fromkeys(node.inputs):
            if source in users:
                users[source].append(node.name)
    weights = _weights(graph)
    sizes = _sizes(graph)
    shown = tuple(n.name for n in graph.nodes if n.name not in weights | sizes and not _hidden(n, bool(users[n.name])))
    kinds: dict[str, str] = {}
    for node in graph.nodes:
        if node.module_type:
            kinds.setdefault(node.module_path, node.module_type)
    place = places(graph, weights)
    crowd = Counter(place[name] for name in shown if graph.by_name[name].op in CALLS)
    return Wiring(
        graph,
        {name: tuple(found) for name, found in users.items()},
        {node.name: index for index, node in enumerate(graph.nodes)},
        place,
        kinds,
        weights,
        sizes,
        frozenset(module for module, number in crowd.items() if number == 1),
        shown,
    )


def is_cast(node: NodeView) -> bool:
    """Whether the operator's purpose is to change the dtype."""
    return node.op in CALLS and bool(_CAST.search(node.target))


def unary_source(wiring: Wiring, name: str, limit: int = 12) -> str:
    """Follow a value upwards through views, casts and arithmetic with constants; return where it was made."""
    for _ in range(limit):
        node = wiring.node(name)
        sources = wiring.inputs(name)
        passing = node.is_view or is_cast(node) or re.match(r"aten\.(mul|contiguous|clone|expand|alias)", node.target)
        if len(sources) != 1 or node.op not in CALLS or not passing:
            return name
        name = sources[0]
    return name


def _weights(graph: GraphView) -> frozenset[str]:
    lifted = any(n.op == "placeholder" and re.match(r"p_\w*weight", n.name) for n in graph.nodes)
    found: set[str] = set()
    for node in graph.nodes:
        plain = node.op == "get_attr" or (lifted and node.op == "placeholder" and bool(_LIFTED.match(node.name)))
        derived = (node.is_view or is_cast(node)) and bool(node.inputs) and all(i in found for i in node.inputs)
        # one without a value must stay to be seen in red
        if (plain or derived) and node.has_val:
            found.add(node.name)
    return frozenset(found)


def _hidden(node: NodeView, used: bool) -> bool:
    if node.op == "output":
        return False
    if node.op in ("placeholder", "get_attr"):
        return not used
    return not used and bool(_SILENT.search(node.target))


def _sizes(graph: GraphView) -> frozenset[str]:
    """Return the sizes that only say how large other values are; one that is itself an output stays to be seen."""
    found: set[str] = set()
    for node in graph.nodes:
        number = node.op in CALLS and node.shape is None and node.dtype is None and node.has_val
        of_sizes = bool(_ARITHMETIC.search(node.target)) and all(i in found for i in node.inputs) and bool(node.inputs)
        if number and (_SIZE.search(node.target) or of_sizes):
            found.add(node.name)
    outputs = {i for node in graph.nodes if node.op == "output" for i in node.inputs}
    return frozenset(name for name in found if name not in outputs)

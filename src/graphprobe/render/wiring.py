"""Questions that every picture asks of a GraphView: who uses what, which module a node lies in, what is a weight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from graphprobe.records import GraphView, NodeView

CALLS = ("call_function", "call_method", "call_module")
#: Operators that check and return nothing; no picture shows them.
_SILENT = re.compile(r"_assert|sym_constrain|_guards|_print\b")
_CAST = re.compile(r"^aten\.(to|_to_copy|type_as)\.|^prims\.convert_element_type|^(to|float|half|bfloat16|double)$")
#: Names under which torch.export lifts parameters, buffers and constants to inputs.
_LIFTED = re.compile(r"^[pbc]_\w")
#: The outermost numbered component of a module path: model.layers.3, transformer.h.11, or 0 in an nn.Sequential.
_NUMBERED = re.compile(r"^(?:(?P<stack>.*?)\.)?(?P<number>\d+)(?=\.|$)")
_FLAT = re.compile(r"^(?P<head>\w*?)_?(?P<stack>layers|layer|blocks|block|h)_(?P<number>\d+)_(?P<tail>\w+)$")
_BLOCKS = re.compile(r"^(self_attn|self_attention|attention|attn|mlp|ffn|feed_forward|experts|moe)_(?=\w)")


@dataclass(frozen=True)
class Wiring:
    """A graph with its users, module places and weights looked up once."""

    graph: GraphView
    users: dict[str, tuple[str, ...]]
    order: dict[str, int]
    place: dict[str, str]  # node -> module path, guessed from weights and inputs where the graph does not say
    kinds: dict[str, str]  # module path -> class name, where a node says so
    weights: frozenset[str]  # parameters, buffers, constants, and views and casts of nothing but these
    lone: frozenset[str]  # modules that hold a single operation
    shown: tuple[str, ...]  # what a picture shows: everything but weights, checks and dead inputs

    def node(self, name: str) -> NodeView:
        """Return the node of that name."""
        return self.graph.by_name[name]

    def inputs(self, name: str) -> tuple[str, ...]:
        """Return the names of the node's inputs that are no weights."""
        return tuple(i for i in self.node(name).inputs if i in self.order and i not in self.weights)

    def weight_inputs(self, name: str) -> tuple[str, ...]:
        """Return the names of the node's inputs that are weights."""
        return tuple(i for i in self.node(name).inputs if i in self.weights)


def wire(graph: GraphView) -> Wiring:
    """Look up everything a picture needs of a graph; linear in its size."""
    users: dict[str, list[str]] = {node.name: [] for node in graph.nodes}
    for node in graph.nodes:
        for source in dict.fromkeys(node.inputs):
            if source in users:
                users[source].append(node.name)
    weights = _weights(graph)
    shown = tuple(n.name for n in graph.nodes if n.name not in weights and not _hidden(n, bool(users[n.name])))
    kinds: dict[str, str] = {}
    for node in graph.nodes:
        if node.module_type:
            kinds.setdefault(node.module_path, node.module_type)
    place = _places(graph, weights)
    crowd = Counter(place[name] for name in shown if graph.by_name[name].op in CALLS)
    return Wiring(
        graph,
        {name: tuple(found) for name, found in users.items()},
        {node.name: index for index, node in enumerate(graph.nodes)},
        place,
        kinds,
        weights,
        frozenset(module for module, number in crowd.items() if number == 1),
        shown,
    )


def is_cast(node: NodeView) -> bool:
    """Whether the operator's purpose is to change the dtype."""
    return node.op in CALLS and bool(_CAST.search(node.target))


def layer_prefix(path: str) -> str:
    """Return the outermost numbered module a path lies in: 'model.layers.3'; '' where there is none."""
    found = _NUMBERED.match(path)
    return found.group(0) if found else ""


def inside(path: str, module: str) -> bool:
    """Whether a module path is `module` or lies in it; everything lies in the root ''."""
    return not module or path == module or path.startswith(module + ".")


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


def _places(graph: GraphView, weights: frozenset[str]) -> dict[str, str]:
    """Give every operation a module path.

    A graph read from a text dump, or a node that a transform made, may carry none. Then the module of its weights
    counts, else the furthest layer among its inputs.
    """
    place: dict[str, str] = {}
    by_name = graph.by_name
    for node in graph.nodes:
        known = node.module_path
        if not known and not node.module_type and node.op in CALLS:
            owners = [weight_module(by_name[i].target) for i in node.inputs if i in weights]
            known = next((o for o in owners if o), "") or _furthest(place.get(i, "") for i in node.inputs)
        place[node.name] = known
    return place


def _furthest(paths: Iterable[str]) -> str:
    def depth(prefix: str) -> int:
        return int(prefix.rsplit(".", 1)[-1])

    return max((p for p in map(layer_prefix, paths) if p), key=depth, default="")


def weight_module(target: str) -> str:
    """Return the module that owns a weight: 'model.layers.0.self_attn.q_proj' for '….q_proj.weight'; '' if unclear.

    Names in which dots became underscores are split at the words that transformers use.
    """
    if "." in target:
        return target.rsplit(".", 1)[0]
    found = _FLAT.match(re.sub(r"^[pbc]_", "", target))
    if not found:
        return ""
    tail = re.sub(r"_(weight|bias)$", "", found["tail"])
    tail = _BLOCKS.sub(r"\1.", tail)
    return ".".join(part for part in (found["head"], found["stack"], found["number"], tail) if part)

"""Graphs as they stood between two passes of Inductor, each able to run as FX."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, GraphModule, Node

from graphprobe import nodes
from graphprobe.bisection.inductor.signature import Adapter, output_count
from graphprobe.capturing import quiet
from graphprobe.pipeline import fresh_copy
from graphprobe.provenance import target_name
from graphprobe.records import Replacement

#: Where a lowering pattern's node keeps what it stands for.
_STANDS_FOR = "graphprobe_stands_for"
#: The stages whose passes work on the very graphs that are compared; before them graphs are exported first.
IN_ATEN = ("joint", "post_grad")


@dataclass(frozen=True)
class Hit:
    """One application of a pattern within a pass."""

    pattern: str
    node: str
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.pattern} at {self.node}"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A graph, and the pass that made it from the one before."""

    stage: str  # dynamo, pre_grad, aot, joint, post_grad
    name: str  # of the pass
    gm: GraphModule
    replacements: tuple[Replacement, ...] = ()
    created: tuple[str, ...] = ()
    erased: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    hits: tuple[Hit, ...] = ()
    seconds: float = 0.0
    number: int = 0  # how many passes of this stage and name there were before it
    counted: tuple[str, ...] = ()  # the rewrites within it that say that they have done something

    @property
    def label(self) -> str:
        """Return 'joint: pass_pattern_0'."""
        return f"{self.stage}: {self.name}" if self.name else self.stage

    @property
    def key(self) -> tuple[str, str, int]:
        """Return what names the same pass in another compilation of the same model."""
        return self.stage, self.name, self.number


def signature_of(gm: GraphModule) -> int:
    """Return a number that changes where any node of the graph or of its bodies does."""
    rows = []
    for _, one in gm.named_modules():
        if isinstance(one, GraphModule):
            rows += [(n.name, n.op, target_name(n), str(n.args), str(n.kwargs)) for n in one.graph.nodes]
    return hash(tuple(rows))


def copy_of(gm: GraphModule) -> GraphModule:
    """Return a copy that runs as FX: a node of a lowering pattern becomes again what it stands for."""
    copied = fresh_copy(gm)
    for node in list(copied.graph.nodes):
        original = node.meta.get(_STANDS_FOR)
        if isinstance(original, GraphModule):
            _put_back(node, original)
    copied.graph.lint()
    copied.recompile()
    return copied


def remember(match: Any, node: Node) -> GraphModule | None:
    """Return the operations of a match as a graph of the match's arguments, None where they need more than those."""
    inside = [n for n in node.graph.nodes if n in set(match.nodes)]
    outer = [leaf for leaf in pytree.tree_leaves((tuple(match.args), dict(match.kwargs))) if isinstance(leaf, Node)]
    graph = Graph()
    made: dict[Node, Node] = {}
    for leaf in outer:
        if leaf not in made:
            made[leaf] = graph.placeholder(leaf.name)
    if any(source not in made and source not in inside for one in inside for source in one.all_input_nodes):
        return None
    for one in inside:
        made[one] = graph.node_copy(one, made.__getitem__)
    graph.output(made[node])
    return GraphModule(torch.nn.Module(), graph)


def mark(before: set[Node], graph: Graph, original: GraphModule | None) -> None:
    """Attach to the node that a lowering pattern has just made what it stands for."""
    for node in graph.nodes:
        if node not in before and original is not None:
            node.meta[_STANDS_FOR] = original


def _put_back(node: Node, original: GraphModule) -> None:
    leaves = [leaf for leaf in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(leaf, Node)]
    given = iter(dict.fromkeys(leaves))
    made: dict[Node, Node] = {}
    with node.graph.inserting_before(node):
        for inner in original.graph.nodes:
            if inner.op == "placeholder":
                made[inner] = next(given)
            elif inner.op == "output":
                node.replace_all_uses_with(made[inner.args[0]])
            else:
                made[inner] = node.graph.node_copy(inner, made.__getitem__)
                made[inner].meta = copy.copy(inner.meta)
    node.graph.erase_node(node)


def in_aten(gm: GraphModule, args: tuple[Any, ...]) -> GraphModule:
    """Return a graph of torch functions and methods as one of ATen operators; as it is where it cannot be exported."""
    copied = fresh_copy(gm)
    try:
        with torch.no_grad(), quiet():
            exported = torch.export.export(copied, args, strict=False).run_decompositions({})
            found = exported.module(check_guards=False)
    except Exception:  # a graph that export does not take is compared as it stands
        return copied
    assert isinstance(found, GraphModule)
    for node in list(found.graph.nodes):
        if node.op == "call_module" and nodes.returns_nothing(node):
            found.graph.erase_node(node)
    found.recompile()
    return found


def is_random(node: Node) -> bool:
    """Whether a node draws random numbers, in ATen's way or in Inductor's."""
    return nodes.is_random(node) or "inductor_seed" in str(node.target) or "inductor_random" in str(node.target)


@dataclass(eq=False)
class Piece:
    """One Dynamo graph of a model: a model with graph breaks has several."""

    number: int
    snapshots: list[Snapshot] = field(default_factory=list)
    inputs: tuple[Any, ...] | None = None  # of the Dynamo graph at its first call
    inner_inputs: tuple[Any, ...] | None = None  # of the graph after AOTAutograd
    inner_outputs: tuple[Any, ...] | None = None  # of the compiled code
    outputs: tuple[Any, ...] | None = None  # of the compiled code behind AOTAutograd's wrapper
    adapter: Adapter | None = None
    unadapted: str = ""  # why there is no adapter
    returned: tuple[int, int] = (0, 0)  # inputs that come back first, outputs of the Dynamo graph

    @property
    def boundary(self) -> int:
        """The index of the first snapshot behind AOTAutograd."""
        stages = [snapshot.stage for snapshot in self.snapshots]
        return next((i for i, stage in enumerate(stages) if stage not in ("dynamo", "pre_grad")), len(stages))

    @property
    def counts(self) -> tuple[int, int, tuple[int, int]]:
        """Return how many values the graphs before and after AOTAutograd return, and which of them are the model's."""
        before, after = self.snapshots[0].gm, self.snapshots[self.boundary].gm
        return output_count(before), output_count(after), self.returned

"""Rewrites of exported graphs with known truth, and the stripping of evidence from them.

Truth needs no bookkeeping: a node of `after` stands for a node of `before` if both hold the same numbers in exact
arithmetic for two independent draws of all weights and inputs. A `Rewrite` turns a captured graph into another one; the
same rewrite of the same model with other weights gives the same graph, which is the second draw. A planted bug changes
one operation of a rewritten graph; what a node stands for is then what it stands for in the graph without the bug.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

import graphprobe
from corpus import mutations, text_models
from graphprobe.pipeline import Pipeline
from graphprobe.records import Replacement

#: What is taken away, one after the other.
LEVELS = ("events", "ids", "modules", "values", "structure")


@dataclass(frozen=True)
class Pair:
    """Two graphs of one model, and the inputs of both."""

    before: GraphModule
    after: GraphModule
    events: tuple[Replacement, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Rewrite = Callable[[str, int, torch.dtype], Pair]


@functools.lru_cache(maxsize=4)
def _exported(name: str, seed: int, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    model, args, kwargs = text_models.build(name, seed, attention, dtype)
    with torch.no_grad():
        return torch.export.export(model, args, kwargs, strict=False), args, kwargs


def _captured(name: str, seed: int, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    program, args, kwargs = _exported(name, seed, dtype, attention)
    return graphprobe.capture(program), args, kwargs


def pipeline(text: str, attention: str = "sdpa") -> Rewrite:
    """Rewrite by transforms of the library, under observation."""

    def rewrite(name: str, seed: int, dtype: torch.dtype) -> Pair:
        gm, args, kwargs = _captured(name, seed, dtype, attention)
        done = Pipeline.parse(text).run(gm)
        return Pair(gm, done.gm, tuple(done.events), args, kwargs)

    return rewrite


def decomposed(table: Any) -> Rewrite:
    """Decompose by a table (None: to core ATen; an empty one makes functional and decomposes nothing)."""

    def rewrite(name: str, seed: int, dtype: torch.dtype) -> Pair:
        program, args, kwargs = _exported(name, seed, dtype)
        before = graphprobe.capture(program)
        with torch.no_grad():
            after = graphprobe.capture(program.run_decompositions(table))
        return Pair(before, after, (), args, kwargs)

    return rewrite


def exported_again(name: str, seed: int, dtype: torch.dtype) -> Pair:
    """Export the captured graph once more, strictly: Dynamo's names and its module stacks."""
    gm, args, kwargs = _captured(name, seed, dtype)
    with torch.no_grad():
        again = torch.export.export(gm, args, kwargs, strict=True)
    return Pair(gm, graphprobe.capture(again), (), args, kwargs)


def eager_to_sdpa(name: str, seed: int, dtype: torch.dtype) -> Pair:
    """Capture the model twice, with attention written out and with one operator: two lineages."""
    gm, args, kwargs = _captured(name, seed, dtype, "eager")
    return Pair(gm, _captured(name, seed, dtype, "sdpa")[0], (), args, kwargs)


def reordered(name: str, seed: int, dtype: torch.dtype) -> Pair:
    """Shuffle the nodes into another topological order; the order is drawn from the graph's own size."""
    gm, args, kwargs = _captured(name, seed, dtype)
    return Pair(gm, shuffled(gm), (), args, kwargs)


REWRITES: dict[str, Rewrite] = {
    "reordered": reordered,
    "functional": decomposed({}),
    "core aten": decomposed(None),
    "exported again": exported_again,
    "eager / sdpa": eager_to_sdpa,
    "fused": pipeline("fuse_rmsnorm,fuse_rotary,fuse_swiglu,fuse_gate_up,fuse_qkv", "eager"),
    "fused more": pipeline(
        "fuse_rmsnorm,fuse_add_rmsnorm,fuse_qkv,eager_attention_to_sdpa,eliminate_repeat_kv", "eager"
    ),
    "cleaned": pipeline("remove_noops,merge_common,fold_constants,fold_conv_bn"),
}


def shuffled(gm: GraphModule) -> GraphModule:
    """Copy a graph in another topological order."""
    rng = random.Random(len(gm.graph.nodes))
    waiting = list(gm.graph.nodes)
    missing = {n: len(n.all_input_nodes) for n in waiting}
    ready = [n for n in waiting if not missing[n]]
    graph, made = torch.fx.Graph(), {}
    heads = [n for n in ready if n.op == "placeholder"]
    ready = [n for n in ready if n.op != "placeholder"]
    while heads or ready:
        node = heads.pop(0) if heads else ready.pop(rng.randrange(len(ready)))
        if node.op == "output" and (ready or heads):
            ready.append(node)
            continue
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].meta, made[node].name = dict(node.meta), node.name
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    graph._codegen = mutations.fork(gm).graph._codegen
    return GraphModule(gm, graph)


def stripped(gm: GraphModule, level: str) -> GraphModule:
    """Take evidence away: "modules" drops ids; below that all metadata, all names, those of weights too."""
    if level in ("events", "ids"):
        return gm
    out = mutations.fork(gm)
    for i, node in enumerate(out.graph.nodes):
        custom = {k: v for k, v in (node.meta.get("custom") or {}).items() if k != "graphprobe"}
        node.meta = {**node.meta, "custom": custom}
        if level == "modules":
            continue
        node.meta = {k: v for k, v in node.meta.items() if k == "val"}
        if node.op == "call_function":
            node.name = f"n{i}"
        if node.op == "get_attr":
            _rename_weight(out, node, f"weight_no_{i}")  # a name that no model has
    out.recompile()
    return out


def _rename_weight(gm: GraphModule, node: Node, name: str) -> None:
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if isinstance(value, torch.Tensor):
        gm.register_buffer(name, value.detach())
        node.target = name
        node.name = name


def planted(gm: GraphModule, seed: int) -> mutations.Mutant | None:
    """Plant one defect, drawn with `seed`."""
    rng = random.Random(seed)
    for _ in range(20):
        mutant = mutations.draw(gm, rng, benign=False)
        if mutant is not None:
            return mutant
    return None


def pairs(names: Sequence[str], rewrites: Sequence[str]) -> list[tuple[str, str]]:
    """List the combinations of architecture and rewrite."""
    return [(name, rewrite) for name in names for rewrite in rewrites]

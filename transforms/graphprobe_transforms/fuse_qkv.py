"""Three projections of one input become one: a linear with the weights stacked, and a split of its result."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from graphprobe.pipeline import Applied, NotApplied, Outcome
from graphprobe.provenance import module_path
from graphprobe_transforms import graphs
from graphprobe_transforms.graphs import arg, aten, is_call


@dataclass(frozen=True)
class FuseQkv:
    """Fuse the query, key and value projections of attention; `where` is a glob on the attention's module path."""

    where: str = "*"
    name: ClassVar[str] = "fuse_qkv"
    stage: ClassVar[str] = "post_load_fusion"

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        groups = triples(gm, self.where)
        if not groups:
            return NotApplied(f"no three linears share an input in a module that matches {self.where!r}")
        obstacles = {group: obstacle(group) for group in groups}
        fusible = [group for group in groups if not obstacles[group]]
        if not fusible:
            return NotApplied(obstacles[groups[0]], groups[0][0].name)
        paths = tuple(parent(group[0]) for group in fusible)
        graphs.tidy(gm, [node for group in fusible for node in self.fuse(gm, group)])
        return Applied(paths)

    def fuse(self, gm: GraphModule, group: tuple[Node, ...]) -> list[Node]:
        """Replace one group by one linear and a split; return the nodes that stand for the old ones, in their order."""
        first = group[0]
        sources = [arg(node, 1) for node in group]
        path = f"{parent(first)}.qkv_proj".lstrip(".")
        stacked = torch.cat([graphs.weight(gm, w).detach() for w in sources])
        args = [arg(first, 0), graphs.insert_weight(gm, first, f"{path}.weight", stacked, like=sources[0])]
        if len(first.args) > 2:
            biases = [arg(node, 2) for node in group]
            bias = torch.cat([graphs.weight(gm, b).detach() for b in biases])
            args.append(graphs.insert_weight(gm, first, f"{path}.bias", bias, like=biases[0]))
        sizes = [int(graphs.weight(gm, w).shape[0]) for w in sources]
        linear = graphs.insert(first, aten.linear.default, tuple(args), like=first, outer=True)
        split = graphs.insert(first, aten.split_with_sizes.default, (linear, sizes, -1), like=first, outer=True)
        parts = [graphs.insert(first, operator.getitem, (split, i), like=node) for i, node in enumerate(group)]
        for node, part in zip(group, parts, strict=True):
            graphs.replace(node, part)
        return parts


def triples(gm: GraphModule, where: str) -> list[tuple[Node, ...]]:
    """Return the groups of exactly three linears that share their input and the module around them, in graph order."""
    siblings: dict[tuple[Node, str], list[Node]] = {}
    for node in gm.graph.nodes:
        if is_call(node, aten.linear.default) and graphs.is_at(parent(node), where):
            siblings.setdefault((arg(node, 0), parent(node)), []).append(node)
    return [tuple(group) for group in siblings.values() if len(group) == 3]


def obstacle(group: tuple[Node, ...]) -> str:
    """Return why a group cannot be fused, '' if it can."""
    operands = [node.args[1:] for node in group]
    if len({len(o) for o in operands}) > 1:
        return "some of the projections have a bias and some have none"
    nodes = [n for o in operands for n in o]
    if not all(isinstance(n, Node) and n.op == "get_attr" for n in nodes):
        return "a weight or bias is computed, not stored"
    dtypes = {value.dtype for n in nodes if (value := graphs.tensor(n)) is not None}
    if len(dtypes) != 1:
        return "the weights have different or unknown dtypes"
    return ""


def parent(node: Node) -> str:
    """Return the path of the module around the node's own: 'layers.0.self_attn' for one in its q_proj."""
    return module_path(node).rpartition(".")[0]

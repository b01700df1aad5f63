"""Linears that share their input become one linear with the weights stacked, and a split of its result."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from graphprobe.provenance import module_path
from graphprobe_transforms import graphs
from graphprobe_transforms.graphs import arg, aten


def stack(gm: GraphModule, group: tuple[Node, ...], name: str) -> list[Node]:
    """Replace linears on one input by one, whose weight is called `name`; return what stands for them, in order."""
    first = group[0]
    sources = [arg(node, 1) for node in group]
    path = f"{parent(first)}.{name}".lstrip(".")
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


def obstacle(group: tuple[Node, ...]) -> str:
    """Return why a group cannot be stacked, '' if it can."""
    operands = [node.args[1:] for node in group]
    if len({len(o) for o in operands}) > 1:
        return "some of the projections have a bias and some have none"
    nodes = [n for o in operands for n in o]
    if not all(isinstance(n, Node) and n.op == "get_attr" for n in nodes):
        return "a weight or bias is computed, not stored"
    dtypes = {value.dtype for n in nodes if (value := graphs.tensor(n)) is not None}
    if len(dtypes) != 1:
        return "the weights have different or unknown dtypes"
    if any((value := graphs.tensor(arg(node, 1))) is None or value.dim() != 2 for node in group):
        return "a weight is no matrix"
    if any(isinstance(n, Node) and len(_readers(n)) > 1 for n in nodes):
        return "a weight is read elsewhere, too: stacked, it would be stored twice"
    return ""


def _readers(weight: Node) -> list[Node]:
    same = weight.graph.find_nodes(op="get_attr", target=weight.target)
    return [user for node in same for user in graphs.users(node)]


def parent(node: Node) -> str:
    """Return the path of the module around the node's own: 'layers.0.self_attn' for one in its q_proj."""
    return module_path(node).rpartition(".")[0]

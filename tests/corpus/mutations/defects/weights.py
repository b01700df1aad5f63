"""Defects of weights."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from corpus.mutations.graphs import (
    Change,
    alike,
    read,
    weight,
    weight_of,
)  # fmt: skip


def other_weight(kind: str) -> Change:
    def change(gm: GraphModule, node: Node) -> Node | None:
        leaf = weight_of(node)
        value = weight(gm, leaf)
        if leaf is None or value is None or not value.is_floating_point() or value.shape[0] < 4:
            return None
        wrong = _wrong(value.clone(), kind)
        if wrong is None or torch.equal(wrong, value):
            return None
        made = read(gm, node, wrong.contiguous(), "wrong")
        node.replace_input_with(leaf, made)
        return node

    return change


def _wrong(value: torch.Tensor, kind: str) -> torch.Tensor | None:
    row = value.shape[0] // 2
    if kind == "row":
        value[row] = value[row] * 1.05 + 0.01
    elif kind == "row 1%":
        value[row] *= 1.01 if value.dtype == torch.float32 else 1.02
    elif kind == "head":  # a quarter of the rows, in reverse order
        size = value.shape[0] // 4
        value[size : 2 * size] = value[size : 2 * size].flip(0)
    elif kind == "element":
        value[row].view(-1)[value[row].numel() // 3] += 0.05
    elif kind == "transposed":
        return value.t() if value.dim() == 2 and value.shape[0] == value.shape[1] else None
    elif kind == "zero":
        value.zero_()
    elif kind == "rounded":
        return value.to(torch.bfloat16).to(value.dtype) if value.dtype == torch.float32 else None
    return value


def weight_of_another_layer(gm: GraphModule, node: Node) -> Node | None:
    leaf = weight_of(node)
    if leaf is None:
        return None
    for other in gm.graph.nodes:
        other_leaf = weight_of(other)
        if other_leaf is None or other_leaf.target == leaf.target or not alike(other_leaf, leaf):
            continue
        with gm.graph.inserting_before(node):
            made = gm.graph.get_attr(str(other_leaf.target))
        made.meta = dict(other_leaf.meta)
        node.replace_input_with(leaf, made)
        return node
    return None

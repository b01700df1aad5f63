"""Benign rewrites of layouts, and of what is computed when and how often."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from corpus.mutations.graphs import (
    END,
    aten,
    insert,
    insert_before,
    is_float,
    read,
    schema,
    shape,
    substitute,
    tensor,
    weight,
    weight_of,
)  # fmt: skip

Call = Callable[..., Node]


def transpose_twice(gm: GraphModule, node: Node) -> Node | None:
    if not is_float(node) or schema(node) not in ("aten::mul.Tensor", "aten::linear.default"):
        return None
    if len(shape(node)) < 2:
        return None
    return insert(gm, insert(gm, node, aten.transpose.int, -1, -2), aten.transpose.int, -1, -2)


def computed_twice(gm: GraphModule, node: Node) -> Node | None:
    """Compute a value anew for one of its users: rematerialisation."""
    if schema(node) not in ("aten::linear.default", "aten::mul.Tensor", "aten::add.Tensor", "aten::cos.default"):
        return None
    users = [u for u in node.users if u.op == "call_function"]
    if not is_float(node) or len(users) < 2:
        return None
    return insert_before_last_user(gm, node, users[-1])


def insert_before_last_user(gm: GraphModule, node: Node, user: Node) -> Node:
    """Copy a node for one user, without its id."""
    with gm.graph.inserting_before(user):
        copy = gm.graph.node_copy(node)
    copy.meta = {k: v for k, v in node.meta.items() if k != "custom"}
    user.replace_input_with(node, copy)
    return copy


def cat_by_scatter(gm: GraphModule, node: Node) -> Node | None:
    """Write both parts into zeros in place of joining them."""
    if schema(node) != "aten::cat.default" or not is_float(node):
        return None
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else 0
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not isinstance(dim, int):
        return None
    size, whole = shape(parts[0])[dim], list(shape(node))
    dtype = node.meta["val"].dtype

    def build(call: Call) -> Node:
        base = call(aten.zeros.default, whole, dtype=dtype)
        first = call(aten.slice_scatter.default, base, parts[0], dim, 0, size)
        return call(aten.slice_scatter.default, first, parts[1], dim, size, END)

    return substitute(gm, node, build)


def transpose_as_permute(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::transpose.int" or not shape(node):
        return None
    x, i, j = node.args
    order = list(range(len(shape(node))))
    order[i], order[j] = order[j], order[i]  # type: ignore[index]
    return substitute(gm, node, lambda call: call(aten.clone.default, call(aten.permute.default, x, order)))


def heads_folded_into_batch(gm: GraphModule, node: Node) -> Node | None:
    """A batched product of three dimensions for one of four."""
    if schema(node) != "aten::matmul.default" or len(shape(node)) != 4:
        return None
    x, y = node.args
    if len(shape(x)) != 4 or len(shape(y)) != 4 or shape(x)[:2] != shape(y)[:2]:
        return None

    def build(call: Call) -> Node:
        flat = [call(aten.reshape.default, t, [-1, *shape(t)[2:]]) for t in (x, y)]
        return call(aten.reshape.default, call(aten.bmm.default, *flat), list(shape(node)))

    return substitute(gm, node, build)


def embedding_as_index(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::embedding.default":
        return None
    table, index = node.args[:2]
    return substitute(gm, node, lambda call: call(aten.index.Tensor, table, [index]))


def masked_by_where(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::masked_fill.Scalar" or not is_float(node):
        return None
    x, mask, value = node.args
    return substitute(
        gm, node, lambda call: call(aten.where.ScalarOther, call(aten.logical_not.default, mask), x, value)
    )


def constant_ahead(gm: GraphModule, node: Node) -> Node | None:
    """Fold a cast of a weight that is read here: the weight is stored in the other dtype."""
    if schema(node) not in ("aten::to.dtype", "aten::_to_copy.default", "aten::t.default"):
        return None
    value = weight(gm, node.args[0])
    known = tensor(node)
    if value is None or known is None:
        return None
    folded = value.t().contiguous() if schema(node) == "aten::t.default" else value.to(known.dtype)
    made = read(gm, node, folded, "folded")
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)
    return made


def weight_in_float32(gm: GraphModule, node: Node) -> Node | None:
    """Store a 16-bit weight as float32 and cast where it is used."""
    leaf = weight_of(node)
    value = weight(gm, leaf)
    if leaf is None or value is None or value.dtype not in (torch.bfloat16, torch.float16):
        return None
    wide = read(gm, node, value.float(), "wide")
    dtype = value.dtype
    node.replace_input_with(leaf, wide)
    return insert_before(gm, node, wide, aten.to.dtype, dtype)

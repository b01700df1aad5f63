"""Defects of an operation itself: its constants, its precision, another function."""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from corpus.mutations.graphs import (
    Change,
    aten,
    insert,
    is_float,
    schema,
    tensor,
)  # fmt: skip


def scale_constant(factor: float) -> Change:
    def change(gm: GraphModule, node: Node) -> Node | None:
        if not is_float(node) or "dropout" in schema(node):
            return None
        for key, value in node.kwargs.items():
            if isinstance(value, float) and value not in (0.0, 1.0) and key in ("scale", "eps", "alpha"):
                node.kwargs = {**node.kwargs, key: value * factor}
                return node
        for i, value in enumerate(node.args):
            if isinstance(value, float) and math.isfinite(value) and abs(value) < 1e30 and value != 0.0:
                node.args = (*node.args[:i], value * factor, *node.args[i + 1 :])
                return node
        return None

    return change


def epsilon(gm: GraphModule, node: Node) -> Node | None:
    """Take an epsilon ten times as large."""
    if not is_float(node):
        return None
    if isinstance(node.kwargs.get("eps"), float):
        node.kwargs = {**node.kwargs, "eps": node.kwargs["eps"] * 10}  # type: ignore[operator]
        return node
    for i, value in enumerate(node.args):
        if isinstance(value, float) and 0 < value <= 1e-3:
            node.args = (*node.args[:i], value * 10, *node.args[i + 1 :])
            return node
    return None


def exponent(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::pow.Tensor_Scalar" or node.args[1] != 2:
        return None
    node.args = (node.args[0], 3)
    return node


def filled_with_zero(gm: GraphModule, node: Node) -> Node | None:
    """Fill masked scores with zero in place of minus infinity."""
    if schema(node) == "aten::masked_fill.Scalar" and node.args[2] != 0:
        node.args = (*node.args[:2], 0.0)
        return node
    return None


def cast(gm: GraphModule, node: Node) -> Node | None:
    """Round a float32 value to bf16 in between: the same function, too coarse."""
    value = tensor(node)
    if value is None or value.dtype != torch.float32 or value.dim() < 2:
        return None
    if schema(node) not in ("aten::mul.Tensor", "aten::softmax.int", "aten::mean.dim", "aten::linear.default"):
        return None
    low = insert(gm, node, aten.to.dtype, torch.bfloat16)
    insert(gm, low, aten.to.dtype, torch.float32)
    return low


_OTHER = {
    "aten::silu.default": aten.gelu.default,
    "aten::gelu.default": aten.silu.default,
    "aten::cos.default": aten.sin.default,
    "aten::sin.default": aten.cos.default,
    "aten::relu.default": aten.silu.default,
    "aten::tanh.default": aten.sigmoid.default,
    "aten::sigmoid.default": aten.tanh.default,
    "aten::rsqrt.default": aten.reciprocal.default,
    "aten::add.Tensor": aten.sub.Tensor,
    "aten::mul.Tensor": aten.div.Tensor,
    "aten::amax.default": aten.amin.default,
    "aten::exp.default": aten.exp2.default,
    "aten::mean.dim": aten.sum.dim_IntList,
    "aten::softplus.default": aten.relu.default,
    "aten::log.default": aten.log2.default,
}


def other_function(gm: GraphModule, node: Node) -> Node | None:
    target = _OTHER.get(schema(node))
    if target is None or not is_float(node):
        return None
    if schema(node) in ("aten::gelu.default", "aten::softplus.default"):
        node.args, node.kwargs = node.args[:1], {}
    if schema(node) in ("aten::add.Tensor", "aten::mul.Tensor") and not all(is_float(a) for a in node.args[:2]):
        return None
    node.target = target
    return node


def gelu_variant(gm: GraphModule, node: Node) -> Node | None:
    """Take the tanh approximation for the exact GELU, or the other way round."""
    if schema(node) != "aten::gelu.default":
        return None
    given = node.kwargs.get("approximate", "none")
    node.kwargs = {"approximate": "none" if given == "tanh" else "tanh"}
    return node


def smallest(gm: GraphModule, node: Node) -> Node | None:
    """Route to the worst experts in place of the best."""
    if schema(node) != "aten::topk.default":
        return None
    x, k, dim = (*node.args, -1)[:3]
    node.args, node.kwargs = (x, k, dim, False), {}
    return node


def doubled(gm: GraphModule, node: Node) -> Node | None:
    """Add a product to itself: a sum over ranks that is taken twice."""
    if schema(node) not in ("aten::linear.default", "aten::addmm.default", "aten::conv2d.default"):
        return None
    users = list(node.users)
    twice = insert(gm, node, aten.add.Tensor, node)
    twice.args = (node, node)
    for user in users:
        if user is not twice:
            user.replace_input_with(node, twice)
    return twice

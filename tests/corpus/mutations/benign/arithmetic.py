"""Benign rewrites of sums, products of two values, and activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from corpus.mutations.graphs import (
    alike,
    aten,
    insert,
    is_float,
    schema,
    substitute,
)  # fmt: skip

Call = Callable[..., Node]


def commute(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) not in ("aten::add.Tensor", "aten::mul.Tensor") or not all(is_float(a) for a in node.args[:2]):
        return None
    x, y = node.args[:2]
    target: Any = node.target
    return substitute(gm, node, lambda call: call(target, y, x))


def divide_for_multiply(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::mul.Tensor" or not isinstance(node.args[1], float):
        return None
    x, c = node.args
    return substitute(gm, node, lambda call: call(aten.div.Tensor, x, 1.0 / c))  # type: ignore[operator]


def subtract_the_negative(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::add.Tensor" or not all(is_float(a) for a in node.args[:2]) or node.kwargs:
        return None
    x, y = node.args
    return substitute(gm, node, lambda call: call(aten.sub.Tensor, x, call(aten.neg.default, y)))


def square(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::pow.Tensor_Scalar" or node.args[1] != 2:
        return None
    return substitute(gm, node, lambda call: call(aten.mul.Tensor, node.args[0], node.args[0]))


def times_one(gm: GraphModule, node: Node) -> Node | None:
    if not is_float(node) or schema(node) not in ("aten::linear.default", "aten::mul.Tensor", "aten::addmm.default"):
        return None
    return insert(gm, node, aten.mul.Tensor, 1.0)


def scale_before_product(gm: GraphModule, node: Node) -> Node | None:
    """(x y) c becomes (x c) y."""
    product = node.args[0] if node.args else None
    if schema(node) != "aten::mul.Tensor" or not isinstance(node.args[1], float):
        return None
    if schema(product) != "aten::matmul.default" or len(product.users) > 1:  # type: ignore[union-attr]
        return None
    (x, y), c = product.args, node.args[1]  # type: ignore[union-attr]
    return substitute(gm, node, lambda call: call(aten.matmul.default, call(aten.mul.Tensor, x, c), y))


def sum_in_another_order(gm: GraphModule, node: Node) -> Node | None:
    """(a + b) + c becomes a + (b + c)."""
    inner = node.args[0] if node.args else None
    if schema(node) != "aten::add.Tensor" or schema(inner) != "aten::add.Tensor" or node.kwargs or inner.kwargs:  # type: ignore[union-attr]
        return None
    a, b = inner.args  # type: ignore[union-attr]
    c = node.args[1]
    if not all(is_float(t) and alike(t, node) for t in (a, b, c)) or len(inner.users) > 1:  # type: ignore[union-attr]
        return None
    return substitute(gm, node, lambda call: call(aten.add.Tensor, a, call(aten.add.Tensor, b, c)))


def silu_by_hand(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::silu.default":
        return None
    x = node.args[0]
    return substitute(gm, node, lambda call: call(aten.mul.Tensor, x, call(aten.sigmoid.default, x)))


def gelu_by_hand(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::gelu.default":
        return None
    x, dtype = node.args[0], node.meta["val"].dtype
    tanh = node.kwargs.get("approximate") == "tanh"

    def build(call: Call) -> Node:
        high = call(aten.to.dtype, x, torch.float32)
        if tanh:
            cube = call(aten.mul.Tensor, call(aten.pow.Tensor_Scalar, high, 3), 0.044715)
            inner = call(aten.mul.Tensor, call(aten.add.Tensor, high, cube), math.sqrt(2 / math.pi))
            bell = call(aten.tanh.default, inner)
        else:
            bell = call(aten.erf.default, call(aten.mul.Tensor, high, math.sqrt(0.5)))
        half = call(aten.mul.Tensor, call(aten.add.Tensor, bell, 1.0), 0.5)
        return call(aten.to.dtype, call(aten.mul.Tensor, high, half), dtype)

    return substitute(gm, node, build)


def relu_as_clamp(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::relu.default":
        return None
    return substitute(gm, node, lambda call: call(aten.clamp_min.default, node.args[0], 0.0))

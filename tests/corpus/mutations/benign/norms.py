"""Benign rewrites of attention, softmax and norms: written out, in another order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from corpus.mutations.graphs import (
    aten,
    schema,
    shape,
    substitute,
)  # fmt: skip

Call = Callable[..., Node]


def attention_as_math(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::scaled_dot_product_attention.default" or node.kwargs.get("enable_gqa"):
        return None
    query, key, value, *rest = node.args
    mask = rest[0] if rest else node.kwargs.get("attn_mask")
    causal = rest[2] if len(rest) > 2 else node.kwargs.get("is_causal", False)
    size, dtype = shape(query), query.meta["val"].dtype  # type: ignore[union-attr]
    scale = node.kwargs.get("scale") or size[-1] ** -0.5

    def build(call: Call) -> Node:
        score = call(aten.mul.Tensor, call(aten.matmul.default, query, call(aten.transpose.int, key, -1, -2)), scale)
        hidden = None
        if causal:
            ones = call(aten.ones.default, [size[-2], size[-2]], dtype=torch.bool)
            hidden = call(aten.logical_not.default, call(aten.tril.default, ones))
        elif isinstance(mask, Node) and mask.meta["val"].dtype == torch.bool:
            hidden = call(aten.logical_not.default, mask)
        elif mask is not None:
            score = call(aten.add.Tensor, score, mask)
        if hidden is not None:
            score = call(aten.masked_fill.Scalar, score, hidden, -math.inf)
        weights = call(aten.softmax.int, score, -1, torch.float32)
        return call(aten.matmul.default, call(aten.to.dtype, weights, dtype), value)

    return substitute(gm, node, build)


def softmax_by_hand(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::softmax.int":
        return None
    x, dim = node.args[:2]
    dtype = node.meta["val"].dtype

    def build(call: Call) -> Node:
        high = call(aten.to.dtype, x, torch.float32)
        shifted = call(aten.exp.default, call(aten.sub.Tensor, high, call(aten.amax.default, high, [dim], True)))
        total = call(aten.sum.dim_IntList, shifted, [dim], True)
        return call(aten.to.dtype, call(aten.div.Tensor, shifted, total), dtype)

    return substitute(gm, node, build)


def softmax_by_log(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::softmax.int":
        return None
    x, dim = node.args[:2]
    dtype = node.meta["val"].dtype
    return substitute(
        gm,
        node,
        lambda call: call(
            aten.to.dtype, call(aten.exp.default, call(aten.log_softmax.int, x, dim, torch.float32)), dtype
        ),
    )


def layer_norm_by_hand(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::layer_norm.default":
        return None
    x, _shape, gain, bias, eps = (*node.args, None, None, 1e-5)[:5]
    dtype = node.meta["val"].dtype

    def build(call: Call) -> Node:
        high = call(aten.to.dtype, x, torch.float32)
        centred = call(aten.sub.Tensor, high, call(aten.mean.dim, high, [-1], True))
        variance = call(aten.mean.dim, call(aten.pow.Tensor_Scalar, centred, 2), [-1], True)
        y = call(aten.mul.Tensor, centred, call(aten.rsqrt.default, call(aten.add.Tensor, variance, eps)))
        y = call(aten.mul.Tensor, y, gain) if gain is not None else y
        y = call(aten.add.Tensor, y, bias) if bias is not None else y
        return call(aten.to.dtype, y, dtype)

    return substitute(gm, node, build)


def layer_norm_from_moments(gm: GraphModule, node: Node) -> Node | None:
    """native_layer_norm's first result, where layer_norm stood."""
    if schema(node) != "aten::layer_norm.default":
        return None
    x, dims, gain, bias, eps = (*node.args, None, None, 1e-5)[:5]

    def build(call: Call) -> Node:
        import operator

        whole = call(aten.native_layer_norm.default, x, dims, gain, bias, eps)
        return call(operator.getitem, whole, 0)

    return substitute(gm, node, build)


def batch_norm_by_hand(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::batch_norm.default":
        return None
    x, gain, bias, mean, variance, _training, _momentum, eps = node.args[:8]
    wide = [1, -1] + [1] * (len(shape(x)) - 2)

    def build(call: Call) -> Node:
        def spread(t: Any) -> Node:
            return call(aten.reshape.default, t, wide)

        inverse = call(aten.rsqrt.default, call(aten.add.Tensor, spread(variance), eps))
        y = call(aten.mul.Tensor, call(aten.sub.Tensor, x, spread(mean)), inverse)
        return call(aten.add.Tensor, call(aten.mul.Tensor, y, spread(gain)), spread(bias))

    return substitute(gm, node, build)


def rsqrt_by_hand(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::rsqrt.default":
        return None
    return substitute(gm, node, lambda call: call(aten.reciprocal.default, call(aten.sqrt.default, node.args[0])))


def mean_by_sum(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::mean.dim":
        return None
    x, dims, *rest = node.args
    assert isinstance(dims, (list, tuple))
    count = math.prod(shape(x)[d] for d in dims)
    keep = rest[0] if rest else False
    return substitute(
        gm, node, lambda call: call(aten.div.Tensor, call(aten.sum.dim_IntList, x, dims, keep), float(count))
    )

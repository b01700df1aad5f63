"""Benign rewrites: the same function written otherwise. Each is ``(gm, node) -> the node that carries it, or None``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from corpus.mutations.graphs import (
    END, Change, alike, aten, insert, insert_before, is_float, read, schema, shape, substitute, tensor, weight,
    weight_of,
)  # fmt: skip

Call = Callable[..., Node]

# --- arithmetic -------------------------------------------------------------------------------------------------------


def _commute(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) not in ("aten::add.Tensor", "aten::mul.Tensor") or not all(is_float(a) for a in node.args[:2]):
        return None
    x, y = node.args[:2]
    target: Any = node.target
    return substitute(gm, node, lambda call: call(target, y, x))


def _divide_for_multiply(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::mul.Tensor" or not isinstance(node.args[1], float):
        return None
    x, c = node.args
    return substitute(gm, node, lambda call: call(aten.div.Tensor, x, 1.0 / c))  # type: ignore[operator]


def _subtract_the_negative(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::add.Tensor" or not all(is_float(a) for a in node.args[:2]) or node.kwargs:
        return None
    x, y = node.args
    return substitute(gm, node, lambda call: call(aten.sub.Tensor, x, call(aten.neg.default, y)))


def _square(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::pow.Tensor_Scalar" or node.args[1] != 2:
        return None
    return substitute(gm, node, lambda call: call(aten.mul.Tensor, node.args[0], node.args[0]))


def _times_one(gm: GraphModule, node: Node) -> Node | None:
    if not is_float(node) or schema(node) not in ("aten::linear.default", "aten::mul.Tensor", "aten::addmm.default"):
        return None
    return insert(gm, node, aten.mul.Tensor, 1.0)


def _scale_before_product(gm: GraphModule, node: Node) -> Node | None:
    """(x y) c becomes (x c) y."""
    product = node.args[0] if node.args else None
    if schema(node) != "aten::mul.Tensor" or not isinstance(node.args[1], float):
        return None
    if schema(product) != "aten::matmul.default" or len(product.users) > 1:  # type: ignore[union-attr]
        return None
    (x, y), c = product.args, node.args[1]  # type: ignore[union-attr]
    return substitute(gm, node, lambda call: call(aten.matmul.default, call(aten.mul.Tensor, x, c), y))


def _sum_in_another_order(gm: GraphModule, node: Node) -> Node | None:
    """(a + b) + c becomes a + (b + c)."""
    inner = node.args[0] if node.args else None
    if schema(node) != "aten::add.Tensor" or schema(inner) != "aten::add.Tensor" or node.kwargs or inner.kwargs:  # type: ignore[union-attr]
        return None
    a, b = inner.args  # type: ignore[union-attr]
    c = node.args[1]
    if not all(is_float(t) and alike(t, node) for t in (a, b, c)) or len(inner.users) > 1:  # type: ignore[union-attr]
        return None
    return substitute(gm, node, lambda call: call(aten.add.Tensor, a, call(aten.add.Tensor, b, c)))


# --- products ---------------------------------------------------------------------------------------------------------


def _linear(node: Node) -> tuple[Node, Node, Node | None] | None:
    """Return (x, weight, bias) of a linear operation."""
    if schema(node) != "aten::linear.default":
        return None
    x, w, *bias = node.args
    assert isinstance(x, Node) and isinstance(w, Node)
    return x, w, bias[0] if bias and isinstance(bias[0], Node) else None


def _with_bias(call: Call, product: Node, bias: Node | None) -> Node:
    return product if bias is None else call(aten.add.Tensor, product, bias)


def _linear_as_matmul(gm: GraphModule, node: Node) -> Node | None:
    parts = _linear(node)
    if parts is None:
        return None
    x, w, bias = parts
    return substitute(
        gm, node, lambda call: _with_bias(call, call(aten.matmul.default, x, call(aten.t.default, w)), bias)
    )


def _linear_as_einsum(gm: GraphModule, node: Node) -> Node | None:
    parts = _linear(node)
    if parts is None or len(shape(parts[0])) != 3:
        return None
    x, w, bias = parts
    return substitute(gm, node, lambda call: _with_bias(call, call(aten.einsum.default, "bsk,nk->bsn", [x, w]), bias))


def _linear_with_stored_transpose(gm: GraphModule, node: Node) -> Node | None:
    """Keep the weight transposed, as a backend packs it."""
    parts = _linear(node)
    value = weight(gm, parts[1]) if parts is not None else None
    if parts is None or value is None or value.dim() != 2:
        return None
    x, _, bias = parts
    packed = read(gm, node, value.t().contiguous(), "packed")
    return substitute(gm, node, lambda call: _with_bias(call, call(aten.matmul.default, x, packed), bias))


def _split_k(gm: GraphModule, node: Node) -> Node | None:
    """Sum the two halves of the contraction apart: another summation order."""
    parts = _linear(node)
    if parts is None:
        return None
    x, w, bias = parts
    half = shape(x)[-1] // 2

    def build(call: Call) -> Node:
        def part(start: int, end: int) -> Node:
            return call(
                aten.linear.default,
                call(aten.slice.Tensor, x, -1, start, end),
                call(aten.slice.Tensor, w, -1, start, end),
            )

        return _with_bias(call, call(aten.add.Tensor, part(0, half), part(half, END)), bias)

    return substitute(gm, node, build)


def _split_rows(gm: GraphModule, node: Node) -> Node | None:
    """Compute the output channels in two halves, as two ranks would."""
    parts = _linear(node)
    if parts is None or parts[2] is not None:
        return None
    x, w, _ = parts
    half = shape(w)[0] // 2

    def build(call: Call) -> Node:
        upper = call(aten.linear.default, x, call(aten.slice.Tensor, w, 0, 0, half))
        lower = call(aten.linear.default, x, call(aten.slice.Tensor, w, 0, half, END))
        return call(aten.cat.default, [upper, lower], -1)

    return substitute(gm, node, build)


def _in_chunks(gm: GraphModule, node: Node) -> Node | None:
    """Compute the batch in two parts, one after the other."""
    if schema(node) not in ("aten::linear.default", "aten::softmax.int", "aten::gelu.default", "aten::silu.default"):
        return None
    x = node.args[0]
    if len(shape(x)) < 3 or shape(x)[0] != 2:
        return None
    target, rest, named = node.target, node.args[1:], node.kwargs

    def build(call: Call) -> Node:
        halves = [call(aten.slice.Tensor, x, 0, i, i + 1) for i in (0, 1)]
        return call(aten.cat.default, [call(target, half, *rest, **named) for half in halves], 0)

    return substitute(gm, node, build)


def _padded(gm: GraphModule, node: Node) -> Node | None:
    """Pad the output channels to a larger size and cut them off again, as kernels with tiles do."""
    parts = _linear(node)
    value = weight(gm, parts[1]) if parts is not None else None
    if parts is None or value is None or parts[2] is not None:
        return None
    x, _, _ = parts
    wide = read(gm, node, torch.nn.functional.pad(value, (0, 0, 0, 8)), "padded")
    size = value.shape[0]
    return substitute(gm, node, lambda call: call(aten.slice.Tensor, call(aten.linear.default, x, wide), -1, 0, size))


def _joined_projections(gm: GraphModule, node: Node) -> Node | None:
    """Join two projections of one input into one matrix and split its result."""
    parts = _linear(node)
    value = weight(gm, parts[1]) if parts is not None else None
    if parts is None or value is None or parts[2] is not None:
        return None
    x = parts[0]
    for other in x.users:
        theirs = _linear(other) if other is not node else None
        their_value = weight(gm, theirs[1]) if theirs is not None else None
        if theirs is None or their_value is None or theirs[0] is not x or theirs[2] is not None:
            continue
        first, second = (node, other) if _stands_before(gm, node, other) else (other, node)
        sizes = [shape(n)[-1] for n in (first, second)]
        contents = [weight(gm, n.args[1]) for n in (first, second)]
        wide = read(gm, first, torch.cat([c for c in contents if c is not None]), "joined")
        with gm.graph.inserting_before(first):
            joint = gm.graph.call_function(aten.linear.default, (x, wide))
        joint.meta = {k: v for k, v in first.meta.items() if k not in ("custom", "val", "tensor_meta")}
        joint.meta["val"] = torch.ops.aten.linear.default(x.meta["val"], wide.meta["val"])
        made = substitute(gm, first, lambda call: call(aten.slice.Tensor, joint, -1, 0, sizes[0]))  # noqa: B023
        substitute(gm, second, lambda call: call(aten.slice.Tensor, joint, -1, sizes[0], END))  # noqa: B023
        return made
    return None


def _stands_before(gm: GraphModule, x: Node, y: Node) -> bool:
    return next(n for n in gm.graph.nodes if n in (x, y)) is x


def _in_float32(gm: GraphModule, node: Node) -> Node | None:
    """Compute a 16-bit product in float32 and round once."""
    parts = _linear(node)
    value = tensor(node)
    if parts is None or value is None or value.dtype == torch.float32:
        return None
    x, w, bias = parts
    dtype = value.dtype

    def build(call: Call) -> Node:
        wide = [None if t is None else call(aten.to.dtype, t, torch.float32) for t in (x, w, bias)]
        return call(aten.to.dtype, call(aten.linear.default, *(t for t in wide if t is not None)), dtype)

    return substitute(gm, node, build)


def _addmm_as_matmul(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::addmm.default" or node.kwargs:
        return None
    bias, x, w = node.args
    return substitute(gm, node, lambda call: call(aten.add.Tensor, call(aten.mm.default, x, w), bias))


def _conv_as_product(gm: GraphModule, node: Node) -> Node | None:
    """Unfold the patches and multiply."""
    if schema(node) != "aten::conv2d.default":
        return None
    x, w, bias, stride, padding, dilation, groups = (
        *node.args,
        *(None, [1, 1], [0, 0], [1, 1], 1)[len(node.args) - 2 :],
    )
    if groups != 1 or isinstance(padding, str):
        return None
    size = shape(w)

    def build(call: Call) -> Node:
        patches = call(aten.im2col.default, x, list(size[2:]), dilation, padding, stride)
        flat = call(aten.reshape.default, w, [size[0], -1])
        y = call(aten.reshape.default, call(aten.matmul.default, flat, patches), list(shape(node)))
        return y if bias is None else call(aten.add.Tensor, y, call(aten.reshape.default, bias, [-1, 1, 1]))

    return substitute(gm, node, build)


# --- attention, softmax, norms ----------------------------------------------------------------------------------------


def _attention_as_math(gm: GraphModule, node: Node) -> Node | None:
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


def _softmax_by_hand(gm: GraphModule, node: Node) -> Node | None:
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


def _softmax_by_log(gm: GraphModule, node: Node) -> Node | None:
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


def _layer_norm_by_hand(gm: GraphModule, node: Node) -> Node | None:
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


def _layer_norm_from_moments(gm: GraphModule, node: Node) -> Node | None:
    """native_layer_norm's first result, where layer_norm stood."""
    if schema(node) != "aten::layer_norm.default":
        return None
    x, dims, gain, bias, eps = (*node.args, None, None, 1e-5)[:5]

    def build(call: Call) -> Node:
        import operator

        whole = call(aten.native_layer_norm.default, x, dims, gain, bias, eps)
        return call(operator.getitem, whole, 0)

    return substitute(gm, node, build)


def _batch_norm_by_hand(gm: GraphModule, node: Node) -> Node | None:
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


def _rsqrt_by_hand(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::rsqrt.default":
        return None
    return substitute(gm, node, lambda call: call(aten.reciprocal.default, call(aten.sqrt.default, node.args[0])))


def _mean_by_sum(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::mean.dim":
        return None
    x, dims, *rest = node.args
    assert isinstance(dims, (list, tuple))
    count = math.prod(shape(x)[d] for d in dims)
    keep = rest[0] if rest else False
    return substitute(
        gm, node, lambda call: call(aten.div.Tensor, call(aten.sum.dim_IntList, x, dims, keep), float(count))
    )


# --- activations ------------------------------------------------------------------------------------------------------


def _silu_by_hand(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::silu.default":
        return None
    x = node.args[0]
    return substitute(gm, node, lambda call: call(aten.mul.Tensor, x, call(aten.sigmoid.default, x)))


def _gelu_by_hand(gm: GraphModule, node: Node) -> Node | None:
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


def _relu_as_clamp(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::relu.default":
        return None
    return substitute(gm, node, lambda call: call(aten.clamp_min.default, node.args[0], 0.0))


# --- layouts and structure --------------------------------------------------------------------------------------------


def _transpose_twice(gm: GraphModule, node: Node) -> Node | None:
    if not is_float(node) or schema(node) not in ("aten::mul.Tensor", "aten::linear.default"):
        return None
    if len(shape(node)) < 2:
        return None
    return insert(gm, insert(gm, node, aten.transpose.int, -1, -2), aten.transpose.int, -1, -2)


def _computed_twice(gm: GraphModule, node: Node) -> Node | None:
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


def _cat_by_scatter(gm: GraphModule, node: Node) -> Node | None:
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


def _transpose_as_permute(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::transpose.int" or not shape(node):
        return None
    x, i, j = node.args
    order = list(range(len(shape(node))))
    order[i], order[j] = order[j], order[i]  # type: ignore[index]
    return substitute(gm, node, lambda call: call(aten.clone.default, call(aten.permute.default, x, order)))


def _heads_folded_into_batch(gm: GraphModule, node: Node) -> Node | None:
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


def _embedding_as_index(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::embedding.default":
        return None
    table, index = node.args[:2]
    return substitute(gm, node, lambda call: call(aten.index.Tensor, table, [index]))


def _masked_by_where(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::masked_fill.Scalar" or not is_float(node):
        return None
    x, mask, value = node.args
    return substitute(
        gm, node, lambda call: call(aten.where.ScalarOther, call(aten.logical_not.default, mask), x, value)
    )


def _constant_ahead(gm: GraphModule, node: Node) -> Node | None:
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


def _weight_in_float32(gm: GraphModule, node: Node) -> Node | None:
    """Store a 16-bit weight as float32 and cast where it is used."""
    leaf = weight_of(node)
    value = weight(gm, leaf)
    if leaf is None or value is None or value.dtype not in (torch.bfloat16, torch.float16):
        return None
    wide = read(gm, node, value.float(), "wide")
    dtype = value.dtype
    node.replace_input_with(leaf, wide)
    return insert_before(gm, node, wide, aten.to.dtype, dtype)


BENIGN: dict[str, Change] = {
    "commute": _commute,
    "divide for multiply": _divide_for_multiply,
    "subtract the negative": _subtract_the_negative,
    "square": _square,
    "times one": _times_one,
    "scale before product": _scale_before_product,
    "sum in another order": _sum_in_another_order,
    "linear as matmul": _linear_as_matmul,
    "linear as einsum": _linear_as_einsum,
    "linear with stored transpose": _linear_with_stored_transpose,
    "split K": _split_k,
    "split rows": _split_rows,
    "in chunks": _in_chunks,
    "padded": _padded,
    "joined projections": _joined_projections,
    "in float32": _in_float32,
    "addmm as matmul": _addmm_as_matmul,
    "conv as product": _conv_as_product,
    "attention as math": _attention_as_math,
    "softmax by hand": _softmax_by_hand,
    "softmax by log": _softmax_by_log,
    "layer norm by hand": _layer_norm_by_hand,
    "layer norm from moments": _layer_norm_from_moments,
    "batch norm by hand": _batch_norm_by_hand,
    "rsqrt by hand": _rsqrt_by_hand,
    "mean by sum": _mean_by_sum,
    "silu by hand": _silu_by_hand,
    "gelu by hand": _gelu_by_hand,
    "relu as clamp": _relu_as_clamp,
    "transpose twice": _transpose_twice,
    "computed twice": _computed_twice,
    "cat by scatter": _cat_by_scatter,
    "transpose as permute": _transpose_as_permute,
    "heads folded into batch": _heads_folded_into_batch,
    "embedding as index": _embedding_as_index,
    "masked by where": _masked_by_where,
    "constant ahead": _constant_ahead,
    "weight in float32": _weight_in_float32,
}

"""Benign rewrites of products with weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from corpus.mutations.graphs import (
    END,
    aten,
    read,
    schema,
    shape,
    substitute,
    tensor,
    weight,
)  # fmt: skip

Call = Callable[..., Node]


def _linear(node: Node) -> tuple[Node, Node, Node | None] | None:
    """Return (x, weight, bias) of a linear operation."""
    if schema(node) != "aten::linear.default":
        return None
    x, w, *bias = node.args
    assert isinstance(x, Node) and isinstance(w, Node)
    return x, w, bias[0] if bias and isinstance(bias[0], Node) else None


def _with_bias(call: Call, product: Node, bias: Node | None) -> Node:
    return product if bias is None else call(aten.add.Tensor, product, bias)


def linear_as_matmul(gm: GraphModule, node: Node) -> Node | None:
    parts = _linear(node)
    if parts is None:
        return None
    x, w, bias = parts
    return substitute(
        gm, node, lambda call: _with_bias(call, call(aten.matmul.default, x, call(aten.t.default, w)), bias)
    )


def linear_as_einsum(gm: GraphModule, node: Node) -> Node | None:
    parts = _linear(node)
    if parts is None or len(shape(parts[0])) != 3:
        return None
    x, w, bias = parts
    return substitute(gm, node, lambda call: _with_bias(call, call(aten.einsum.default, "bsk,nk->bsn", [x, w]), bias))


def linear_with_stored_transpose(gm: GraphModule, node: Node) -> Node | None:
    """Keep the weight transposed, as a backend packs it."""
    parts = _linear(node)
    value = weight(gm, parts[1]) if parts is not None else None
    if parts is None or value is None or value.dim() != 2:
        return None
    x, _, bias = parts
    packed = read(gm, node, value.t().contiguous(), "packed")
    return substitute(gm, node, lambda call: _with_bias(call, call(aten.matmul.default, x, packed), bias))


def split_k(gm: GraphModule, node: Node) -> Node | None:
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


def split_rows(gm: GraphModule, node: Node) -> Node | None:
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


def in_chunks(gm: GraphModule, node: Node) -> Node | None:
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


def padded(gm: GraphModule, node: Node) -> Node | None:
    """Pad the output channels to a larger size and cut them off again, as kernels with tiles do."""
    parts = _linear(node)
    value = weight(gm, parts[1]) if parts is not None else None
    if parts is None or value is None or parts[2] is not None:
        return None
    x, _, _ = parts
    wide = read(gm, node, torch.nn.functional.pad(value, (0, 0, 0, 8)), "padded")
    size = value.shape[0]
    return substitute(gm, node, lambda call: call(aten.slice.Tensor, call(aten.linear.default, x, wide), -1, 0, size))


def joined_projections(gm: GraphModule, node: Node) -> Node | None:
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


def in_float32(gm: GraphModule, node: Node) -> Node | None:
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


def addmm_as_matmul(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::addmm.default" or node.kwargs:
        return None
    bias, x, w = node.args
    return substitute(gm, node, lambda call: call(aten.add.Tensor, call(aten.mm.default, x, w), bias))


def conv_as_product(gm: GraphModule, node: Node) -> Node | None:
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

"""Defects of what an operation takes: swapped, dropped, twice, another one."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from corpus.mutations.graphs import (
    alike,
    aten,
    earlier,
    is_float,
    schema,
    shape,
    substitute,
)  # fmt: skip


def swap_operands(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) not in ("aten::sub.Tensor", "aten::div.Tensor", "aten::matmul.default", "aten::pow.Tensor_Tensor"):
        return None
    x, y = node.args[:2]
    if not (isinstance(x, Node) and isinstance(y, Node)) or x is y or shape(x) != shape(y):
        return None
    if "matmul" in schema(node) and shape(x)[-1] != shape(x)[-2]:
        return None
    node.args = (y, x, *node.args[2:])
    return node


_DROPPED = (
    "aten::add.Tensor", "aten::mul.Tensor", "aten::neg.default", "aten::silu.default", "aten::gelu.default",
    "aten::relu.default", "aten::tanh.default", "aten::softmax.int", "aten::sub.Tensor", "aten::rsqrt.default",
    "aten::layer_norm.default", "aten::div.Tensor", "aten::sigmoid.default", "aten::softplus.default",
)  # fmt: skip


def _hand_through(gm: GraphModule, node: Node, place: int) -> Node | None:
    source = node.args[place] if len(node.args) > place else None
    if not isinstance(source, Node) or source.op == "get_attr" or not is_float(node) or not alike(source, node):
        return None
    node.replace_all_uses_with(source)
    gm.graph.erase_node(node)
    return source


def drop(gm: GraphModule, node: Node) -> Node | None:
    """Hand the first operand through in place of the result."""
    return _hand_through(gm, node, 0) if schema(node) in _DROPPED else None


def drop_first(gm: GraphModule, node: Node) -> Node | None:
    """Hand the second operand through: a residual that is forgotten."""
    return _hand_through(gm, node, 1) if schema(node) in ("aten::add.Tensor", "aten::mul.Tensor") else None


def operand_twice(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) not in ("aten::add.Tensor", "aten::mul.Tensor", "aten::matmul.default") or not is_float(node):
        return None
    x, y = node.args[:2]
    if not isinstance(x, Node) or x is y or not alike(x, y) or y.op == "get_attr":  # type: ignore[union-attr]
        return None
    if "matmul" in schema(node) and shape(x)[-1] != shape(x)[-2]:
        return None
    node.args = (x, x, *node.args[2:])
    return node


def other_operand(gm: GraphModule, node: Node) -> Node | None:
    """Take another value of the same shape, the nearest one computed before: yesterday's residual."""
    if schema(node) not in ("aten::add.Tensor", "aten::mul.Tensor", "aten::linear.default", "aten::matmul.default"):
        return None
    old = node.args[0]
    if not isinstance(old, Node) or old.op == "get_attr" or not is_float(old):
        return None
    for other in earlier(gm, node):
        if other.op == "call_function" and other not in node.all_input_nodes and alike(other, old):
            if other in old.all_input_nodes and schema(old).split(".")[0] in ("aten::dropout", "aten::contiguous"):
                continue
            node.args = (other, *node.args[1:])
            return node
    return None


def no_bias(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) == "aten::linear.default" and len(node.args) > 2 and node.args[2] is not None:
        node.args = node.args[:2]
        return node
    if schema(node) == "aten::layer_norm.default" and len(node.args) > 3 and isinstance(node.args[3], Node):
        node.args = (*node.args[:3], None, *node.args[4:])
        return node
    if schema(node) == "aten::addmm.default":
        x, w = node.args[1:3]
        return substitute(gm, node, lambda call: call(aten.mm.default, x, w))
    return None


def mask_dropped(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::scaled_dot_product_attention.default":
        return None
    args = list(node.args)
    if len(args) > 3 and isinstance(args[3], Node):
        args[3] = None
        node.args = tuple(args)
        return node
    if isinstance(node.kwargs.get("attn_mask"), Node):
        node.kwargs = {**node.kwargs, "attn_mask": None}
        return node
    if node.kwargs.get("is_causal"):
        node.kwargs = {**node.kwargs, "is_causal": False}
        return node
    if len(args) > 5 and args[5]:
        args[5] = False
        node.args = tuple(args)
        return node
    return None


def keys_for_values(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::scaled_dot_product_attention.default" or not alike(node.args[1], node.args[2]):
        return None
    q, k, v, *rest = node.args
    node.args = (q, v, k, *rest)
    return node

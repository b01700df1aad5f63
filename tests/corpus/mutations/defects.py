"""Defects: one operation is made wrong. Each is ``(gm, node) -> the node that carries it, or None``."""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from corpus.mutations.graphs import (
    END,
    Change,
    alike,
    aten,
    earlier,
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

# --- constants --------------------------------------------------------------------------------------------------------


def _scale_constant(factor: float) -> Change:
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


def _epsilon(gm: GraphModule, node: Node) -> Node | None:
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


def _exponent(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::pow.Tensor_Scalar" or node.args[1] != 2:
        return None
    node.args = (node.args[0], 3)
    return node


def _filled_with_zero(gm: GraphModule, node: Node) -> Node | None:
    """Fill masked scores with zero in place of minus infinity."""
    if schema(node) == "aten::masked_fill.Scalar" and node.args[2] != 0:
        node.args = (*node.args[:2], 0.0)
        return node
    return None


# --- operands ---------------------------------------------------------------------------------------------------------


def _swap_operands(gm: GraphModule, node: Node) -> Node | None:
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


def _drop(gm: GraphModule, node: Node) -> Node | None:
    """Hand the first operand through in place of the result."""
    return _hand_through(gm, node, 0) if schema(node) in _DROPPED else None


def _drop_first(gm: GraphModule, node: Node) -> Node | None:
    """Hand the second operand through: a residual that is forgotten."""
    return _hand_through(gm, node, 1) if schema(node) in ("aten::add.Tensor", "aten::mul.Tensor") else None


def _operand_twice(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) not in ("aten::add.Tensor", "aten::mul.Tensor", "aten::matmul.default") or not is_float(node):
        return None
    x, y = node.args[:2]
    if not isinstance(x, Node) or x is y or not alike(x, y) or y.op == "get_attr":  # type: ignore[union-attr]
        return None
    if "matmul" in schema(node) and shape(x)[-1] != shape(x)[-2]:
        return None
    node.args = (x, x, *node.args[2:])
    return node


def _other_operand(gm: GraphModule, node: Node) -> Node | None:
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


def _no_bias(gm: GraphModule, node: Node) -> Node | None:
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


def _mask_dropped(gm: GraphModule, node: Node) -> Node | None:
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


def _keys_for_values(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::scaled_dot_product_attention.default" or not alike(node.args[1], node.args[2]):
        return None
    q, k, v, *rest = node.args
    node.args = (q, v, k, *rest)
    return node


# --- axes and layouts -------------------------------------------------------------------------------------------------


def _wrong_axis(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) in ("aten::softmax.int", "aten::log_softmax.int", "aten::cumsum.default"):
        dims = shape(node)
        if len(dims) < 2 or (schema(node) != "aten::cumsum.default" and dims[-1] != dims[-2]):
            return None
        node.args = (node.args[0], -2 if node.args[1] in (-1, len(dims) - 1) else -1, *node.args[2:])
        return node
    return None


def _swap_dims(gm: GraphModule, node: Node) -> Node | None:
    """Swap two equal dimensions: heads with tokens where their sizes agree, or rows with columns."""
    if schema(node) not in ("aten::matmul.default", "aten::linear.default", "aten::mul.Tensor") or not is_float(node):
        return None
    dims = shape(node)
    for i in range(1, len(dims)):
        for j in range(i + 1, len(dims)):
            if dims[i] == dims[j] and dims[i] > 1:
                return insert(gm, node, aten.transpose.int, i, j)
    return None


def _view_for_transpose(gm: GraphModule, node: Node) -> Node | None:
    """Reshape where a transposition was meant."""
    if schema(node) not in ("aten::transpose.int", "aten::permute.default") or not is_float(node):
        return None
    dims = shape(node)
    source = node.args[0]
    if len(dims) < 3 or not isinstance(source, Node) or sum(d > 1 for d in dims) < 2 or source.op == "get_attr":
        return None
    node.target, node.args, node.kwargs = aten.reshape.default, (source, list(dims)), {}
    return node


def _reversed_heads(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) not in ("aten::transpose.int", "aten::matmul.default") or not is_float(node):
        return None
    dims = shape(node)
    return insert(gm, node, aten.flip.default, [1]) if len(dims) == 4 and dims[1] > 1 else None


def _repeat_order(gm: GraphModule, node: Node) -> Node | None:
    """Tile shared heads where they should be repeated one by one."""
    if schema(node) not in ("aten::reshape.default", "aten::view.default", "aten::_unsafe_view.default"):
        return None
    source = node.args[0]
    while isinstance(source, Node) and schema(source) in ("aten::clone.default", "aten::contiguous.default"):
        source = source.args[0]
    if not isinstance(source, Node) or schema(source) != "aten::expand.default":
        return None
    wide, narrow = shape(source), shape(source.args[0])
    if len(wide) != 5 or len(narrow) != 5 or wide[2] == narrow[2] or wide[1] < 2:
        return None
    turned = insert_before(gm, node, node.args[0], aten.transpose.int, 1, 2)  # type: ignore[arg-type]
    node.target = aten.reshape.default
    return turned


def _swap_concat(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::cat.default" or not is_float(node):
        return None
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or parts[0] is parts[1]:
        return None
    if shape(parts[0]) != shape(parts[1]):
        return None
    node.args = ([parts[1], parts[0]], *node.args[1:])
    return node


# --- indices ----------------------------------------------------------------------------------------------------------


def _roll(gm: GraphModule, node: Node) -> Node | None:
    """Shift by one along the last dimension: permuted channels."""
    if schema(node) not in ("aten::mul.Tensor", "aten::linear.default", "aten::cat.default", "aten::add.Tensor"):
        return None
    dims = shape(node)
    if not is_float(node) or len(dims) < 2 or dims[-1] < 2:
        return None
    return insert(gm, node, aten.roll.default, [1], [-1])


def _off_by_one_mask(gm: GraphModule, node: Node) -> Node | None:
    table = {
        "aten::le.Tensor": aten.lt.Tensor, "aten::ge.Tensor": aten.gt.Tensor, "aten::gt.Tensor": aten.ge.Tensor,
        "aten::lt.Tensor": aten.le.Tensor,
    }  # fmt: skip
    if schema(node) in ("aten::tril.default", "aten::triu.default"):
        diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
        node.args, node.kwargs = (node.args[0], diagonal + 1), {}  # type: ignore[operator]
        return node
    target = table.get(schema(node))
    if target is None:
        return None
    node.target = target
    return node


def _slice_off_by_one(gm: GraphModule, node: Node) -> Node | None:
    """Begin one element later, or earlier where the source ends."""
    if schema(node) != "aten::slice.Tensor" or tensor(node) is None or tensor(node.args[0]) is None:
        return None
    source, dim, start, _, *step = (*node.args, *(0, 0, END)[len(node.args) - 1 :])[:5]
    size, length = shape(source)[dim], shape(node)[dim]  # type: ignore[index]
    if step not in ([], [1]) or length == size or not isinstance(start, int):
        return None
    start = start + size if start < 0 else start
    moved = start + 1 if start + length < size else start - 1
    node.args = (source, dim, moved, moved + length)
    return node


def _other_half(gm: GraphModule, node: Node) -> Node | None:
    """Take the other half: a rotate-half that takes the same half twice."""
    if schema(node) != "aten::slice.Tensor" or not is_float(node) or len(node.args) < 3:
        return None
    source, dim, start = node.args[:3]
    size, length = shape(source)[dim], shape(node)[dim]  # type: ignore[index]
    if length * 2 != size:
        return None
    node.args = (source, dim, size - length, END) if start == 0 else (source, dim, 0, length)
    return node


def _next_row(gm: GraphModule, node: Node) -> Node | None:
    """Look up positions that are one too large, where the table has room."""
    if schema(node) != "aten::embedding.default":
        return None
    table, index = node.args[:2]
    source = index
    while isinstance(source, Node) and source.op == "call_function" and source.all_input_nodes:
        source = source.all_input_nodes[0]
    if not isinstance(index, Node) or (isinstance(source, Node) and source.op == "placeholder"):
        return None
    if shape(table)[0] <= 2 * shape(index)[-1]:
        return None
    return insert_before(gm, node, index, aten.add.Tensor, 1)


# --- weights ----------------------------------------------------------------------------------------------------------


def _other_weight(kind: str) -> Change:
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


def _weight_of_another_layer(gm: GraphModule, node: Node) -> Node | None:
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


# --- precision --------------------------------------------------------------------------------------------------------


def _cast(gm: GraphModule, node: Node) -> Node | None:
    """Round a float32 value to bf16 in between: the same function, too coarse."""
    value = tensor(node)
    if value is None or value.dtype != torch.float32 or value.dim() < 2:
        return None
    if schema(node) not in ("aten::mul.Tensor", "aten::softmax.int", "aten::mean.dim", "aten::linear.default"):
        return None
    low = insert(gm, node, aten.to.dtype, torch.bfloat16)
    insert(gm, low, aten.to.dtype, torch.float32)
    return low


# --- other functions --------------------------------------------------------------------------------------------------

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


def _other_function(gm: GraphModule, node: Node) -> Node | None:
    target = _OTHER.get(schema(node))
    if target is None or not is_float(node):
        return None
    if schema(node) in ("aten::gelu.default", "aten::softplus.default"):
        node.args, node.kwargs = node.args[:1], {}
    if schema(node) in ("aten::add.Tensor", "aten::mul.Tensor") and not all(is_float(a) for a in node.args[:2]):
        return None
    node.target = target
    return node


def _gelu_variant(gm: GraphModule, node: Node) -> Node | None:
    """Take the tanh approximation for the exact GELU, or the other way round."""
    if schema(node) != "aten::gelu.default":
        return None
    given = node.kwargs.get("approximate", "none")
    node.kwargs = {"approximate": "none" if given == "tanh" else "tanh"}
    return node


def _smallest(gm: GraphModule, node: Node) -> Node | None:
    """Route to the worst experts in place of the best."""
    if schema(node) != "aten::topk.default":
        return None
    x, k, dim = (*node.args, -1)[:3]
    node.args, node.kwargs = (x, k, dim, False), {}
    return node


def _doubled(gm: GraphModule, node: Node) -> Node | None:
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


DEFECTS: dict[str, Change] = {
    "constant 0.1%": _scale_constant(1.001),
    "constant 10%": _scale_constant(1.1),
    "constant sign": _scale_constant(-1.0),
    "epsilon": _epsilon,
    "exponent": _exponent,
    "filled with zero": _filled_with_zero,
    "swap operands": _swap_operands,
    "drop": _drop,
    "drop first": _drop_first,
    "operand twice": _operand_twice,
    "other operand": _other_operand,
    "no bias": _no_bias,
    "mask dropped": _mask_dropped,
    "keys for values": _keys_for_values,
    "wrong axis": _wrong_axis,
    "swap dims": _swap_dims,
    "view for transpose": _view_for_transpose,
    "reversed heads": _reversed_heads,
    "repeat order": _repeat_order,
    "swap concat": _swap_concat,
    "roll": _roll,
    "mask off by one": _off_by_one_mask,
    "slice off by one": _slice_off_by_one,
    "other half": _other_half,
    "next row": _next_row,
    "wrong row": _other_weight("row"),
    "wrong row 1%": _other_weight("row 1%"),
    "wrong head": _other_weight("head"),
    "wrong element": _other_weight("element"),
    "weight transposed": _other_weight("transposed"),
    "weight zero": _other_weight("zero"),
    "weight rounded": _other_weight("rounded"),
    "weight of another layer": _weight_of_another_layer,
    "cast": _cast,
    "other function": _other_function,
    "gelu variant": _gelu_variant,
    "smallest": _smallest,
    "doubled": _doubled,
}

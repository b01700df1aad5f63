"""A generator of graph changes with known truth: one operation of an exported graph is made wrong, or rewritten
benignly. `sites` lists where a change applies, `apply` makes it on a copy of the graph.

Every change is a function ``(gm, node) -> Node | None``: the node that now carries the change (for a dropped operation,
the operand that took its place), or None where it does not apply.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten
Change = Callable[[GraphModule, Node], Node | None]


@dataclass(frozen=True)
class Mutant:
    """One changed graph."""

    gm: GraphModule
    change: str
    nodes: tuple[str, ...]  # the node drawn, and the one that carries the change where that is another
    benign: bool


def fork(gm: GraphModule) -> GraphModule:
    """Copy the graph; the weights stay shared, ids and metadata are kept."""
    graph = torch.fx.Graph()
    made: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].meta = dict(node.meta)
        made[node].name = node.name
    graph._codegen = copy.copy(gm.graph._codegen)
    return GraphModule(gm, graph)


def schema(node: Node) -> str:
    """Return 'aten::add.Tensor' or ''."""
    target = node.target
    if node.op == "call_function" and isinstance(target, torch._ops.OpOverload):
        return f"{target._schema.name}.{target._overloadname}"
    return ""


def is_float(node: object) -> bool:
    """Whether a node makes a floating tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def insert(gm: GraphModule, node: Node, target: Callable[..., object], *args: object, **kwargs: object) -> Node:
    """Insert `target(node, *args)` after a node, for all its users."""
    users = list(node.users)
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(target, (node, *args), kwargs)
    new.meta = {k: v for k, v in node.meta.items() if k != "custom"}
    for user in users:
        user.replace_input_with(node, new)
    return new


def substitute(gm: GraphModule, node: Node, build: Callable[[Callable[..., Node]], Node]) -> Node:
    """Replace a node by what `build(call)` makes; the new nodes carry no id."""
    with gm.graph.inserting_before(node):

        def call(target: Callable[..., object], *args: object, **kwargs: object) -> Node:
            made = gm.graph.call_function(target, args, kwargs)
            made.meta = {k: v for k, v in node.meta.items() if k not in ("custom", "val", "tensor_meta")}
            return made

        new = build(call)
    new.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return new


# --- defects --------------------------------------------------------------------------------------------------------


def _scale_constant(factor: float) -> Change:
    def change(gm: GraphModule, node: Node) -> Node | None:
        if not is_float(node):
            return None
        for key, value in node.kwargs.items():
            if isinstance(value, float) and value not in (0.0, 1.0) and key in ("scale", "eps", "alpha"):
                node.kwargs = {**node.kwargs, key: value * factor}
                return node
        for i, value in enumerate(node.args):
            if isinstance(value, float) and math.isfinite(value) and abs(value) < 1e30 and value != 0.0:
                if "dropout" in schema(node):
                    continue
                node.args = (*node.args[:i], value * factor, *node.args[i + 1 :])
                return node
        return None

    return change


def _swap_operands(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) not in ("aten::sub.Tensor", "aten::div.Tensor", "aten::matmul.default", "aten::pow.Tensor_Tensor"):
        return None
    x, y = node.args[:2]
    if not (isinstance(x, Node) and isinstance(y, Node)) or x is y or x.meta["val"].shape != y.meta["val"].shape:
        return None
    if "matmul" in schema(node) and x.meta["val"].shape[-1] != x.meta["val"].shape[-2]:
        return None
    node.args = (y, x, *node.args[2:])
    return node


def _drop(gm: GraphModule, node: Node) -> Node | None:
    """Hand the first operand through in place of the result."""
    if schema(node) not in (
        "aten::add.Tensor", "aten::mul.Tensor", "aten::neg.default", "aten::silu.default", "aten::gelu.default",
        "aten::relu.default", "aten::tanh.default", "aten::softmax.int", "aten::sub.Tensor", "aten::rsqrt.default",
        "aten::layer_norm.default",
    ):  # fmt: skip
        return None
    source = node.args[0]
    if not is_float(node) or not isinstance(source, Node) or source.op == "get_attr":
        return None
    if source.meta["val"].shape != node.meta["val"].shape or source.meta["val"].dtype != node.meta["val"].dtype:
        return None
    node.replace_all_uses_with(source)
    gm.graph.erase_node(node)
    return source


def _other_function(gm: GraphModule, node: Node) -> Node | None:
    table = {
        "aten::silu.default": aten.gelu.default,
        "aten::gelu.default": aten.silu.default,
        "aten::cos.default": aten.sin.default,
        "aten::sin.default": aten.cos.default,
        "aten::relu.default": aten.silu.default,
        "aten::tanh.default": aten.sigmoid.default,
        "aten::rsqrt.default": aten.reciprocal.default,
        "aten::add.Tensor": aten.sub.Tensor,
        "aten::amax.default": aten.amin.default,
    }
    target = table.get(schema(node))
    if target is None or not is_float(node):
        return None
    if schema(node) == "aten::gelu.default":
        node.args, node.kwargs = node.args[:1], {}
    if schema(node) == "aten::add.Tensor" and not all(is_float(a) for a in node.args[:2]):
        return None
    node.target = target
    return node


def _wrong_axis(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) not in ("aten::softmax.int", "aten::log_softmax.int"):
        return None
    value = node.meta["val"]
    if value.shape[-1] != value.shape[-2]:
        return None
    node.args = (node.args[0], -2, *node.args[2:])
    return node


def _swap_dims(gm: GraphModule, node: Node) -> Node | None:
    """Swap two equal dimensions: heads with tokens where their sizes agree, or rows with columns."""
    if schema(node) not in ("aten::matmul.default", "aten::linear.default", "aten::mul.Tensor") or not is_float(node):
        return None
    shape = node.meta["val"].shape
    for i in range(1, len(shape)):
        for j in range(i + 1, len(shape)):
            if shape[i] == shape[j] and shape[i] > 1:
                return insert(gm, node, aten.transpose.int, i, j)
    return None


def _swap_concat(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::cat.default" or not is_float(node):
        return None
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or parts[0] is parts[1]:
        return None
    if parts[0].meta["val"].shape != parts[1].meta["val"].shape:
        return None
    node.args = ([parts[1], parts[0]], *node.args[1:])
    return node


def _wrong_row(gm: GraphModule, node: Node) -> Node | None:
    """One row of a weight is wrong."""
    if schema(node) not in ("aten::linear.default", "aten::addmm.default", "aten::conv2d.default"):
        return None
    weight = node.args[1] if "addmm" not in schema(node) else node.args[2]
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return None
    value = gm
    for part in str(weight.target).split("."):
        value = getattr(value, part)
    wrong = value.detach().clone()  # type: ignore[operator]
    row = wrong.shape[0] // 2
    wrong[row] = wrong[row] * 1.05 + 0.01
    name = f"wrong_{node.name}"
    gm.register_buffer(name, wrong)
    with gm.graph.inserting_before(node):
        read = gm.graph.get_attr(name)
    read.meta = {"val": weight.meta["val"]}
    node.args = tuple(read if a is weight else a for a in node.args)
    return node


def _roll(gm: GraphModule, node: Node) -> Node | None:
    """Shift by one along the last dimension: an off-by-one slice, permuted channels."""
    if schema(node) not in ("aten::mul.Tensor", "aten::linear.default", "aten::cat.default", "aten::add.Tensor"):
        return None
    if not is_float(node) or node.meta["val"].dim() < 2 or node.meta["val"].shape[-1] < 2:
        return None
    return insert(gm, node, aten.roll.default, [1], [-1])


def _off_by_one_mask(gm: GraphModule, node: Node) -> Node | None:
    table = {"aten::le.Tensor": aten.lt.Tensor, "aten::ge.Tensor": aten.gt.Tensor, "aten::gt.Tensor": aten.ge.Tensor}
    target = table.get(schema(node))
    if target is None:
        return None
    node.target = target
    return node


def _cast(gm: GraphModule, node: Node) -> Node | None:
    """Round a float32 value to bf16 in between: the same function, too coarse."""
    if not is_float(node) or node.meta["val"].dtype != torch.float32 or node.meta["val"].dim() < 2:
        return None
    if schema(node) not in ("aten::mul.Tensor", "aten::softmax.int", "aten::mean.dim", "aten::linear.default"):
        return None
    low = insert(gm, node, aten.to.dtype, torch.bfloat16)
    low.meta["val"] = node.meta["val"].to(torch.bfloat16)
    high = insert(gm, low, aten.to.dtype, torch.float32)
    high.meta["val"] = node.meta["val"]
    return low


def _shift_slice(gm: GraphModule, node: Node) -> Node | None:
    """Take the other half: a rotate-half that takes the same half twice."""
    if schema(node) != "aten::slice.Tensor" or not is_float(node):
        return None
    source, dim, start, _end = (*node.args, None, None)[:4]
    assert isinstance(source, Node)
    size = source.meta["val"].shape[dim]
    length = node.meta["val"].shape[dim]
    if length * 2 != size or start is None:
        return None
    node.args = (source, dim, size - length, 9223372036854775807) if start == 0 else (source, dim, 0, length)
    return node


DEFECTS: dict[str, Change] = {
    "constant 0.1%": _scale_constant(1.001),
    "constant 10%": _scale_constant(1.1),
    "constant sign": _scale_constant(-1.0),
    "swap operands": _swap_operands,
    "drop": _drop,
    "other function": _other_function,
    "wrong axis": _wrong_axis,
    "swap dims": _swap_dims,
    "swap concat": _swap_concat,
    "wrong row": _wrong_row,
    "roll": _roll,
    "mask off by one": _off_by_one_mask,
    "cast": _cast,
    "other half": _shift_slice,
}

# --- benign rewrites ------------------------------------------------------------------------------------------------


def _commute(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) not in ("aten::add.Tensor", "aten::mul.Tensor") or not all(is_float(a) for a in node.args[:2]):
        return None
    x, y = node.args[:2]
    return substitute(gm, node, lambda call: call(node.target, y, x))  # type: ignore[arg-type]


def _split_scale(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::mul.Tensor" or not isinstance(node.args[1], float):
        return None
    x, c = node.args
    return substitute(gm, node, lambda call: call(aten.div.Tensor, x, 1.0 / c))  # type: ignore[operator]


def _linear_as_matmul(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::linear.default":
        return None
    x, weight, *bias = node.args

    def build(call: Callable[..., Node]) -> Node:
        product = call(aten.matmul.default, x, call(aten.t.default, weight))
        return call(aten.add.Tensor, product, bias[0]) if bias and bias[0] is not None else product

    return substitute(gm, node, build)


def _split_k(gm: GraphModule, node: Node) -> Node | None:
    """Sum the two halves of the contraction apart: another summation order."""
    if schema(node) != "aten::linear.default":
        return None
    x, weight, *bias = node.args
    assert isinstance(x, Node)
    half = x.meta["val"].shape[-1] // 2

    def build(call: Callable[..., Node]) -> Node:
        def part(start: int, end: int) -> Node:
            return call(
                aten.linear.default,
                call(aten.slice.Tensor, x, -1, start, end),
                call(aten.slice.Tensor, weight, -1, start, end),
            )

        total = call(aten.add.Tensor, part(0, half), part(half, 9223372036854775807))
        return call(aten.add.Tensor, total, bias[0]) if bias and bias[0] is not None else total

    return substitute(gm, node, build)


def _attention_as_math(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::scaled_dot_product_attention.default":
        return None
    query, key, value, *rest = node.args
    mask = rest[0] if rest else node.kwargs.get("attn_mask")
    causal = rest[2] if len(rest) > 2 else node.kwargs.get("is_causal", False)
    assert isinstance(query, Node)
    size = query.meta["val"].shape
    scale = node.kwargs.get("scale") or size[-1] ** -0.5
    if node.kwargs.get("enable_gqa"):
        return None

    def build(call: Callable[..., Node]) -> Node:
        score = call(aten.mul.Tensor, call(aten.matmul.default, query, call(aten.transpose.int, key, -1, -2)), scale)
        if causal:
            ones = call(aten.ones.default, [size[-2], size[-2]], dtype=torch.bool)
            score = call(
                aten.masked_fill.Scalar, score, call(aten.logical_not.default, call(aten.tril.default, ones)), -math.inf
            )
        elif isinstance(mask, Node) and mask.meta["val"].dtype == torch.bool:
            score = call(aten.masked_fill.Scalar, score, call(aten.logical_not.default, mask), -math.inf)
        elif mask is not None:
            score = call(aten.add.Tensor, score, mask)
        weights = call(aten.softmax.int, score, -1, torch.float32)
        return call(aten.matmul.default, call(aten.to.dtype, weights, query.meta["val"].dtype), value)

    return substitute(gm, node, build)


def _softmax_by_hand(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::softmax.int":
        return None
    x, dim = node.args[:2]
    dtype = node.meta["val"].dtype

    def build(call: Callable[..., Node]) -> Node:
        high = call(aten.to.dtype, x, torch.float32)
        shifted = call(aten.exp.default, call(aten.sub.Tensor, high, call(aten.amax.default, high, [dim], True)))
        return call(
            aten.to.dtype, call(aten.div.Tensor, shifted, call(aten.sum.dim_IntList, shifted, [dim], True)), dtype
        )

    return substitute(gm, node, build)


def _rsqrt_by_hand(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::rsqrt.default":
        return None
    return substitute(gm, node, lambda call: call(aten.reciprocal.default, call(aten.sqrt.default, node.args[0])))


def _square(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::pow.Tensor_Scalar" or node.args[1] != 2:
        return None
    return substitute(gm, node, lambda call: call(aten.mul.Tensor, node.args[0], node.args[0]))


def _silu_by_hand(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::silu.default":
        return None
    x = node.args[0]
    return substitute(gm, node, lambda call: call(aten.mul.Tensor, x, call(aten.sigmoid.default, x)))


def _mean_by_sum(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::mean.dim":
        return None
    x, dims, *rest = node.args
    assert isinstance(x, Node) and isinstance(dims, (list, tuple))
    count = math.prod(x.meta["val"].shape[d] for d in dims)
    keep = rest[0] if rest else False
    return substitute(
        gm, node, lambda call: call(aten.div.Tensor, call(aten.sum.dim_IntList, x, dims, keep), float(count))
    )


def _transpose_twice(gm: GraphModule, node: Node) -> Node | None:
    if not is_float(node) or schema(node) not in ("aten::mul.Tensor", "aten::linear.default"):
        return None
    if node.meta["val"].dim() < 2:
        return None
    there = insert(gm, node, aten.transpose.int, -1, -2)
    there.meta.pop("val", None)
    there.meta["val"] = node.meta["val"].transpose(-1, -2)
    back = insert(gm, there, aten.transpose.int, -1, -2)
    back.meta["val"] = node.meta["val"]
    return back


def _layer_norm_by_hand(gm: GraphModule, node: Node) -> Node | None:
    if schema(node) != "aten::layer_norm.default":
        return None
    x, _shape, weight, bias, eps = (*node.args, None, None, 1e-5)[:5]

    def build(call: Callable[..., Node]) -> Node:
        centred = call(aten.sub.Tensor, x, call(aten.mean.dim, x, [-1], True))
        variance = call(aten.mean.dim, call(aten.pow.Tensor_Scalar, centred, 2), [-1], True)
        y = call(aten.mul.Tensor, centred, call(aten.rsqrt.default, call(aten.add.Tensor, variance, eps)))
        y = call(aten.mul.Tensor, y, weight) if weight is not None else y
        return call(aten.add.Tensor, y, bias) if bias is not None else y

    return substitute(gm, node, build)


BENIGN: dict[str, Change] = {
    "commute": _commute,
    "divide for multiply": _split_scale,
    "linear as matmul": _linear_as_matmul,
    "split K": _split_k,
    "attention as math": _attention_as_math,
    "softmax by hand": _softmax_by_hand,
    "rsqrt by hand": _rsqrt_by_hand,
    "square": _square,
    "silu by hand": _silu_by_hand,
    "mean by sum": _mean_by_sum,
    "transpose twice": _transpose_twice,
    "layer norm by hand": _layer_norm_by_hand,
}

# --- drawing --------------------------------------------------------------------------------------------------------


def draw(gm: GraphModule, rng: random.Random, benign: bool) -> Mutant | None:
    """Draw a kind of change, then a place for it; None where the drawn kind applies nowhere."""
    table = BENIGN if benign else DEFECTS
    kind = rng.choice(list(table))
    live = reaching(gm)
    names = [n.name for n in gm.graph.nodes if n.op == "call_function" and n in live]
    rng.shuffle(names)
    copied = fork(gm)
    by_name = {n.name: n for n in copied.graph.nodes}
    for name in names:
        made = table[kind](copied, by_name[name])
        if made is not None:
            copied.graph.lint()
            copied.recompile()
            carries = made.name if made.name not in by_name else name
            return Mutant(copied, kind, tuple(dict.fromkeys((name, carries))), benign)
    return None


def reaching(gm: GraphModule) -> set[Node]:
    """Return the nodes that reach an output."""
    output = next(n for n in gm.graph.nodes if n.op == "output")
    found, stack = set(), list(output.all_input_nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def strip(gm: GraphModule, level: str) -> GraphModule:
    """Take evidence away: "ids" keeps all, "modules" drops ids, "values" drops all metadata and every name."""
    out = fork(gm)
    for i, node in enumerate(out.graph.nodes):
        if level != "ids":
            node.meta.pop("custom", None)
        if level == "values":
            node.meta = {k: v for k, v in node.meta.items() if k == "val"}
            if node.op == "call_function":
                node.name = f"n{i}"
    out.recompile()
    return out

"""Expressions: what a node computes of its operands, written so that two ways to write one thing read alike."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.steps import EXPANDS, FLATS, Step, argument, count

Expression = tuple[Any, ...]  # (name, constants, *children); a child is an expression or the index of an operand

_UNSAID = {
    "dtype",
    "layout",
    "device",
    "pin_memory",
    "memory_format",
    "non_blocking",
    "copy",
    "implicit",
    "half_to_float",
}
_FULLS = {"zeros": 0.0, "ones": 1.0, "zeros_like": 0.0, "ones_like": 1.0, "new_zeros": 0.0, "new_ones": 1.0}
_NAMES = {"_softmax": "softmax", "__and__": "bitwise_and", "__or__": "bitwise_or", "square": "pow", "clip": "clamp"}
#: Operators whose first output is what the operator on the right returns.
_FIRST_OF = {
    "aten::native_layer_norm": "layer_norm",
    "aten::max_pool2d_with_indices": "max_pool2d",
    "aten::_native_batch_norm_legit_no_training": "batch_norm",
}


@dataclass(frozen=True)
class Term:
    """One node: a step from its only operand, or an expression over several."""

    operands: tuple[Node, ...]
    step: Step | None = None
    expression: Expression = ()


def expressed(node: Node) -> Term:
    """Return the expression of a node that makes values."""
    name = nodes.schema_name(node)
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return _output_of(node)
    rule = _RULES.get(name.removeprefix("aten::")) if name.startswith("aten::") else None
    found = rule(node) if rule else None
    return found if found is not None else _plain(node)


def _plain(node: Node) -> Term:
    """An operator with its constants by name, defaults and dtypes left out, dimensions counted from the end."""
    target, operands, constants = node.target, [], []
    name = nodes.schema_name(node).removeprefix("aten::")
    name = _NAMES.get(name, name.rstrip("_") or name) if name else provenance.target_name(node)
    rank = next((len(s) for n in node.all_input_nodes if (s := nodes.shape(n)) is not None), None)

    def show(value: Any, what: str) -> Any:
        if isinstance(value, Node):
            operands.append(value)
            return "#"
        if isinstance(value, (list, tuple)):
            return tuple(show(v, what) for v in value)
        if isinstance(value, dict):
            return tuple((k, show(v, what)) for k, v in sorted(value.items()))
        if type(value) is int and value >= 0 and what in ("dim", "dims") and rank:
            value -= rank
        return number(value)

    for what, value, default in _named(target, node):
        if isinstance(value, Node) and not operands:
            operands.append(value)
        elif what not in _UNSAID and (isinstance(value, Node) or value != default):
            constants.append((what, show(value, what)))
    if name in ("slice", "select", "view", "reshape", "expand"):  # a view that could not be read: its shape tells it
        constants.append(("shape", nodes.shape(node)))
    return Term(tuple(operands), None, (name, tuple(constants), *range(len(operands))))


def _named(target: Any, node: Node) -> list[tuple[str, Any, Any]]:
    if not isinstance(target, torch._ops.OpOverload):
        out = [(str(i), value, None) for i, value in enumerate(node.args)]
        return out + [(k, v, None) for k, v in sorted(node.kwargs.items())]
    out = []
    for i, one in enumerate(target._schema.arguments):
        if i < len(node.args):
            out.append((one.name, node.args[i], one.default_value))
        elif one.name in node.kwargs:
            out.append((one.name, node.kwargs[one.name], one.default_value))
    return out


def number(value: Any) -> Any:
    """Return a constant in one form: 2 and 2.0 are the same number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return repr(value)
    return float(value)


def _binary(node: Node) -> Term | None:
    """add, sub, mul, div: over tensors or with a number; `alpha` and `rounding_mode` stay constants."""
    name = nodes.schema_name(node).removeprefix("aten::").rstrip("_")
    x, y = argument(node, 0, "self"), argument(node, 1, "other")
    extra = tuple(
        (k, number(v))
        for k, v in (("alpha", argument(node, 2, "alpha", 1)), ("mode", node.kwargs.get("rounding_mode")))
        if v not in (1, None)
    )
    if name == "rsub":
        name, x, y = "sub", y, x
    if isinstance(x, Node) and isinstance(y, Node):
        return Term((x, y), None, (name, extra, 0, 1))
    if isinstance(x, Node):
        if name == "div" and not extra and isinstance(y, (int, float)) and y:
            name, y = "mul", 1.0 / y
        return Term((x,), None, (name, extra, 0, _constant(y)))
    return Term((y,), None, (name, extra, _constant(x), 0)) if isinstance(y, Node) else None


def _constant(value: Any) -> Expression:
    return ("constant", f"{value:.9g}" if isinstance(value, (int, float)) else repr(value))


def _power(node: Node) -> Term | None:
    x = node.args[0]
    if not isinstance(x, Node) or (len(node.args) > 1 and node.args[1] not in (2, 2.0)):
        return None
    return Term((x,), None, ("mul", (), 0, 0))


def _matrices(node: Node) -> Term | None:
    """mm, bmm, matmul, addmm, linear: a product of the last two dimensions, and maybe a sum."""
    name = nodes.schema_name(node).removeprefix("aten::")
    args: list[Any] = list(node.args)
    if name in ("addmm", "baddbmm"):
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1 or not isinstance(args[0], Node):
            return None
        return Term((args[1], _unspread(args[2]), args[0]), None, ("add", (), ("mm", (), 0, 1), 2))
    if name != "linear":
        return Term((args[0], _unspread(args[1])), None, ("mm", (), 0, 1))
    shape = nodes.shape(args[1]) if isinstance(args[1], Node) else None
    if shape is None:
        return None
    turned = ("turned", ("perm", shape, (1, 0)), 1) if len(shape) == 2 else 1
    product = ("mm", (), 0, turned)
    bias = argument(node, 2, "bias")
    return (
        Term((args[0], args[1], bias), None, ("add", (), product, 2))
        if bias is not None
        else Term((args[0], args[1]), None, product)
    )


def _unspread(matrix: Node) -> Node:
    """Step over what repeats one matrix for every batch: a product does that by itself."""
    node, last = matrix, (nodes.shape(matrix) or ())[-2:]
    while nodes.is_view(node) and (shape := nodes.shape(node.all_input_nodes[0])) is not None and shape[-2:] == last:
        if nodes.schema_name(node).removesuffix("_copy") not in FLATS | EXPANDS:
            break
        node = node.all_input_nodes[0]
        if len(shape) == 2:
            return node
    return matrix


def _silu(node: Node) -> Term | None:
    return Term((node.args[0],), None, ("mul", (), 0, ("sigmoid", (), 0))) if isinstance(node.args[0], Node) else None


def _rms_norm(node: Node) -> Term | None:
    """x rsqrt(mean(x^2) + eps) w; an eps of None depends on the dtype and stays a name."""
    x, shape, weight, eps = (*node.args, None, None)[:4]
    if not isinstance(x, Node) or not isinstance(shape, (list, tuple)) or len(shape) != 1:
        return None
    mean = ("mean", (("dim", (-1.0,)), ("keepdim", "True")), ("mul", (), 0, 0))
    inverse = ("rsqrt", (), ("add", (), mean, _constant(eps)))
    scaled = ("mul", (), 0, inverse)
    return Term((x, weight), None, ("mul", (), scaled, 1)) if isinstance(weight, Node) else Term((x,), None, scaled)


def _full(node: Node) -> Term | None:
    name = nodes.schema_name(node).removeprefix("aten::")
    shape = nodes.shape(node)
    value = _FULLS.get(name, argument(node, {"scalar_tensor": 0, "new_full": 2}.get(name, 1), "fill_value"))
    if shape is None or not isinstance(value, (int, float, bool)):
        return None
    return Term((), None, ("full", (count(shape), float(value))))


def _arange(node: Node) -> Term | None:
    numbers = [a for a in node.args if isinstance(a, (int, float))]
    if len(numbers) != len(node.args) or not numbers:
        return None
    start, stop, step = (0, numbers[0], 1) if len(numbers) == 1 else (*numbers, 1)[:3]
    return Term((), None, ("arange", (float(start), float(stop), float(step))))


def _convolution(node: Node) -> Term | None:
    shape = nodes.shape(node)
    if shape is None or not isinstance(node.args[0], Node):
        return None
    space = len(shape) - 2
    names = ("stride", "padding", "dilation")
    if nodes.schema_name(node) == "aten::convolution":
        stride, padding, dilation, turned, _, groups = node.args[3:9]
        if turned:
            return None
    else:
        stride, padding, dilation = (
            argument(node, 3 + i, n, d) for i, (n, d) in enumerate(zip(names, (1, 0, 1), strict=True))
        )
        groups = argument(node, 6, "groups", 1)
    spread = tuple(
        tuple(v) if isinstance(v, (list, tuple)) and len(v) == space else (_one(v),) * space
        for v in (stride, padding, dilation)
    )
    operands = tuple(a for a in node.args[:3] if isinstance(a, Node))
    return Term(operands, None, ("convolution", (repr(spread), groups), *range(len(operands))))


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and value else value


def _output_of(node: Node) -> Term:
    source, index = node.args
    assert isinstance(source, Node)
    first = _FIRST_OF.get(nodes.schema_name(source))
    if first is not None and index == 0:
        return _first_output(source, first)
    return Term((source,), None, ("getitem", (number(index),), 0))


def _first_output(source: Node, name: str) -> Term:
    operands = tuple(a for a in source.args if isinstance(a, Node))
    return Term(operands, None, (name, (), *range(len(operands))))


def _normed(node: Node) -> Term | None:
    name = nodes.schema_name(node).removeprefix("aten::")
    operands = tuple(a for a in node.args if isinstance(a, Node))
    return Term(operands, None, (name, (), *range(len(operands))))


_RULES: dict[str, Callable[[Node], Term | None]] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "rsub", "add_", "sub_", "mul_", "div_"), _binary),
    **dict.fromkeys(("pow", "square"), _power),
    **dict.fromkeys(("mm", "bmm", "matmul", "addmm", "baddbmm", "linear"), _matrices),
    **dict.fromkeys((*_FULLS, "full", "full_like", "new_full", "scalar_tensor"), _full),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("layer_norm", "max_pool2d", "batch_norm"), _normed),
    "silu": _silu,
    "rms_norm": _rms_norm,
    "arange": _arange,
}

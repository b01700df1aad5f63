"""Terms: what a node computes, written so that two ways to write one thing read alike.

`Terms` reads a program once. Every node becomes a *step* (it only re-arranges its operand: a view, a part, a cast) or
an *expression* over operands. `Numbers` then gives equal things one number, across both programs: the number of a
value stands for its elements in flat order, whatever shape they are shown in. Casts among floating dtypes and dropout
outside training do not change a number; `linear`, `addmm` and `matmul` with a transposed weight are one expression.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.program import Program

Step = tuple[Any, ...]  # () keeps the flat order; else ("perm" | "part" | "expand", shape before, ...)
Expression = tuple[Any, ...]  # (name, constants, *children); a child is an expression or the index of an operand

FLAT: Step = ()
CASTS = {
    "aten::to", "aten::_to_copy", "aten::type_as", "aten::float", "aten::half", "aten::bfloat16", "aten::double",
    "prims::convert_element_type",
}  # fmt: skip
_COMMUTE = {"add", "mul", "maximum", "minimum", "bitwise_and", "bitwise_or", "logical_and", "logical_or", "eq", "ne"}
_PERMUTES = {"aten::permute", "aten::transpose", "aten::t", "aten::numpy_T", "aten::mT", "aten::swapaxes"}
_SPLITS = {"aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unbind", "aten::tensor_split"}
_CUTS = {"aten::slice", "aten::select", "aten::narrow"}
_EXPANDS = {"aten::expand", "aten::expand_as", "aten::broadcast_to"}
_FLAT = CASTS | {
    f"aten::{name}"
    for name in (
        "view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "unsqueeze", "squeeze", "clone",
        "contiguous", "alias", "detach", "lift_fresh", "view_as", "reshape_as", "ravel",
    )
} | {"prims::device_put"}  # fmt: skip
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


class Terms:
    """The terms of one program, in graph order. Inputs and weights have none: they are leaves."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.of: dict[Node, Term] = {}
        for node in program.live:
            if node.op not in ("placeholder", "get_attr"):
                self.of[node] = _term(node, program)

    def root(self, node: Node) -> tuple[Node, tuple[Step, ...]]:
        """Follow steps upwards: the node that made the values, and the steps from there that move them."""
        steps: list[Step] = []
        while (term := self.of.get(node)) is not None and term.step is not None:
            if term.step:
                steps.append(term.step)
            node = term.operands[0]
        out: tuple[Step, ...] = ()
        for step in reversed(steps):
            out = _joined(out, step)
        return node, out


class Numbers:
    """Gives equal expressions over equal numbers one number. Shared by both programs."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}
        self._arranged: dict[int, tuple[int, tuple[Step, ...]]] = {}  # number -> (of which number, steps)
        self._stepped: dict[tuple[int, Step], int] = {}

    def of(self, key: Any) -> int:
        """Return the number of a key; a new one for a key that was never met."""
        return self._known.setdefault(key, len(self._known))

    def expression(self, expression: Expression, operands: Sequence[int]) -> int:
        """Return the number of an expression over numbered operands."""
        name, constants, *children = expression
        numbers = [operands[c] if type(c) is int else self.expression(c, operands) for c in children]
        if name == "turned":
            return self.step(numbers[0], constants)
        if name in _COMMUTE:
            numbers.sort()
        return self.of((name, constants, *numbers))

    def step(self, number: int, step: Step) -> int:
        """Return the number of a value that is re-arranged by one step."""
        if not step:
            return number
        known = self._stepped.get((number, step))
        if known is None:
            root, steps = self._arranged.get(number, (number, ()))
            steps = _joined(steps, step)
            known = self.of(("step", root, steps)) if steps else root
            if steps:
                self._arranged[known] = (root, steps)
            self._stepped[number, step] = known
        return known


def _joined(steps: tuple[Step, ...], step: Step) -> tuple[Step, ...]:
    """Append a step; two permutations of one shape become one, and none where they undo each other."""
    if steps and step[0] == "perm" and steps[-1][0] == "perm":
        _, shape, first = steps[-1]
        _, now, second = step
        if tuple(shape[d] for d in first) == now:
            both = tuple(first[d] for d in second)
            return steps[:-1] if _keeps_order(shape, both) else (*steps[:-1], ("perm", shape, both))
    return (*steps, step)


def _keeps_order(shape: Sequence[Any], order: Sequence[int]) -> bool:
    moved = [d for d in order if shape[d] != 1]
    return moved == sorted(moved)


def is_cast(node: Node) -> bool:
    """Whether the node casts a floating tensor to another floating dtype of at least 16 bits."""
    if nodes.schema_name(node) not in CASTS or not node.all_input_nodes:
        return False
    mine, theirs = nodes.tensor_val(node), nodes.tensor_val(node.all_input_nodes[0])
    return (
        mine is not None
        and theirs is not None
        and mine.dtype != theirs.dtype
        and all(t.dtype.is_floating_point and t.dtype.itemsize > 1 for t in (mine, theirs))
    )


# --- one node ---------------------------------------------------------------------------------------------------


def _term(node: Node, program: Program) -> Term:
    step = _step(node)
    if step is not None:
        source = node.all_input_nodes[0]
        if node.target is operator.getitem:  # of a split: a part of what was split
            source = source.all_input_nodes[0]
        return Term((source,), step)
    if node in program.seeds:  # what is drawn equals what the other side draws with the same seed
        return Term(
            tuple(node.all_input_nodes), None, ("random", program.seeds[node], *range(len(node.all_input_nodes)))
        )
    name = nodes.schema_name(node)
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return _output_of(node)
    rule = _RULES.get(name.removeprefix("aten::")) if name.startswith("aten::") else None
    found = rule(node) if rule else None
    return found if found is not None else _plain(node)


def _step(node: Node) -> Step | None:
    """Return how a node re-arranges its operand, None where it makes values."""
    name = nodes.schema_name(node)
    if node.target is operator.getitem:
        return _split_part(node)
    if not name or not node.args or not isinstance(node.args[0], Node):
        return None
    if is_cast(node) or (name in ("aten::dropout", "aten::native_dropout") and not nodes.is_random(node)):
        return FLAT if nodes.tensor_val(node) is not None else None
    if not nodes.is_view(node) or nodes.tensor_val(node) is None:
        return None
    mine, theirs = nodes.shape(node), nodes.shape(node.args[0])
    if theirs is None or mine is None:
        return None
    if name in _PERMUTES:
        return _permuted(node, theirs)
    if name in _CUTS:
        return _cut(node, theirs)
    if name in _EXPANDS:
        padded = (1,) * (len(mine) - len(theirs)) + tuple(theirs)
        return FLAT if padded == mine else ("expand", padded, mine)
    return FLAT if name.removesuffix("_copy") in _FLAT and _same_bits(node) and _count(mine) == _count(theirs) else None


def _same_bits(node: Node) -> bool:
    return not any(isinstance(a, torch.dtype) for a in node.args) or nodes.schema_name(node) in CASTS


def _count(shape: Sequence[Any]) -> Any:
    out: Any = 1
    for d in shape:
        out = out * d if isinstance(d, int) and isinstance(out, int) else (out, d)
    return out


def _permuted(node: Node, shape: tuple[Any, ...]) -> Step:
    rank, name = len(shape), nodes.schema_name(node)
    if name == "aten::permute":
        order = tuple(int(d) % rank for d in _argument(node, 1, "dims"))
    else:
        order_ = list(range(rank))
        if name in ("aten::transpose", "aten::swapaxes"):
            i, j = int(_argument(node, 1, "dim0")) % rank, int(_argument(node, 2, "dim1")) % rank
        else:
            i, j = (rank - 2, rank - 1) if rank >= 2 else (0, 0)
        if name == "aten::numpy_T":
            order_.reverse()
        elif rank >= 2:
            order_[i], order_[j] = order_[j], order_[i]
        order = tuple(order_)
    return FLAT if _keeps_order(shape, order) else ("perm", tuple(shape), order)


def _cut(node: Node, shape: tuple[Any, ...]) -> Step | None:
    name = nodes.schema_name(node)
    dim = int(_argument(node, 1, "dim", 0)) % len(shape)
    size = shape[dim]
    if not isinstance(size, int):
        return None
    start = _argument(node, 2, {"aten::select": "index"}.get(name, "start"), 0) or 0
    length = _argument(node, 3, {"aten::narrow": "length"}.get(name, "end"), None)
    stride = _argument(node, 4, "step", 1) if name == "aten::slice" else 1
    if not isinstance(start, int) or not isinstance(stride, int) or not isinstance(length, (int, type(None))):
        return None
    start = max(0, start + size) if start < 0 else min(start, size)
    if name == "aten::select":
        stop = start + 1
    elif name == "aten::narrow":
        stop = start + (length or 0)
    else:
        stop = size if length is None else min(length, size) if length >= 0 else size + length
    return part(shape, dim, start, stop, stride)


def part(shape: tuple[Any, ...], dim: int, start: int, stop: int, stride: int = 1) -> Step:
    """Return the step that keeps elements `start` to `stop` of one dimension."""
    if (start, stop, stride) == (0, shape[dim], 1):
        return FLAT
    return ("part", tuple(shape), dim - len(shape), start, stop, stride)


def _split_part(node: Node) -> Step | None:
    source, index = node.args[0], node.args[1]
    if not isinstance(source, Node) or nodes.schema_name(source) not in _SPLITS or not isinstance(index, int):
        return None
    shape = nodes.shape(source.args[0]) if isinstance(source.args[0], Node) else None
    if shape is None:
        return None
    dim = int(_argument(source, 1 if "unbind" in nodes.schema_name(source) else 2, "dim", 0)) % len(shape)
    parts = source.meta.get("val")
    if not isinstance(parts, (list, tuple)) or not all(isinstance(v, torch.Tensor) for v in parts):
        return None
    index %= len(parts)
    if nodes.schema_name(source) == "aten::unbind":
        return part(shape, dim, index, index + 1)
    ends = list(accumulate(int(v.shape[dim]) for v in parts))
    return part(shape, dim, ends[index - 1] if index else 0, ends[index])


def _argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


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
    arguments = target._schema.arguments
    out = []
    for i, argument in enumerate(arguments):
        if i < len(node.args):
            out.append((argument.name, node.args[i], argument.default_value))
        elif argument.name in node.kwargs:
            out.append((argument.name, node.kwargs[argument.name], argument.default_value))
    return out


def number(value: Any) -> Any:
    """Return a constant in one form: 2 and 2.0 are the same number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return repr(value)
    return float(value)


# --- expressions ------------------------------------------------------------------------------------------------


def _binary(node: Node) -> Term | None:
    """add, sub, mul, div: over tensors or with a number; `alpha` and `rounding_mode` stay constants."""
    name = nodes.schema_name(node).removeprefix("aten::").rstrip("_")
    x, y = _argument(node, 0, "self"), _argument(node, 1, "other")
    extra = tuple(
        (k, number(v))
        for k, v in (("alpha", _argument(node, 2, "alpha", 1)), ("mode", node.kwargs.get("rounding_mode")))
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
    bias = _argument(node, 2, "bias")
    return (
        Term((args[0], args[1], bias), None, ("add", (), product, 2))
        if bias is not None
        else Term((args[0], args[1]), None, product)
    )


def _unspread(matrix: Node) -> Node:
    """Step over what repeats one matrix for every batch: a product does that by itself."""
    node, last = matrix, (nodes.shape(matrix) or ())[-2:]
    while nodes.is_view(node) and (shape := nodes.shape(node.all_input_nodes[0])) is not None and shape[-2:] == last:
        if nodes.schema_name(node).removesuffix("_copy") not in _FLAT | _EXPANDS:
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
    value = _FULLS.get(name, _argument(node, {"scalar_tensor": 0, "new_full": 2}.get(name, 1), "fill_value"))
    if shape is None or not isinstance(value, (int, float, bool)):
        return None
    return Term((), None, ("full", (_count(shape), float(value))))


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
            _argument(node, 3 + i, n, d) for i, (n, d) in enumerate(zip(names, (1, 0, 1), strict=True))
        )
        groups = _argument(node, 6, "groups", 1)
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

"""Exact arithmetic: how one node is evaluated with rounding removed.

Every floating dtype inside is raised to float64 (complex to complex128). Casts among floating dtypes become casts to
float64; casts to 8-bit-or-smaller and to integer types stay, because there they *are* the computation. Numeric
constants are never rewritten; defaults that depend on a dtype are filled in from the native one.

A rule takes ``(node, args, kwargs)``, the arguments lifted already, and returns ``(target, args, kwargs)``. The table
`RULES` is keyed by schema name. `NATIVE` holds what has no float64 meaning: there the native lane's value is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._decomp
from torch.fx import Node

from graphprobe import nodes, quantizers
from graphprobe.errors import InputError
from graphprobe.execute import target_of, zeroed
from graphprobe.lanes import references
from graphprobe.lanes.measure import triton_works

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
Rule = Callable[[Node, tuple[Any, ...], dict[str, Any]], Call]

LIFTED = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
#: Operators that turned out to have no float64 kernel and are evaluated by their decomposition.
DECOMPOSED: set[str] = set()
#: Operators on bit patterns: float64 bits are other bits. Their value is taken from the native lane.
NATIVE = {"aten::view.dtype", "aten::frexp", "aten::nextafter", "aten::_local_scalar_dense", "aten::item"}


def lift(value: Any) -> Any:
    """Raise a floating tensor to float64, a complex one to complex128; 8-bit floats and all else stay."""
    if not isinstance(value, torch.Tensor) or value.dtype not in LIFTED:
        return value
    if value.is_cuda and not value.is_complex() and triton_works():
        from graphprobe.lanes.fused.lifting import lifted  # late: Triton is not installed everywhere

        return lifted(value)
    return value.to(LIFTED[value.dtype])


def lift_dtype(value: Any) -> Any:
    """Return float64 for a floating dtype wider than 8 bits, also inside lists; anything else unchanged."""
    # by hand: a pytree walk over every argument of every node is a third of the time it takes to build a probe graph
    if isinstance(value, torch.dtype):
        return LIFTED.get(value, value)
    return type(value)(lift_dtype(v) for v in value) if type(value) in (list, tuple) else value


def lifted_call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return what evaluates the node exactly, given its lifted arguments."""
    from graphprobe.lanes import control  # bodies hold nodes, which are lifted here

    if control.is_control(node):
        return control.CONTROL[node.target._name], args, kwargs  # type: ignore[union-attr]
    return RULES.get(nodes.schema_name(node), _plain)(node, args, kwargs)


def exact_rule(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a float64 reference for an operator: ``@graphprobe.exact_rule(torch.ops.mine.fused)``.

    `op` is an operator, one of its overloads, or its name "mine::fused". The decorated function takes the operator's
    own arguments, floating tensors raised to float64, and returns what the operator returns, computed by its
    definition. The last registration of an operator counts. Raises InputError where `op` is no operator.
    """
    if isinstance(op, torch._ops.OpOverload):
        name = op._schema.name
    elif isinstance(op, torch._ops.OpOverloadPacket):
        name = op._qualified_op_name
    else:
        name = op
    if not isinstance(name, str) or "::" not in name:
        raise InputError(
            f"exact_rule({op!r}): give an operator as in torch.ops.mine.fused, or its name as in 'mine::fused'"
        )

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        RULES[name] = Reference(reference)
        return reference

    return register


def learn_decomposition(node: Node) -> bool:
    """Evaluate an operator whose kernel refused float64 by its decomposition from now on; False where it has none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.name in RULES:
        return False
    found = torch._decomp.get_decompositions([target]).get(target)
    if found is None:
        return False
    DECOMPOSED.add(target._schema.name)
    RULES[target._schema.name] = _decomposed(found)
    return True


def takes_native(node: Node) -> bool:
    """Whether the exact lanes take the native lane's value for this node."""
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        full = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        if full == "aten::view.dtype" and _has_native_bits(node.args[0]):
            return False
        return full in NATIVE or schema.name in NATIVE or nodes.is_random(node)
    return False


def _has_native_bits(operand: object) -> bool:
    """Whether the exact lanes hold an operand in its native dtype: codes, integers and masks are never lifted."""
    value = nodes.tensor_val(operand) if isinstance(operand, Node) else None
    return value is not None and value.dtype not in LIFTED


def _view_as(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    def viewed(x: torch.Tensor, dtype: torch.dtype) -> Any:
        return lift(x.view(dtype))

    return viewed, args, kwargs


#: Operators that choose or move numbers and never round one: noise has no place in their results.
UNROUNDED = {
    f"aten::{name}"
    for name in (
        "round", "floor", "ceil", "trunc", "sign", "abs", "neg", "relu", "clamp", "clamp_min", "clamp_max", "clip",
        "hardtanh", "minimum", "maximum", "max", "min", "amax", "amin", "where", "masked_fill", "to", "_to_copy", "cat",
        "stack", "index", "index_select", "index_put", "gather", "scatter", "embedding", "sort", "topk", "tril", "triu",
        "repeat", "repeat_interleave", "roll", "flip", "full", "zeros", "ones", "arange", "pad", "constant_pad_nd",
        "max_pool2d", "nan_to_num", "cummax", "copy", "fill", "scalar_tensor", "tensor", "histc", "bincount",
    )
} | {"prims::convert_element_type"}  # fmt: skip
_ROUNDINGS = {"aten::round", "aten::floor", "aten::ceil", "aten::trunc", "aten::sign", "aten::fix"}


def decides(node: Node) -> bool:
    """Whether the node takes a decision: its result jumps where its operands pass a bound (codes, indices, masks)."""
    if node.op != "call_function" or nodes.is_view(node):
        return False
    if nodes.schema_name(node) in _ROUNDINGS or nodes.schema_name(node) in quantizers.FAKE_QUANTIZERS:
        return True
    value = nodes.tensor_val(node)
    return value is not None and value.dtype not in LIFTED and value.dtype not in (torch.float64, torch.complex128)


#: Gathers: only the rows that are read need lifting, not a table of 128,256 rows.
GATHERS = {"aten::embedding", "aten::index_select", "aten::gather"}


def lifts_late(node: Node) -> Node | None:
    """Return the weight that is gathered before it is lifted, or None."""
    if nodes.schema_name(node) in GATHERS and isinstance(node.args[0], Node) and node.args[0].op == "get_attr":
        return node.args[0]
    return None


def _plain(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return target_of(node), tuple(lift_dtype(a) for a in args), {k: lift_dtype(v) for k, v in kwargs.items()}


def _view(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    as_dtype = len(args) == 2 and isinstance(args[1], torch.dtype)
    return _view_as(node, args, kwargs) if as_dtype else _plain(node, args, kwargs)


def _factory(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    # without a dtype the default would be float32, and 0.1 would be rounded to it
    target, args, kwargs = _plain(node, args, kwargs)
    value = nodes.tensor_val(node)
    if kwargs.get("dtype") is None and value is not None and value.dtype in LIFTED:
        kwargs = {**kwargs, "dtype": LIFTED[value.dtype]}
    return target, args, kwargs


def _undefined(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    target, args, kwargs = _factory(node, args, kwargs)
    return zeroed, (target, *args), kwargs


def _fill_eps(position: int) -> Rule:
    def rule(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        target, args, kwargs = _plain(node, args, kwargs)
        given = args[position] if len(args) > position else kwargs.get("eps")
        if given is None:
            kwargs = {**{k: v for k, v in kwargs.items() if k != "eps"}, "eps": _native_eps(node)}
            args = args[:position]
        return target, args, kwargs

    return rule


def _fused_rms_norm(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    _, args, kwargs = _fill_eps(3)(node, args, kwargs)
    return references.fused_rms_norm, args, kwargs


def _native_eps(node: Node) -> float:
    # ATen computes 16-bit norms in float32 and takes that type's epsilon
    source = node.all_input_nodes[0]
    value = nodes.tensor_val(source)
    dtype = value.dtype if value is not None else torch.float32
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _no_half_to_float(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    target, args, kwargs = _plain(node, args, kwargs)
    return target, (*args[:2], False), {}


SOFTMAXES = {"aten::softmax", "aten::_softmax", "aten::_safe_softmax", "aten::log_softmax", "aten::_log_softmax"}
NEAR = 6  # operations between a mask and the softmax it is meant for: casts, views, a maximum


def _sum(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Add; where a mask swallows its score natively, so it does here (only asked of sums that a softmax reads)."""
    target, args, kwargs = _plain(node, args, kwargs)
    value = nodes.tensor_val(node)
    if kwargs or len(args) != 2 or value is None or value.dtype not in LIFTED or not feeds_softmax(node):
        return target, args, kwargs
    return references.masked_sum, (*args, value.dtype), {}


def feeds_softmax(node: Node) -> bool:
    """Whether a softmax reads what a node computes, a few operations further down."""
    level = [node]
    for _ in range(NEAR):
        level = [user for one in level for user in one.users][:NEAR]
        if any(nodes.schema_name(n) in SOFTMAXES or nodes.schema_name(n) == "aten::exp" for n in level):
            return True
    return False


@dataclass(frozen=True)
class Reference:
    """The rule for a kernel without a float64 form: it is replaced by its definition."""

    make: Callable[..., Any]

    def __call__(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return the definition, and the operator's own arguments."""
        return self.make, args, kwargs


def _decomposed(make: Callable[..., Any]) -> Rule:
    def rule(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return make, *_plain(node, args, kwargs)[1:]

    return rule


_FACTORIES = (
    "full", "zeros", "ones", "arange", "linspace", "logspace", "eye", "scalar_tensor", "tensor",
    "hann_window", "hamming_window", "range",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **{f"aten::{name}": _factory for name in _FACTORIES},
    **dict.fromkeys(nodes.UNDEFINED, _undefined),
    "aten::view": _view,
    "aten::add": _sum,
    "aten::rms_norm": _fill_eps(3),
    "aten::_fused_rms_norm": _fused_rms_norm,
    "aten::_softmax": _no_half_to_float,
    "aten::_log_softmax": _no_half_to_float,
    "aten::_safe_softmax": _plain,
    "aten::scaled_dot_product_attention": Reference(references.scaled_dot_product_attention),
    "aten::_scaled_dot_product_flash_attention": Reference(references.flash),
    "aten::_scaled_dot_product_flash_attention_for_cpu": Reference(references.flash),
    "aten::_scaled_dot_product_efficient_attention": Reference(references.efficient),
    "aten::_scaled_dot_product_cudnn_attention": Reference(references.cudnn),
    "aten::_grouped_mm": Reference(references.grouped_mm),
    "aten::_scaled_mm": Reference(references.scaled_mm),
    "aten::_int_mm": Reference(references.int_mm),
    "aten::_weight_int8pack_mm": Reference(references.weight_int8pack_mm),
    "aten::_weight_int4pack_mm": Reference(references.weight_int4pack_mm(torch.ops.aten._weight_int4pack_mm)),
    "aten::_weight_int4pack_mm_for_cpu": Reference(
        references.weight_int4pack_mm(torch.ops.aten._weight_int4pack_mm_for_cpu)
    ),
    **quantizers.RULES,
}

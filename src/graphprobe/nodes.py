"""Questions about one FX node: does it make values, is it a view, what shape has it?"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

#: Operators whose schema says "may alias" although they make new values when the dtype changes.
_CASTS = {"aten::to", "aten::_to_copy", "aten::type_as", "aten::float", "aten::half", "aten::bfloat16", "aten::double"}
#: Operators that copy memory without changing a value: as good as a view for a comparison of values.
_COPIES = {
    "aten::contiguous",
    "aten::clone",
    "aten::reshape",
    "aten::_unsafe_view",
    "aten::_reshape_alias",
    "aten::alias",
    "aten::lift_fresh",
    "aten::lift_fresh_copy",
    "aten::detach",
    "aten::detach_copy",
    "aten::flatten",
    "aten::dropout_",
    "prims::device_put",
}
#: Operators that draw random numbers.
_RANDOM = {
    "aten::rand", "aten::randn", "aten::randint", "aten::randperm", "aten::rand_like", "aten::randn_like",
    "aten::randint_like", "aten::bernoulli", "aten::dropout", "aten::native_dropout", "aten::multinomial",
    "aten::normal", "aten::uniform", "aten::exponential", "aten::feature_dropout", "aten::alpha_dropout",
}  # fmt: skip
#: Operators that reserve memory and say nothing about what is in it.
UNDEFINED = {
    "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided",
    "aten::empty_permuted",
}  # fmt: skip
#: Marks the nodes that alignment put into a copy of a graph: they show a value in the other side's layout or slice.
INSERTED = "graphprobe_view"
PART = "graphprobe_part"  # marks one of several slices of a node
ORDER = "graphprobe_order"  # of an inserted index_select: the dimension, and in which order it is shown
_COPY_SUFFIX = ("_copy",)  # view_copy, permute_copy, ...: views written out
_CHECKS = (
    "_assert",
    "sym_constrain",
    "_functional_assert",
    "_guards_fn",
    "_print",
    "_async_assert",
    "_functional_sym",
    "_log_api",
)


def val(node: Node) -> Any:
    """Return ``meta["val"]``, or None."""
    return node.meta.get("val")


def tensor_val(node: Node) -> torch.Tensor | None:
    """Return the node's fake tensor, or None where it is no tensor or is unknown."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def schema_name(node: Node) -> str:
    """Return 'aten::add' for an operator, '' for anything else."""
    target = node.target
    return _facts(target).name if isinstance(target, torch._ops.OpOverload) else ""


def argument(node: Node, name: str) -> Any:
    """Return an operand by its name in the operator's schema; None where it is not given."""
    if name in node.kwargs:
        return node.kwargs[name]
    if isinstance(node.target, torch._ops.OpOverload):
        for given, argument in zip(node.args, node.target._schema.arguments, strict=False):
            if argument.name == name:
                return given
    return None


def returns_nothing(node: Node) -> bool:
    """Whether the node is an assertion, a guard or another operator without a result."""
    if node.op == "call_module":
        return str(node.target).startswith("_guards")
    if node.op != "call_function":
        return node.op == "output"
    if isinstance(node.target, torch._ops.OpOverload):
        return _facts(node.target).returns_nothing
    return _name(node.target).startswith(_CHECKS)


class _Facts(NamedTuple):
    """What an operator's schema says, whatever its arguments."""

    name: str
    returns_nothing: bool
    is_view: bool
    casts: bool  # a view where the dtype stays
    undefined: bool
    in_flight: bool


#: By id, for an operator's own hash is a Python function; the operator is kept, so that its id stays its own.
_FACTS: dict[int, tuple[torch._ops.OpOverload, _Facts]] = {}


def _facts(target: torch._ops.OpOverload) -> _Facts:
    found = _FACTS.get(id(target))
    if found is None:
        found = _FACTS[id(target)] = (target, _read_facts(target))
    return found[1]


def _read_facts(target: torch._ops.OpOverload) -> _Facts:
    schema = target._schema
    written_out = schema.name.startswith("aten::") and schema.name.endswith(_COPY_SUFFIX)
    aliases = any(r.alias_info is not None for r in schema.returns)
    return _Facts(
        schema.name,
        not schema.returns or _name(target).startswith(_CHECKS),
        not schema.is_mutable and (schema.name in _COPIES or written_out or aliases),
        not schema.is_mutable and schema.name in _CASTS,
        schema.name in UNDEFINED,
        schema.name.startswith("_c10d_functional::") and not schema.name.endswith("::wait_tensor"),
    )


def is_in_flight(node: Node) -> bool:
    """Whether the node starts a collective: what it returns holds nothing yet, until ``wait_tensor`` returns it."""
    return isinstance(node.target, torch._ops.OpOverload) and _facts(node.target).in_flight


def _name(target: Any) -> str:
    name: str = getattr(target, "__name__", "") or str(target)
    return name


def is_mutating(node: Node) -> bool:
    """Whether the operator writes into one of its inputs."""
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    return (
        node.target is operator.setitem
        or node.target in (operator.iadd, operator.imul, operator.isub)
        or (node.op == "call_function" and name.endswith("_") and not name.endswith("__"))
    )


def is_view(node: Node) -> bool:
    """Whether the node only re-arranges values another node has made (copies in memory included)."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    facts = _facts(node.target)
    if facts.casts:
        return _same_dtype_as_input(node)
    return facts.is_view or bool(node.meta.get(INSERTED))


def shown(node: Node) -> Node:
    """Return what the views that alignment has inserted show: the graph's own node."""
    while INSERTED in node.meta and node.all_input_nodes:
        node = node.all_input_nodes[-1 if node.target is torch.ops.aten.index_copy.default else 0]
    return node


def same_dtype(x: Node, y: Node) -> bool:
    """Whether two nodes are known to hold tensors of one dtype."""
    mine, theirs = tensor_val(x), tensor_val(y)
    return mine is not None and theirs is not None and mine.dtype == theirs.dtype


def _same_dtype_as_input(node: Node) -> bool:
    return bool(node.all_input_nodes) and same_dtype(node, node.all_input_nodes[0])


def makes_values(node: Node) -> bool:
    """Whether the node computes tensor values of its own: what is tapped, claimed and counted.

    ``getitem`` on a multi-output operator counts in place of the operator; a missing ``val`` counts as a tensor.
    """
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):  # nearly all, asked often
        facts = _facts(node.target)
        view = _same_dtype_as_input(node) if facts.casts else facts.is_view or INSERTED in node.meta
        none = facts.returns_nothing or facts.undefined or facts.in_flight
        return not (none or view) and _may_be_tensor(node)
    if node.op not in ("call_function", "call_method", "call_module") or returns_nothing(node):
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        of_values = isinstance(source, Node) and not is_view(source) and not is_in_flight(source)
        return of_values and _may_be_tensor(node)
    if is_view(node):
        return False
    return _may_be_tensor(node)


def _may_be_tensor(node: Node) -> bool:
    return "val" not in node.meta or isinstance(node.meta["val"], torch.Tensor)


def narrowest_dtype(node: Node) -> torch.dtype:
    """Return the dtype with the smallest largest number that a node's value was cast to on its way; as far as known."""
    found = torch.float64
    while True:
        value = tensor_val(node)
        if value is not None:
            if not value.dtype.is_floating_point:
                return value.dtype if found is torch.float64 else found
            found = min(found, value.dtype, key=lambda dtype: torch.finfo(dtype).max)
        name = schema_name(node)
        if not (is_view(node) or name in _CASTS or name == "prims::convert_element_type") or not node.all_input_nodes:
            return found
        node = node.all_input_nodes[0]


def is_undefined(node: Node) -> bool:
    """Whether the node's result is memory nobody has written yet."""
    return isinstance(node.target, torch._ops.OpOverload) and _facts(node.target).undefined


def is_random(node: Node) -> bool:
    """Whether the node draws random numbers (dropout outside training does not)."""
    name = schema_name(node)
    if name in ("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout"):
        return len(node.args) > 2 and node.args[2] is True
    if name == "aten::scaled_dot_product_attention":
        chance = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return not isinstance(chance, (int, float)) or chance != 0.0
    if name == "aten::native_dropout":
        return len(node.args) > 2 and node.args[2] is not False
    return name in _RANDOM


def shape(node: Node) -> tuple[int | str, ...] | None:
    """Return the node's shape, symbolic dimensions as strings; None where it is no tensor."""
    value = tensor_val(node)
    return None if value is None else tuple([d if isinstance(d, int) else str(d) for d in value.shape])


def fixed(node: Node) -> tuple[int, ...]:
    """Return the shape of a node whose shape is known in numbers; () where it is no tensor."""
    return tuple(int(d) for d in shape(node) or ())


def is_fixed(node: Node) -> bool:
    """Whether the node's shape is known, in numbers, and has any."""
    return all(isinstance(d, int) for d in shape(node) or ("?",))


def elements(node: Node) -> int | str | None:
    """Return how many elements the node has, as a string where that is symbolic; None where it is no tensor."""
    value = tensor_val(node)
    if value is None:
        return None
    count = value.numel()
    return count if isinstance(count, int) else str(count)


def dtype_name(dtype: torch.dtype) -> str:
    """Return 'bfloat16' for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")

"""A GraphModule becomes a GraphView: what pictures, reports and people need of a graph, without torch."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphprobe import nodes, provenance
from graphprobe.errors import InputError
from graphprobe.records import GraphView, NodeView

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
#: Functions that enter or leave a mode, and have no value worth recording.
_MODES = ("_vmap_", "_enter_autocast", "_exit_autocast", "_set_grad_enabled", "lazy_load_decompositions")
_LONGEST = 200  # characters of argument text


def view(gm: GraphModule, name: str = "") -> GraphView:
    """Describe every node of a graph; symbolic dimensions become strings such as "s77". Raises InputError."""
    if not isinstance(gm, GraphModule):
        raise InputError(f"view takes a GraphModule, not a {type(gm).__name__}: graphprobe.capture or load gives one")
    return GraphView(name=name, nodes=tuple(_node_view(gm, node) for node in gm.graph.nodes))


def _node_view(gm: GraphModule, node: Node) -> NodeView:
    value = nodes.tensor_val(node)
    found = provenance.node_id(node)
    return NodeView(
        name=node.name,
        op=node.op,
        target=_ADDRESS.sub("", provenance.target_name(node)),
        inputs=tuple(source.name for source in node.all_input_nodes),
        args=arguments(node),
        module_path=provenance.module_path(node),
        module_type=provenance.module_type(node),
        shape=nodes.shape(node),
        dtype=None if value is None else nodes.dtype_name(value.dtype),
        source=provenance.source(node),
        has_val=not lacks_val(gm, node),
        is_view=nodes.is_view(node),
        id=f"{found[0]}:{found[1]}" if found else "",
    )


def lacks_val(gm: GraphModule, node: Node) -> bool:
    """Whether ``meta["val"]`` is missing, or None, on a node that has a value.

    Outputs, guards, operators without a result and attributes that are modules have none and lack none. A key with the
    value None counts as missing on an operator whose schema returns a tensor: moving a graph between devices can turn
    "missing" into "None".
    """
    if node.meta.get("val") is not None or not _has_value(gm, node):
        return False
    return "val" not in node.meta or _must_be_tensor(node)


def _has_value(gm: GraphModule, node: Node) -> bool:
    if node.op == "output" or nodes.returns_nothing(node) or getattr(node.target, "returns_nothing", False):
        return False
    if node.op == "call_function" and getattr(node.target, "__name__", "").startswith(_MODES):
        return False
    if node.op == "get_attr":
        return not isinstance(_attribute(gm, str(node.target)), torch.nn.Module)
    return True


def _must_be_tensor(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op == "placeholder":
        return any(not nodes.returns_nothing(user) and user.op != "output" for user in node.users)
    target = node.target
    return not isinstance(target, torch._ops.OpOverload) or any("Tensor" in str(r.type) for r in target._schema.returns)


def _attribute(gm: torch.nn.Module, target: str) -> Any:
    found: Any = gm
    for part in target.split("."):
        found = getattr(found, part, None)
    return found


def arguments(node: Node) -> str:
    """Return the node's arguments as short text: ``(%x, 0.125, [1, 2], dim=-1)``."""
    parts = [_text(arg) for arg in node.args] + [f"{key}={_text(arg)}" for key, arg in node.kwargs.items()]
    return _shortened(f"({', '.join(parts)})")


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + "...)"


def _text(arg: Any) -> str:
    if isinstance(arg, Node):
        return f"%{arg.name}"
    if isinstance(arg, tuple):
        inner = ", ".join(_text(part) for part in arg)
        return f"({inner},)" if len(arg) == 1 else f"({inner})"
    if isinstance(arg, list):
        return f"[{', '.join(_text(part) for part in arg)}]"
    if isinstance(arg, dict):
        return "{" + ", ".join(f"{key}: {_text(part)}" for key, part in arg.items()) + "}"
    if isinstance(arg, slice):
        bounds = (arg.start, arg.stop) if arg.step is None else (arg.start, arg.stop, arg.step)
        return ":".join("" if part is None else _text(part) for part in bounds)
    if isinstance(arg, (torch.dtype, torch.layout, torch.memory_format)):
        return str(arg).removeprefix("torch.")
    if isinstance(arg, torch.device):
        return str(arg)
    if isinstance(arg, torch.Tensor):
        return f"tensor{list(arg.shape)}"
    return _ADDRESS.sub("", repr(arg) if isinstance(arg, (str, float, int)) else str(arg))

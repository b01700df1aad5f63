"""Where a node came from: ids, module paths, source lines. The one place that knows the keys of ``node.meta``.

An id is ``(lineage, index)``: the lineage is a uuid drawn at capture, the index counts the nodes of that capture.
It lives in ``node.meta["custom"]["graphprobe"]``; FX copies ``custom`` through decomposition, deepcopy, re-export,
``.pt2`` files and Inductor's post-grad graph, while ``from_node``'s ``graph_id`` is a memory address and survives
nothing.
"""

from __future__ import annotations

import functools
import re
import uuid
from typing import Any

import torch
from torch.fx import Node

KEY = "graphprobe"
WEIGHT = "graphprobe_weight"  # in meta: what a functional copy of a graph reads, by the name the user knows
_SKIP = ("torch/nn/modules/module.py", "torch/_", "torch/fx/", "torch/utils/", "torch/export/")


def stamp(gm: torch.fx.GraphModule) -> None:
    """Give every node without an id one of a fresh lineage; ids that are there stay."""
    lineage = uuid.uuid4().hex[:12]
    for index, node in enumerate(gm.graph.nodes):
        if node_id(node) is None:
            set_id(node, (lineage, index))


def node_id(node: Node) -> tuple[str, int] | None:
    """Return the node's id, or None where it has none."""
    custom = node.meta.get("custom")
    found = custom.get(KEY) if isinstance(custom, dict) else None
    return (str(found[0]), int(found[1])) if found else None


def set_id(node: Node, id: tuple[str, int]) -> None:
    """Set the node's id; other tools' entries in ``custom`` are kept."""
    custom = node.meta.get("custom")
    node.meta["custom"] = {**(custom if isinstance(custom, dict) else {}), KEY: [id[0], id[1]]}


def module_stack(node: Node) -> list[tuple[str, str]]:
    """Return [(module path, class name)] from the root inwards; empty where unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    out = []
    for path, kind in stack.values():
        out.append((_clean_path(path), _class_name(kind)))
    return out


def _class_name(kind: Any) -> str:
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    return name.rsplit(".", 1)[-1]


def module_calls(node: Node) -> list[tuple[str, str]]:
    """Return [(key, module path)] from the root inwards; the key is one call: a module called again has another one."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(str(key), _clean_path(path)) for key, (path, _kind) in stack.items()]


@functools.cache
def _clean_path(path: str) -> str:
    # Dynamo writes L['self'].layer.0, L['fn'].0 or _export_root.x; a call counter may be appended as "@1"
    path = path.split("@")[0]
    path = re.sub(r"^(L\['\w+'\]\.?|L__self__\.?|_export_root\.?)", "", path)
    return re.sub(r"\._modules\['([^']*)'\]", r".\1", path).lstrip(".")


def module_path(node: Node) -> str:
    """Return the path of the innermost module, '' at the root or where unknown."""
    stack = node.meta.get("nn_module_stack")
    return _clean_path(next(reversed(stack.values()))[0]) if stack else ""


@functools.cache
def repeated(path: str) -> tuple[str, tuple[str, ...]]:
    """Split a module path into what repeated modules share and which of them it is: 'layers.*.mlp', ('3',)."""
    return re.sub(r"\d+", "*", path), tuple(re.findall(r"\d+", path))


def module_type(node: Node) -> str:
    """Return the class name of the innermost module, '' where unknown."""
    stack = node.meta.get("nn_module_stack")
    return _class_name(next(reversed(stack.values()))[1]) if stack else ""


def source(node: Node) -> str:
    """Return 'file.py:12 in forward' of the user's innermost frame, '' where unknown."""
    return _innermost_frame(node.meta.get("stack_trace") or "")


@functools.lru_cache(1 << 14)
def _innermost_frame(trace: str) -> str:
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', trace)
    for file, line, function in reversed(frames):
        if not any(skip in file for skip in _SKIP):
            return f"{file.rsplit('/', 1)[-1]}:{line} in {function}"
    return ""


def weight_name(node: Node) -> str:
    """Return the name under which the user's model holds what a ``get_attr`` node reads."""
    return str(node.meta.get(WEIGHT) or node.target)


def target_name(node: Node) -> str:
    """Return the target as text without memory addresses: 'aten.add.Tensor', 'operator.getitem'."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return _overload_name(target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target._name}"
    module = getattr(target, "__module__", None) or ""
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or repr(target)
    module = {"_operator": "operator", "builtins": ""}.get(module, module)
    return re.sub(r" at 0x[0-9a-f]+", "", f"{module}.{name}".lstrip(".") if module else str(name))


@functools.cache
def _overload_name(target: torch._ops.OpOverload) -> str:
    return str(target)

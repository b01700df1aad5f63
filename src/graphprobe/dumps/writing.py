"""A GraphModule in AutoDeploy's text form."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphprobe.foreign.autodeploy import ROOT, Dump, Line, Section


def dump_of(module: torch.nn.Module, transform: str, stage: str) -> Dump:
    """Describe every GraphModule in a module as AutoDeploy does."""
    graphs = [(name or ROOT, one) for name, one in module.named_modules() if isinstance(one, GraphModule)]
    sections = [Section(name, tuple(line for node in gm.graph.nodes if (line := _line(node)))) for name, gm in graphs]
    return Dump(transform, stage, tuple(sections))


def _line(node: Node) -> Line | None:
    if node.op == "placeholder":
        shape, dtype = _typed(node.meta["val"]) if "val" in node.meta else ("?", "unknown")
        return Line(node.name, "", (), shape, dtype)
    if node.op == "output":
        returned: Any = node.args[0]
        leaves = returned if isinstance(returned, (tuple, list)) else [returned]
        return Line("", "output", tuple(f"%{v.name}" if hasattr(v, "name") else str(v) for v in leaves))
    if node.op == "get_attr":
        return None
    shape, dtype = _result(node)
    return Line(node.name, str(node.target), tuple(_argument(arg) for arg in node.args), shape, dtype)


def _argument(arg: Any) -> str:
    if not hasattr(arg, "name"):  # that of the format: an Enum has a name, too, and looks like a node
        return str(arg)
    known = hasattr(arg, "meta") and "val" in arg.meta
    shape, dtype = _typed(arg.meta["val"]) if known else ("?", "unknown")
    return f"%{arg.name} : {shape} : {dtype}"


def _result(node: Node) -> tuple[str, str]:
    if "val" not in node.meta:
        return "?", "N/A"
    value = node.meta["val"]
    if not isinstance(value, (tuple, list)):
        return _typed(value)
    parts = [("?", "None") if v is None else _typed(v) for v in value]
    return f"({', '.join(shape for shape, _ in parts)})", f"({', '.join(dtype for _, dtype in parts)})"


def _typed(value: Any) -> tuple[str, str]:
    dtype = str(value.dtype) if hasattr(value, "dtype") else type(value).__name__
    if not hasattr(value, "shape"):
        return "?", dtype
    return "x".join(str(d) for d in value.shape) or "scalar", dtype

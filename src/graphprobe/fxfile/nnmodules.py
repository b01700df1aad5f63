"""Modules of ``torch.nn`` that a graph calls (``call_module``), as JSON and back.

Graphs from ``torch.fx.symbolic_trace`` call modules instead of operators. A module of ``torch.nn`` is its class and its
plain attributes; it is rebuilt without running its constructor. Modules of any other home are not rebuilt.
"""

from __future__ import annotations

from typing import Any

import torch

from graphprobe.fxfile.archive import Damage
from graphprobe.fxfile.values import Unstorable, ValueReader, ValueWriter

_INTERNAL = set(vars(torch.nn.Module())) - {"training"}


def describe(module: torch.nn.Module, values: ValueWriter) -> dict[str, Any]:
    """Return {"class": name, "attributes": [[name, value], ...]}, or only the class where it cannot be rebuilt."""
    kind = type(module)
    out: dict[str, Any] = {"class": f"{kind.__module__}.{kind.__qualname__}"}
    if _torch_class(kind.__name__) is not kind:
        return out
    try:
        attributes = [[k, values.encode(v)] for k, v in vars(module).items() if k not in _INTERNAL]
    except Unstorable:
        return out
    empty = [name for name, value in [*module._parameters.items(), *module._buffers.items()] if value is None]
    return out | {"attributes": attributes, "parameters": list(module._parameters), "none": empty}


def rebuild(data: dict[str, Any], values: ValueReader) -> torch.nn.Module | None:
    """Return the module without its tensors, None where the file does not hold it."""
    if "attributes" not in data:
        return None
    kind = _torch_class(data["class"].rpartition(".")[2])
    if kind is None or f"{kind.__module__}.{kind.__qualname__}" != data["class"]:
        return None
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    for name, value in data["attributes"]:
        if not _may_set(kind, name):
            raise Damage(f"the module {data['class']} cannot have the attribute {name!r}")
        object.__setattr__(module, name, values.decode(value))
    for name in data["none"]:
        register = module.register_parameter if name in data["parameters"] else module.register_buffer
        register(name, None)
    return module


def _may_set(kind: type[torch.nn.Module], name: Any) -> bool:
    if not isinstance(name, str) or not name.isidentifier() or name in _INTERNAL:
        return False
    return name == "training" or name in getattr(kind, "__annotations__", {}) or not hasattr(kind, name)


def _torch_class(name: str) -> type[torch.nn.Module] | None:
    found = getattr(torch.nn, name, None)
    return found if isinstance(found, type) and issubclass(found, torch.nn.Module) else None

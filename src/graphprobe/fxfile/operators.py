"""Which callables an ``.fx`` file may name, and what stands in for the others.

A file names operators, never code. Names resolve through the tables here alone: operators registered with torch
(``torch.ops.*``), ``operator`` and ``math`` arithmetic, functions of ``torch`` and ``torch.nn.functional``, methods of
tensors. Operators that touch files are left out. Whatever does not resolve becomes an `Opaque`, which can be shown and
compared by name, but raises when it is called.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import importlib.metadata
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from graphprobe.errors import OperatorError


def _words(text: str) -> list[str]:
    return text.split()


_OPERATOR = _words(
    "abs add and_ eq floordiv ge getitem gt iadd iand ifloordiv imod imul index invert ior ipow isub itruediv ixor le "
    "lshift lt matmul mod mul ne neg not_ or_ pos pow rshift setitem sub truediv truth xor"
)
_MATH = _words("acos asin atan ceil cos cosh exp floor fmod isqrt log log2 pow prod sin sinh sqrt tan tanh trunc")
_BUILTIN = _words("abs bool divmod float getattr int len max min pow round slice sum")
_TORCH = _words(
    "_check _check_index _check_is_size _check_tensor_all _check_value _sym_cos _sym_log2 _sym_sin "
    "_sym_sqrt _sym_tan _sym_tanh _assert sym_constrain_range sym_constrain_range_for_size sym_float "
    "sym_fresh_size sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum"
)
#: What exported graphs call to enter and leave a mode (gradients, autocast, vmap), and Dynamo's graphs to count
#: modules: private to torch (seen in 2.13).
_SCOPES = {
    "torch._C": ["_set_grad_enabled", "_log_api_usage_once"],
    "torch.amp.autocast_mode": ["_enter_autocast", "_exit_autocast"],
    "torch._functorch.predispatch": _words(
        "_add_batch_dim _remove_batch_dim _vmap_decrement_nesting _vmap_increment_nesting lazy_load_decompositions"
    ),
}
_NO_FUNCTIONS = {"from_file", "frombuffer", "from_numpy", "handle_torch_function", "boolean_dispatch"}
_NO_METHODS = {"apply_", "map_", "map2_", "backward", "module_load", "register_hook", "share_memory_", "tofile"} | {
    "register_post_accumulate_grad_hook",
    "reinforce",
}
_NO_NAMESPACES = {"debugprims"}  # reads tensors from files by name
_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "real", "imag", "is_cuda", "requires_grad"}
_FILE_WORDS = ("file", "path")


class Opaque:
    """Stands for a callable that is not available here; calling it raises OperatorError."""

    def __init__(self, name: str, reason: str, schema: str = "") -> None:
        # FX pastes __name__ and __module__ into the source it generates, so neither may come from a file unchecked;
        # provenance.target_name shows __qualname__, which FX leaves alone.
        self.name = name
        self.reason = reason
        self.schema = schema
        self.__name__ = "opaque_" + re.sub(r"\W", "_", name, flags=re.ASCII)
        self.__qualname__ = name.removeprefix("torch.ops.")
        self.__module__ = ""

    @property
    def returns_nothing(self) -> bool:
        """Whether the operator's schema says that it has no result."""
        return self.schema.endswith("-> ()")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise OperatorError(f"the operator {self.__qualname__!r} cannot be run: {self.reason}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<{self.__name__}>"


class OpaqueModule(torch.nn.Module):
    """Stands for a module that an ``.fx`` file does not contain; calling it raises OperatorError."""

    def __init__(self, path: str, kind: str) -> None:
        super().__init__()
        self.path, self.kind = path, kind

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raise OperatorError."""
        raise OperatorError(
            f"the module {self.path!r} ({self.kind}) is not part of the .fx file, which holds operators only: "
            "capture the model with graphprobe.capture before saving it"
        )


class Guards(torch.nn.Module):
    """Stands for export's input checks, which are not stored: does nothing."""

    def forward(self, *_: Any, **__: Any) -> None:
        """Return None."""


def name_of(target: Any) -> str | None:
    """Return the name under which `resolve` finds the callable again, None where no table lists it."""
    if isinstance(target, Opaque):
        return target.name
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target._schema.name.replace('::', '.')}.{target._overloadname}"
    if isinstance(target, torch._ops.OpOverloadPacket):
        return f"torch.ops.{target._qualified_op_name.replace('::', '.')}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target._name}"
    try:
        return _names().get(target)
    except TypeError:  # not hashable
        return None


def resolve(name: str, extra: Mapping[str, Callable[..., Any]], schema: str = "") -> Callable[..., Any]:
    """Return the callable of that name, else an `Opaque`; `extra` (the user's own, by shown name) comes first."""
    shown = name.removeprefix("torch.ops.")
    if shown in extra or name in extra:
        return extra[shown] if shown in extra else extra[name]
    if name.startswith("torch.ops."):
        return _registered(shown) or Opaque(name, _why_missing(shown), schema)
    return _functions().get(name) or Opaque(
        name,
        "it is a Python function, which an .fx file names but does not contain. Register it with "
        f"torch.library.custom_op, or give load(..., operators={{{shown!r}: function}})",
    )


def may_call_method(name: str) -> bool:
    """Whether a file may call this method of a tensor."""
    return not name.startswith("_") and name not in _NO_METHODS and callable(getattr(torch.Tensor, name, None))


def may_call(target: Any, args: tuple[Any, ...]) -> bool:
    """Whether the arguments are harmless for the callable: ``getattr`` reads a few plain attributes only."""
    return target is not getattr or (len(args) == 2 and isinstance(args[1], str) and args[1] in _ATTRIBUTES)


def schema_of(target: Any) -> str:
    """Return the operator's schema as text, '' for what has none."""
    if isinstance(target, Opaque):
        return target.schema
    if isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims", "prim"):
        return str(target._schema)
    return ""


def _why_missing(shown: str) -> str:
    namespace = shown.split(".")[0]
    if _refused(shown):
        return "it reads or writes files, which an .fx file may not do"
    if namespace in ("aten", "prims", "prim", "higher_order"):
        return f"torch {torch.__version__} has no operator of that name; load the file with the torch that wrote it"
    return (
        f"no operator of that name is registered here. Import the package that registers {namespace!r} operators "
        f"before graphprobe.load (on the command line: --import PACKAGE), "
        f"or give load(..., operators={{{shown!r}: function}})"
    )


def _registered(shown: str) -> Callable[..., Any] | None:
    parts = shown.split(".")
    if parts[0] == "higher_order":
        return _higher_order(parts[1]) if len(parts) == 2 else None
    packet = _packet(parts)
    if packet is None and _load_namespace(parts[0]):
        packet = _packet(parts)
    if packet is None or _refused(shown):
        return None
    found: Callable[..., Any] | None = packet if len(parts) == 2 else _overload(packet, parts[2])
    return found


@functools.cache
def _load_namespace(name: str) -> bool:
    """Import the installed package that offers the operators of a namespace under the group ``graphprobe.operators``.

    What a file names decides which one, but only what the user has installed as such can be imported.
    """
    found = False
    for point in importlib.metadata.entry_points(group="graphprobe.operators", name=name):
        point.load()
        found = True
    return found


def _packet(parts: list[str]) -> Any:
    if len(parts) not in (2, 3) or not all(re.fullmatch(r"[A-Za-z_]\w*", part, re.ASCII) for part in parts):
        return None
    # torch.ops also has methods such as load_library: only what is a namespace may be walked
    namespace = getattr(torch.ops, parts[0])
    packet = getattr(namespace, parts[1], None) if isinstance(namespace, torch._ops._OpNamespace) else None
    return packet if isinstance(packet, torch._ops.OpOverloadPacket) else None


def _overload(packet: Any, name: str) -> Any:
    return getattr(packet, name) if name in packet.overloads() else None


def _refused(shown: str) -> bool:
    parts = shown.split(".")
    packet = _packet(parts)
    if parts[0] in _NO_NAMESPACES or packet is None:
        return parts[0] in _NO_NAMESPACES
    arguments = [a for name in packet.overloads() for a in getattr(packet, name)._schema.arguments]
    return any(str(a.type) == "str" and any(word in a.name.lower() for word in _FILE_WORDS) for a in arguments)


def _higher_order(name: str) -> Callable[..., Any] | None:
    import torch._higher_order_ops  # registers them

    found: Any = getattr(torch.ops.higher_order, name, None)
    return found if isinstance(found, torch._ops.HigherOrderOperator) else None


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {}
    for place, names in _SCOPES.items():
        module = importlib.import_module(place)
        table.update({f"{place}.{name}": getattr(module, name) for name in names if hasattr(module, name)})
    groups: tuple[tuple[str, Any, list[str]], ...] = (
        ("operator", operator, _OPERATOR),
        ("math", math, _MATH),
        ("builtins", builtins, _BUILTIN),
        ("torch.nn.functional", torch.nn.functional, _functional_names()),
        ("torch", torch, _TORCH + torch.functional.__all__ + dir(torch._C._VariableFunctions)),
    )
    for prefix, home, names in groups:
        for name in names:
            value = getattr(home, name, None)
            hidden = name.startswith("_") and name not in _TORCH
            if callable(value) and not hidden and name not in _NO_FUNCTIONS:
                table[f"{prefix}.{name}"] = value
    return table


def _functional_names() -> list[str]:
    home = torch.nn.functional
    makers = (type(torch.relu), type(home.relu))  # builtins and Python functions, no classes
    here = ("torch.nn.functional", "torch._C._nn", None)
    return [
        name
        for name, value in vars(home).items()
        if isinstance(value, makers) and (getattr(value, "__module__", None) in here or hasattr(torch._C._nn, name))
    ]


@functools.cache
def _names() -> dict[Any, str]:
    return {value: name for name, value in _functions().items()}

"""Symbolic shapes and fake values as JSON, and back: expressions are trees of an allow-list, never text to be parsed.

A tree is an integer, a symbol's name, or ``[function, operand, ...]``. A loaded graph gets one FakeTensorMode with one
ShapeEnv, in which every symbol has its old name, assumptions, range and hint.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions as torch_functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from graphprobe.fxfile.archive import Damage


def _words(text: str) -> list[str]:
    return text.split()


_SYMPY = ("Add", "Mul", "Pow", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Piecewise")
_TORCH = _words(
    "BitwiseFn_bitwise_and BitwiseFn_bitwise_or CeilToInt CleanDiv FloatPow FloatTrueDiv FloorDiv FloorToInt Identity "
    "IntTrueDiv LShift Max Min Mod ModularIndexing PowByNatural PythonMod RShift RoundToInt ToFloat TruncToFloat "
    "TruncToInt Where"
)
_LARGEST = 2**63
_MAX_TREE, _MAX_POWER = 512, 16  # a tampered tree must not keep sympy busy for hours
_KINDS = {"int": torch.SymInt, "float": torch.SymFloat, "bool": torch.SymBool}


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    table = {name: getattr(sympy, name) for name in _SYMPY}
    table |= {"sympy.Max": sympy.Max, "sympy.Min": sympy.Min}
    table |= {name: getattr(torch_functions, name) for name in _TORCH if hasattr(torch_functions, name)}
    return table


@functools.cache
def _names() -> dict[Any, str]:
    return {function: name for name, function in _functions().items()}


class ShapeWriter:
    """Collects the symbols and the distinct fake values of one file."""

    def __init__(self) -> None:
        self.symbols: dict[str, dict[str, Any]] = {}
        self.vals: list[Any] = []
        self._seen: dict[str, int] = {}

    def val(self, value: Any) -> int:
        """Return the index of a ``meta["val"]`` in the table. Raises TypeError for what cannot be described."""
        data = self._describe(value)
        key = repr(data)
        if key not in self._seen:
            self._seen[key] = len(self.vals)
            self.vals.append(data)
        return self._seen[key]

    def _describe(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, tuple(_KINDS.values())):
            return self.sym(value)
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return {type(value).__name__ if type(value) is tuple else "list": [self._describe(v) for v in value]}
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return {"float": repr(value)}
        raise TypeError(f"a {type(value).__name__} cannot be described")

    def _tensor(self, value: torch.Tensor) -> dict[str, Any]:
        if value.layout != torch.strided:
            raise TypeError(f"a {value.layout} tensor cannot be described")
        out: dict[str, Any] = {
            "shape": [self._dim(d) for d in value.shape],
            "stride": [self._dim(d) for d in value.stride()],
            "dtype": str(value.dtype).removeprefix("torch."),
            "device": str(value.device),
        }
        return out | {"grad": True} if value.requires_grad else out

    def _dim(self, dim: Any) -> Any:
        return int(dim) if isinstance(dim, int) else self._tree(dim.node.expr, dim.node.shape_env, dim.node.hint)

    def sym(self, value: Any) -> dict[str, Any]:
        """Describe a SymInt, SymFloat or SymBool."""
        kind = next(name for name, cls in _KINDS.items() if isinstance(value, cls))
        node = value.node
        if node.shape_env is None:  # a constant in symbolic clothes
            raise TypeError(f"a {type(value).__name__} without a shape environment cannot be described")
        hint = node.hint
        plain = hint if hint is None or type(hint) in (bool, int, float) else None
        return {"sym": kind, "expr": self._tree(node.expr, node.shape_env, plain), "hint": plain}

    def _tree(self, expr: Any, env: Any, hint: Any) -> Any:
        if isinstance(expr, sympy.Symbol):
            return self._symbol(expr, env)
        if expr.is_Integer:
            return int(expr)
        if expr in (sympy.true, sympy.false):
            return bool(expr)
        if isinstance(expr, sympy.Float):
            return ["float", float(expr)]
        if isinstance(expr, sympy.Rational):
            return ["ratio", int(expr.p), int(expr.q)]
        name = _names().get(expr.func)
        if name is None:  # a function of another torch: the value keeps its hint under a name of its own
            return self._register(sympy.Symbol(f"e{len(self.symbols)}", integer=True), ValueRanges.unknown(), hint)
        return [name, *(self._tree(a, env, None) for a in expr.args)]

    def _symbol(self, symbol: sympy.Symbol, env: Any) -> str:
        if symbol.name in self.symbols:
            return str(symbol.name)
        hints = getattr(env, "backed_var_to_val", None)
        hint = (env.var_to_val if hints is None else hints).get(symbol)
        out = self._register(symbol, env.var_to_range.get(symbol), None if hint is None else int(hint))
        if symbol in getattr(env, "size_like", ()):
            self.symbols[out]["size_like"] = True
        return out

    def _register(self, symbol: sympy.Symbol, span: Any, hint: Any) -> str:
        bounds = [None, None] if span is None else [_bound(span.lower), _bound(span.upper)]
        sign = "positive" if symbol.is_positive else "nonnegative" if symbol.is_nonnegative else ""
        integer = bool(symbol.is_integer)
        self.symbols[symbol.name] = {"hint": hint, "range": bounds, "sign": sign, "integer": integer}
        return str(symbol.name)


def _bound(value: Any) -> int | None:
    return int(value) if value.is_Integer and abs(value) < _LARGEST else None


class ShapeReader:
    """Rebuilds the symbols and fake values of one file."""

    def __init__(self, symbols: dict[str, Any], vals: list[Any], device: Callable[[str], torch.device]) -> None:
        self._data, self._vals, self._device = symbols, vals, device
        self._symbols: dict[str, sympy.Symbol] = {}
        self._dims: dict[str, Any] = {}
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)

    def val(self, index: int) -> Any:
        """Build the value at `index` of the table anew: every node owns its fake tensor."""
        if not isinstance(index, int) or not 0 <= index < len(self._vals):
            raise Damage(f"there is no value number {index!r}")
        return self._build(self._vals[index])

    def _build(self, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if "shape" in data:
            return self._tensor(data)
        if "sym" in data:
            return self.sym(data)
        if "float" in data:
            return float(data["float"])
        if "list" in data:
            return [self._build(v) for v in data["list"]]
        return tuple(self._build(v) for v in data["tuple"])

    def _tensor(self, data: dict[str, Any]) -> torch.Tensor:
        shape, stride = ([self._dim(d) for d in data[key]] for key in ("shape", "stride"))
        kind = dtype(data["dtype"])
        with self.mode:
            return torch.empty_strided(
                shape, stride, dtype=kind, device=self._device(data["device"]), requires_grad=data.get("grad", False)
            )

    def _dim(self, data: Any) -> Any:
        if isinstance(data, int):
            return data
        key = repr(data)
        if key not in self._dims:
            self._dims[key] = self.sym({"sym": "int", "expr": data, "hint": None})
        return self._dims[key]

    def sym(self, data: dict[str, Any]) -> Any:
        """Rebuild a SymInt, SymFloat or SymBool."""
        budget = [_MAX_TREE]
        expr, hint = self._expression(data["expr"], budget), data["hint"]
        if data["sym"] == "int":
            return self.env.create_symintnode(expr, hint=hint if isinstance(hint, int) else self._hint(expr))
        if data["sym"] == "float":
            return self.env.create_symfloatnode(expr, hint=hint if isinstance(hint, float) else None)
        return self.env.create_symboolnode(expr)

    def _hint(self, expr: Any) -> int | None:
        hints = {self._symbols[s.name]: self._data[s.name]["hint"] for s in expr.free_symbols}
        if None in hints.values():
            return None
        found = expr.xreplace({symbol: sympy.Integer(hint) for symbol, hint in hints.items()})
        return int(found) if found.is_Integer else None

    def _expression(self, data: Any, budget: list[int]) -> Any:
        budget[0] -= 1
        if budget[0] < 0:
            raise Damage("a symbolic size is too long")
        if isinstance(data, bool):
            return sympy.true if data else sympy.false
        if isinstance(data, int):
            if abs(data) > _LARGEST:
                raise Damage("a symbolic size holds a number beyond 64 bits")
            return sympy.Integer(data)
        if isinstance(data, str):
            return self._symbol(data)
        name, *operands = data
        if name == "float":
            return sympy.Float(float(operands[0]))
        parts = [self._expression(operand, budget) for operand in operands]
        if name == "ratio":
            return sympy.Rational(*parts)
        if name not in _functions():
            raise Damage(f"a symbolic size uses the unknown function {name!r}")
        if "Pow" in name:
            _check_power(*parts)
        return _functions()[name](*parts)

    def _symbol(self, name: str) -> sympy.Symbol:
        if name in self._symbols:
            return self._symbols[name]
        data = self._data.get(name)
        if data is None or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise Damage(f"the symbol {name!r} is not declared")
        sign = {data["sign"]: True} if data["sign"] in ("positive", "nonnegative") else {}
        symbol = self._symbols[name] = sympy.Symbol(name, integer=bool(data["integer"]) or None, **sign)
        lower, upper = data["range"]
        span = ValueRanges(-int_oo if lower is None else lower, int_oo if upper is None else upper)
        self.env.var_to_range[symbol] = span
        if isinstance(data["hint"], int):
            _add_hint(self.env, symbol, name, data["hint"])
        if data.get("size_like"):
            self.env.size_like.add(symbol)
        return symbol


def _add_hint(env: Any, symbol: sympy.Symbol, name: str, hint: int) -> None:
    from torch._dynamo.source import ConstantSource  # late: importing dynamo takes a second

    env.var_to_sources[symbol] = [ConstantSource(name)]
    # torch 2.13 renamed add_var_to_val to add_backed_var_to_val and warns about the old name
    add = env.add_backed_var_to_val if hasattr(env, "add_backed_var_to_val") else env.add_var_to_val
    add(symbol, hint)


def _check_power(base: Any, exponent: Any) -> None:
    small = exponent.is_Integer and abs(int(exponent)) <= _MAX_POWER
    if not small or not (base.is_Symbol or abs(int(exponent)) <= 2):
        raise Damage("a symbolic size holds a power that is too large")


def dtype(name: Any) -> torch.dtype:
    """Return the torch dtype of that name. Raises Damage."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise Damage(f"{name!r} is no dtype that torch {torch.__version__} knows")
    return found

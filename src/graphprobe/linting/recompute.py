"""Run a graph on fake tensors, node by node: what shape, dtype and stride does each node really have?

The recorded values are first rebuilt in a fake mode of their own (with symbols of the same names), so that the user's
graph, its values and its shape environment stay as they are. A node that cannot be run this way keeps its recorded
value, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from graphprobe.fxfile.shapes import ShapeReader, ShapeWriter

_PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


@dataclass
class Recomputed:
    """Per node: the value by running on from the placeholders, and the reason where that failed."""

    values: dict[Node, Any] = field(default_factory=dict)
    failed: dict[Node, str] = field(default_factory=dict)
    stale: set[Node] = field(default_factory=set)  # recorded and recomputed values differ
    roots: set[Node] = field(default_factory=set)  # stale even on recorded inputs: the cause lies in the node itself


class _Copies:
    """Fresh copies of recorded values in a fake mode of their own."""

    def __init__(self) -> None:
        self._writer = ShapeWriter()
        self._reader = ShapeReader(self._writer.symbols, self._writer.vals, torch.device)
        self.mode = self._reader.mode

    def of(self, node: Node) -> Any:
        """Return a copy of the node's ``meta["val"]``. Raises KeyError where it has none, TypeError for odd ones."""
        value = node.meta.get("val")
        if value is None:
            raise KeyError(f"{node.name} has no recorded value")
        return self._reader.val(self._writer.val(value))

    def of_tensor(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a fake tensor on `device`, else like a real one."""
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


class _Recorded(dict[Node, Any]):
    """Values by node; what has not been evaluated is taken as recorded, when it is first asked for."""

    def __init__(self, copies: _Copies) -> None:
        super().__init__()
        self._copies = copies

    def __missing__(self, node: Node) -> Any:
        self[node] = self._copies.of(node)
        return self[node]


def recompute(gm: GraphModule, only: Collection[Node] | None = None) -> Recomputed:
    """Evaluate every node of the graph, bodies of control flow through their operators.

    With `only`, evaluate just these nodes, on the recorded values of the others.
    """
    copies = _Copies()
    out = Recomputed() if only is None else Recomputed(values=_Recorded(copies))
    with torch.no_grad(), copies.mode, copies.mode.shape_env.suppress_guards():  # type: ignore[union-attr]
        for node in gm.graph.nodes:
            if only is not None and node not in only:
                continue
            try:
                out.values[node] = _evaluate(gm, node, out.values, copies)
            except Exception as error:  # an operator without a fake kernel, a missing input, a data-dependent result
                out.failed[node] = f"{type(error).__name__}: {str(error).strip().splitlines()[0:1]}"
                _take_recorded(node, out.values, copies)
                continue
            _compare(gm, node, out, copies)
    return out


def _take_recorded(node: Node, values: dict[Node, Any], copies: _Copies) -> None:
    try:
        values[node] = copies.of(node)
    except (KeyError, TypeError):
        values.pop(node, None)


def _evaluate(gm: GraphModule, node: Node, values: dict[Node, Any], copies: _Copies) -> Any:
    if node.op == "placeholder":
        return copies.of(node)
    if node.op == "get_attr":
        return _read(gm, node, copies)
    args = map_arg(node.args, values.__getitem__)
    kwargs = map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module":
        return _call_module(gm.get_submodule(str(node.target)), args, kwargs, copies)
    return None


def _read(gm: GraphModule, node: Node, copies: _Copies) -> Any:
    found: Any = gm
    for part in str(node.target).split("."):
        found = getattr(found, part)
    if not isinstance(found, torch.Tensor):
        return found
    recorded = node.meta.get("val")
    # a weight that was loaded without its values lies on the meta device, whatever the graph computes on
    unplaced = found.device.type == "meta" and isinstance(recorded, torch.Tensor)
    return copies.of_tensor(found, node.meta["val"].device if unplaced else found.device)


def _call_module(module: torch.nn.Module, args: Any, kwargs: Any, copies: _Copies) -> Any:
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    fakes = {name: copies.of_tensor(tensor, tensor.device) for name, tensor in state.items()}
    return torch.func.functional_call(module, fakes, args, kwargs)


def _compare(gm: GraphModule, node: Node, out: Recomputed, copies: _Copies) -> None:
    if node.op in ("placeholder", "output") or node.meta.get("val") is None:
        return
    try:
        recorded = copies.of(node)
    except TypeError:
        return
    if same(recorded, out.values[node]):
        return
    out.stale.add(node)
    if not out.stale & set(node.all_input_nodes):
        out.roots.add(node)
        return
    try:
        local = {source: copies.of(source) for source in node.all_input_nodes}
        if not same(recorded, _evaluate(gm, node, local, copies)):
            out.roots.add(node)
    except Exception:  # cannot be told from the inputs' own staleness
        return


def same(recorded: Any, found: Any) -> bool:
    """Whether two values agree in structure, and tensors in shape, dtype, device and the strides that matter."""
    if isinstance(recorded, torch.Tensor) and isinstance(found, torch.Tensor):
        return (
            recorded.dtype == found.dtype
            and recorded.device == found.device
            and len(recorded.shape) == len(found.shape)
            and all(_same_size(a, b) for a, b in zip(recorded.shape, found.shape, strict=True))
            and _same_strides(recorded, found)
        )
    if isinstance(recorded, (list, tuple)) and isinstance(found, (list, tuple)):
        return len(recorded) == len(found) and all(same(a, b) for a, b in zip(recorded, found, strict=True))
    if isinstance(recorded, torch.Tensor) or isinstance(found, torch.Tensor):
        return False
    return not isinstance(recorded, (int, torch.SymInt)) or _same_size(recorded, found)


def _same_strides(recorded: torch.Tensor, found: torch.Tensor) -> bool:
    sizes = list(recorded.shape)
    if any(_is(size, 0) for size in sizes):
        return True
    pairs = zip(sizes, recorded.stride(), found.stride(), strict=True)
    return all(_is(size, 1) or _same_size(a, b) for size, a, b in pairs)  # a stride over one element means nothing


def _is(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymBool)) else sympy.Integer(int(size))


def _same_size(a: Any, b: Any) -> bool:
    """Whether two sizes agree for every value of their symbols, tried at one point where algebra does not say."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    try:
        left, right = _expression(a), _expression(b)
    except (TypeError, ValueError, AttributeError):
        return True
    if left == right:
        return True
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if any(str(symbol).startswith(("u", "zuf")) for symbol in symbols):
        return True  # depends on data: every run names such sizes anew
    point = {symbol: sympy.Integer(_PRIMES[i % len(_PRIMES)] * 8) for i, symbol in enumerate(symbols)}
    return bool(left.xreplace(point) == right.xreplace(point))

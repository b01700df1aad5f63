"""Are a graph's outputs, computed by something that is no graph, what the graph computes, up to rounding?

Generated code has no nodes, so only what it returns can be judged: by its distance from the graph's outputs in exact
arithmetic, ``t``, against the distance that rounding explains.

    R(y) = rms(y - t) / max(rms(x - t), rms(x~ - x), u rms(t))

``x`` is what the graph itself returns natively and ``x~`` what it returns when every floating result is multiplied by
``1 + u xi``, ``xi ~ U(-1, 1)``: where tiny errors move the outputs far (ties, cancellation), rounding explains much.
The worst slice along every dimension is asked, too. With ``x`` and ``y`` exchanged the same ratio says whether it is
the native graph, that is eager, which is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from graphprobe import inputs as binding
from graphprobe import nodes
from graphprobe.bisection.inductor.noise import narrows, shaken
from graphprobe.execute import call
from graphprobe.judge import precision
from graphprobe.judge.same import rms, slices
from graphprobe.lanes import elements, exact
from graphprobe.program import Program, program
from graphprobe.records import OutputRow

_DRAWS = 3
_ANOTHER_FUNCTION = 1e3  # R from which on a result is no longer called too coarse
_FEW = 16  # elements of a slice below which its rms says little


@dataclass(frozen=True)
class Compared:
    """One output: how far it is from exact arithmetic, in units of what rounding explains."""

    path: str
    kind: str  # identical, rounding, precision, semantic, nonfinite, structural
    ratio: float = 0.0  # R(y)
    reference: float = 0.0  # R(x)
    error: float | None = None  # rms(y - x) / rms(x)
    floor: float | None = None  # rms(x - t) / rms(t)
    row: OutputRow | None = None
    note: str = ""
    overflows: bool = False  # x is NaN or infinite where neither y nor exact arithmetic is

    @property
    def said(self) -> str:
        """Return the proof in words."""
        if self.kind == "identical":
            return "bitwise equal"
        if self.row is None or (self.ratio == self.reference == 0.0 and not self.overflows):
            return self.note or self.kind
        text = (
            f"{self.kind}: it is {self.ratio:.2g} times as far from exact arithmetic as rounding explains, the graph "
            f"run natively {self.reference:.2g} times (above {precision.BOUND:g} is too far)"
        )
        return f"{text}; {self.note}" if self.note else text

    @property
    def better(self) -> str | None:
        """The side that is nearer to exact arithmetic where the other one is too far."""
        if self.kind in ("identical", "rounding"):
            return "after" if self.overflows else None
        return "after" if self.reference > precision.BOUND >= self.ratio else "before"


@dataclass
class Reference:
    """A graph's outputs natively, exactly, and with rounding-sized noise."""

    gm: GraphModule
    args: tuple[Any, ...]
    native: dict[str, Any] = field(default_factory=dict)
    truth: dict[str, Any] = field(default_factory=dict)
    noisy: list[dict[str, Any]] = field(default_factory=list)
    narrowing: tuple[str, ...] = ()  # the nodes that cast to a smaller floating dtype

    @staticmethod
    def of(gm: GraphModule, args: Sequence[Any]) -> Reference:
        """Run a graph on its flat inputs in all three ways. Raises CaptureError, and what its operators raise."""
        one = program(gm, tuple(args), {})
        bound = binding.bind(gm, tuple(args), {}, "the graph")
        reference = Reference(gm, tuple(args))
        native = _run(one, bound, None)
        reference.native = {path: native[node] for path, node in one.outputs.items()}
        reference.narrowing = tuple(node.name for node in one.live if _narrows(node, native))
        lifted = _exactly(one, bound, native)
        reference.truth = {path: lifted[node] for path, node in one.outputs.items()}
        for draw in range(_DRAWS):
            values = _run(one, bound, torch.Generator().manual_seed(draw))
            reference.noisy.append({path: values[node] for path, node in one.outputs.items()})
        return reference

    def compare(self, found: Sequence[Any]) -> list[Compared]:
        """Compare what something else returned for the outputs, state left out, in their order."""
        paths = [path for path in self.native if not path.startswith("state:")]
        tensors = [value for value in found if isinstance(value, torch.Tensor)]
        if len(tensors) != len(paths):
            return [Compared("output", "structural", note=f"{len(tensors)} tensors came back in place of {len(paths)}")]
        noisy = {path: [one[path] for one in self.noisy] for path in paths}
        return [
            compared(path, self.native[path], y, self.truth[path], noisy[path])
            for path, y in zip(paths, tensors, strict=True)
        ]


def compared(
    path: str, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, noisy: Sequence[torch.Tensor] = ()
) -> Compared:
    """Compare `y` with `x`, given their exact value `t` and what rounding-sized noise makes of `x`."""
    if x.shape != y.shape:
        return Compared(path, "structural", note=f"shape {tuple(y.shape)} in place of {tuple(x.shape)}")
    if x.dtype != y.dtype and not (x.is_floating_point() and y.is_floating_point()):
        note = f"{nodes.dtype_name(y.dtype)} in place of {nodes.dtype_name(x.dtype)}"
        return Compared(path, "structural", note=note, row=_row(path, x, y))
    row = _row(path, x, y)
    if row.identical:
        return Compared(path, "identical", row=row, error=0.0)
    if not (x.is_floating_point() or x.is_complex()):
        return _decided(x, y, t, noisy, row)
    bounds = elements.sentinel_bounds(x.dtype, y.dtype)
    y_off, kept, y_wrong = _apart(t, y, bounds)
    x_off, _, x_wrong = _apart(t, x, (bounds[0], bounds[0]))
    moves = [_apart(x, one, (bounds[0], bounds[0]))[0] for one in noisy]
    spoiled = any(bool(_apart(t, one, (bounds[0], bounds[0]))[2].any()) for one in noisy)  # noise makes NaNs, too
    floor = rms(x_off) / rms(kept) if rms(kept) else None
    if bool((y_wrong & ~x_wrong).any()) and not spoiled:
        note = "NaN or infinity where exact arithmetic has none, or the other way round"
        return Compared(path, "nonfinite", math.inf, 0.0, row.error, floor, row, note)
    unit = torch.finfo(x.dtype).eps / 2
    ratio = _ratio(y_off, [x_off, *moves, unit * kept])
    reference = _ratio(x_off, [y_off, *moves, unit * kept])
    worst = max(ratio, reference)
    kind = "rounding" if worst <= precision.BOUND else "precision" if worst <= _ANOTHER_FUNCTION else "semantic"
    lost = int((x_wrong & ~y_wrong & ~x.isfinite()).sum())
    note = f"{lost} elements are NaN or infinite natively alone, not in exact arithmetic" if lost else ""
    return Compared(path, kind, ratio, reference, row.error, floor, row, note, bool(lost))


def _decided(
    x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, noisy: Sequence[torch.Tensor], row: OutputRow
) -> Compared:
    """Integers and booleans: a difference is rounding only where rounding-sized noise moves the same elements."""
    differs = x != y
    unstable = torch.zeros_like(differs)
    for one in noisy:
        unstable |= one != x
    firm = differs & ~unstable
    if not bool(firm.any()):
        return Compared(row.path, "rounding", error=row.error, row=row, note="decisions that rounding moves")
    note = f"{int(firm.sum())} elements differ that rounding does not move"
    if bool((t.to(y.dtype) == y)[firm].all()):  # the exact value is with y
        return Compared(row.path, "semantic", 0.0, math.inf, row.error, None, row, note)
    return Compared(row.path, "semantic", math.inf, 0.0, row.error, None, row, note)


def _row(path: str, x: torch.Tensor, y: torch.Tensor) -> OutputRow:
    identical = x.dtype == y.dtype and _bitwise(x, y)
    if identical or x.numel() == 0:
        return OutputRow(path, tuple(x.shape), nodes.dtype_name(x.dtype), 0.0, 0.0, identical)
    off, kept, _ = _apart(x, y, elements.sentinel_bounds(x.dtype, y.dtype))
    error = rms(off) / rms(kept) if rms(kept) else (0.0 if rms(off) == 0 else float("inf"))
    return OutputRow(path, tuple(x.shape), nodes.dtype_name(x.dtype), error, float(off.abs().amax()), False)


def _bitwise(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool(((x == y) | ((x != x) & (y != y))).all())


def _apart(
    x: torch.Tensor, y: torch.Tensor, bounds: elements.Bounds
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (y - x, x, where the class differs) in float64; equal classes (NaN, infinities, masks) are zero."""
    left, right = elements.real(x).double(), elements.real(y).double()
    change, kept, wrong = elements.compared(left, right, bounds)
    return change, kept, torch.zeros_like(left, dtype=torch.bool) if wrong is None else wrong


def _ratio(off: torch.Tensor, explained: list[torch.Tensor]) -> float:
    """Return rms(off) over the largest rms that is explained, for the whole tensor or its worst slice."""
    worst = _over(rms(off), max(rms(one) for one in explained))
    for dim in range(off.dim()):
        if off.shape[dim] > 1 and off.numel() // off.shape[dim] >= _FEW:
            under = torch.stack([slices(one, dim) for one in explained]).amax(0)
            quotient = torch.nan_to_num(slices(off, dim) / under, nan=0.0, posinf=float("inf"))
            worst = max(worst, float(quotient.amax()))
    return worst


def _over(top: float, under: float) -> float:
    return top / under if under > 0 else (0.0 if top == 0 else float("inf"))


# --- running ---------------------------------------------------------------------------------------------------------


def _run(one: Program, bound: dict[str, Any], noise: torch.Generator | None) -> dict[Node, Any]:
    """Run a program natively, with noise on every floating result where asked for; all values are kept."""
    env: dict[Node, Any] = {node: bound[path] for path, node in one.inputs.items() if path in bound}
    with torch.no_grad():
        for node in one.live:
            if node.op == "get_attr":
                env[node] = one.attribute(node)
            elif node.op == "call_function":
                env[node] = call(one, node, env)
                if noise is not None and (_rounds(node) or _narrows(node, env)):
                    env[node] = pytree.tree_map(lambda value: shaken(value, noise), env[node])
    return env


def _rounds(node: Node) -> bool:
    return nodes.schema_name(node) not in exact.UNROUNDED and nodes.makes_values(node)


def _narrows(node: Node, env: dict[Node, Any]) -> bool:
    return narrows(env.get((node.all_input_nodes or [node])[0]), env.get(node))


def _exactly(one: Program, bound: dict[str, Any], native: dict[Node, Any]) -> dict[Node, Any]:
    """Run a program in float64; what has no float64 form takes its native value."""
    env: dict[Node, Any] = {}
    for path, node in one.inputs.items():
        if path in bound:
            env[node] = exact.lift(bound[path])
    with torch.no_grad():
        for node in one.live:
            if node.op == "get_attr":
                env[node] = exact.lift(one.attribute(node))
            elif node.op == "call_function":
                env[node] = _lifted(node, env, native)
    return env


def _lifted(node: Node, env: dict[Node, Any], native: dict[Node, Any]) -> Any:
    if exact.takes_native(node):
        return pytree.tree_map(exact.lift, native[node])
    for _ in range(2):
        args = torch.fx.map_arg(node.args, env.__getitem__)
        kwargs = torch.fx.map_arg(node.kwargs, env.__getitem__)
        target, args, kwargs = exact.lifted_call(node, tuple(args), dict(kwargs))
        try:
            return target(*args, **kwargs)
        except Exception:
            if not exact.learn_decomposition(node):
                break
    return pytree.tree_map(exact.lift, native[node])

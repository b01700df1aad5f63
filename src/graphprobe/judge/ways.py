"""Rule 4, the effective weight: the ways in which codes are turned into what they stand for.

The constant part of the piece is evaluated; times one of the scales that stand beside it; the piece is probed with unit
vectors, ``W' e_k = f(e_k) - f(0)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay
from graphprobe.program import Program

Tensor = torch.Tensor
Evaluate = Callable[[Tensor], "Tensor | None"]  # codes -> effective weight in the floating weight's shape
_MOST_PROBES = 64


@dataclass(frozen=True, eq=False)
class Way:
    """How codes are turned into what they stand for, and the constants that take part."""

    evaluate: Evaluate
    made_of: frozenset[Node]


class Ways:
    """The ways to evaluate the codes of one region whose codes live on `side`, the cheapest first."""

    def __init__(self, replay: Replay, region: Region, side: str, program: Program, relaxed: Collection[Node]) -> None:
        self.replay, self.region, self.side, self.program, self.relaxed = replay, region, side, program, relaxed
        self.other = "before" if side == "after" else "after"
        self.piece: tuple[Node, ...] = getattr(region, side)
        self.constant = region.constant(side)

    def of(self, leaf: Node, weight: Node, value: Tensor) -> list[Way]:
        """Return the ways to evaluate the codes of `leaf` as the floating `weight`, whose value is `value`."""
        constant = self.constant
        tops = [n for n in constant if n.op != "get_attr" and self._is_top(n, constant) and leaf in self._sources(n)]
        if self._is_top(leaf, constant):
            tops.append(leaf)
        scales = [n for n in constant if self._is_top(n, constant) and n not in tops and self._is_scale(n, value)]
        ways: list[Way] = []
        for top in tops:
            lay = _Layout(value)
            ways.append(Way(lambda codes, top=top, lay=lay: lay(self._fold(leaf, codes, top)), self._sources(top)))  # type: ignore[misc]
        for top in tops:
            for scale in scales:
                for axis in (0, 1):
                    lay = _Layout(value)

                    def scaled(
                        codes: Tensor, top: Node = top, scale: Node = scale, axis: int = axis, lay: _Layout = lay
                    ) -> Tensor | None:
                        return _scaled(lay(self._fold(leaf, codes, top)), self._fold(leaf, codes, scale), axis)

                    ways.append(Way(scaled, self._sources(top) | self._sources(scale)))
        probed = frozenset(n for n in constant if n.op == "get_attr")  # who takes part is not known
        ways.append(Way(lambda codes: self._probed(leaf, codes, weight, value), probed))
        return ways

    def _sources(self, top: Node) -> frozenset[Node]:
        """Return the weights that a constant is computed from."""
        stack, seen = [top], {top}
        while stack:
            for operand in stack.pop().all_input_nodes:
                if operand not in seen:
                    seen.add(operand)
                    stack.append(operand)
        return frozenset(n for n in seen if n.op == "get_attr")

    def _is_top(self, node: Node, constant: set[Node]) -> bool:
        inside = [user for user in node.users if user in set(self.piece)]
        return any(user not in constant for user in inside) or node is getattr(self.region.claim, self.side)

    def _is_scale(self, node: Node, value: Tensor) -> bool:
        known = nodes.tensor_val(node)
        if known is None and node.op == "get_attr":
            known = self.program.attribute(node)
        if not isinstance(known, torch.Tensor) or not known.dtype.is_floating_point or value.dim() < 2:
            return False
        return known.numel() == 1 or known.numel() in value.shape

    def _fold(self, leaf: Node, codes: Tensor, top: Node) -> Tensor | None:
        if top is leaf:
            return codes.double()
        if top.op == "get_attr":
            attribute: Tensor = self.program.attribute(top).detach()
            return attribute.double()
        try:
            values = self.replay.exact_values(
                self.side, self.region, override={leaf: codes}, only=self.constant | {top}
            )
        except Exception:  # no exact arithmetic for the unpacking: another way may do
            return None
        value = values[top]
        return value.double() if isinstance(value, torch.Tensor) else None

    def _probed(self, leaf: Node, codes: Tensor, weight: Node, value: Tensor) -> Tensor | None:
        leaves = [p for p, _ in self.region.frontier if is_floating(self.replay.values.get(p))]
        if len(leaves) != 1 or value.dim() != 2:
            return None
        activation = leaves[0]
        given: Tensor = self.replay.values[activation]
        columns = given.shape[-1]
        rows = given.numel() // columns
        if columns not in value.shape or math.ceil(columns / rows) > _MOST_PROBES:
            return None
        try:
            mine = self._response(self.side, activation, given, {leaf: codes})
            theirs = self._response(self.other, activation, given, {})
        except Exception:
            return None
        # what the floating side makes of its weight tells how the weight enters: transposed or not, with which gain
        for stored, turned in ((value.double(), False), (value.double().t(), True)):
            if stored.shape == theirs.shape:
                gain = (theirs * stored).sum(0) / stored.square().sum(0).clamp(min=1e-300)
                if distance(stored * gain, theirs) < 1e-9 and bool((gain != 0).all()):
                    return (mine / gain).t() if turned else mine / gain
        return None

    def _response(self, side: str, activation: Node, given: Tensor, override: dict[Node, Tensor]) -> Tensor:
        """Return [columns of the activation, columns of the result]: f(e_k) - f(0) for every k."""
        columns = given.shape[-1]
        rows = given.numel() // columns

        def run(x: Tensor) -> Tensor:
            relaxed = self.relaxed if side == self.side else ()
            y = self.replay.exact(
                side, self.region, given={activation: x.reshape(given.shape)}, override=override, relaxed=relaxed
            )
            return y.reshape(rows, -1)

        eye = torch.eye(columns, dtype=torch.float64, device=given.device)
        zero = run(torch.zeros(rows, columns, dtype=torch.float64, device=given.device))
        parts = []
        for start in range(0, columns, rows):
            part = eye[start : start + rows]
            padded = torch.cat([part, part.new_zeros(rows - part.shape[0], columns)])
            parts.append((run(padded) - zero)[: part.shape[0]])
        return torch.cat(parts)


def is_floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def distance(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return math.inf
    bottom = float(torch.linalg.vector_norm(y.double()))
    return float(torch.linalg.vector_norm(x.double() - y.double())) / bottom if bottom > 0 else math.inf


class _Layout:
    """Lays a folded value out as the weight is: as it stands, transposed, or with its dimensions merged otherwise.

    The stored codes decide which; other codes are laid out like them.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.turned: bool | None = None

    def __call__(self, x: Tensor | None) -> Tensor | None:
        if x is None or x.numel() != self.like.numel():
            return None
        flat = x.dim() == self.like.dim() == 2
        plain = x if flat and x.shape == self.like.shape else x.reshape(self.like.shape)
        if not flat or x.t().shape != self.like.shape:
            return plain
        if self.turned is None:  # not scaled yet, the layouts are told apart by the angle alone
            turned, straight = (float((torch.nan_to_num(c.double()) * self.like).sum()) for c in (x.t(), plain))
            self.turned = x.shape != self.like.shape or turned > straight
        return x.t() if self.turned else plain


def _scaled(x: Tensor | None, scale: Tensor | None, axis: int) -> Tensor | None:
    if x is None or scale is None or x.dim() < 2:
        return None
    if scale.numel() == 1:
        return x * scale.reshape(())
    if scale.numel() != x.shape[axis]:
        return None
    return x * scale.reshape([-1 if d == axis else 1 for d in range(x.dim())])

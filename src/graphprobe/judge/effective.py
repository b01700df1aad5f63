"""Rule 4, the effective weight: which floating weight stored codes stand for, and what value they give it.

Codes are folded into a floating weight (dequantised first), or scaled after the product, or unpacked by a kernel. Three
ways are tried: the constant part of the piece is evaluated; times one of the scales that stand beside it; the piece is
probed with unit vectors, ``W' e_k = f(e_k) - f(0)``. The step of a code at each element is what flipping its lowest bit
changes, so that no layout of scales, groups and packed codes need be known.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.chains import FP8
from graphprobe.judge.codes import Grid, flip, narrowest, uneven
from graphprobe.judge.gains import Passage, factors
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

Tensor = torch.Tensor
Evaluate = Callable[[Tensor], "Tensor | None"]  # codes -> effective weight in the floating weight's shape

_FP4 = {getattr(torch, n) for n in dir(torch) if n.startswith("float4_")}  # two of them in a byte
_CODES = {torch.int8, torch.uint8, torch.int16, torch.int32, *FP8, *_FP4}
_NEAR = 0.5  # a candidate farther off than this, relative, stands for another weight
_CLOSER = 1e-6  # relative: two ways to one distance are told apart by their order
_MOST_PROBES = 64
_SHORTEST = 8  # columns that share a scale, at least


@dataclass(frozen=True, eq=False)
class Effective:
    """A floating weight of one side, and what the other side's codes make of it."""

    weight: Node
    wanted: Tensor  # the floating weight, times its gains, [rows, columns] float64
    held: Tensor  # its effective value, the same shape
    grid: Grid
    shape: torch.Size  # of the weight
    made_of: frozenset[Node] = frozenset()  # the codes, their scales and zero points
    factor: Tensor | None = None  # gains that the codes were made of with the weight, in its shape

    @property
    def override(self) -> Tensor:
        """Return what stands in the weight's place, in its own shape: the effective value without the gains."""
        held = self.held.reshape(self.shape)
        return held if self.factor is None else held / self.factor


@dataclass(frozen=True, eq=False)
class _Way:
    """How codes are turned into what they stand for, and the constants that take part."""

    evaluate: Evaluate
    made_of: frozenset[Node]


@dataclass(frozen=True, eq=False)
class _Target:
    """What codes may stand for: a floating weight, or one times gains."""

    weight: Node
    wanted: Tensor
    factor: Tensor | None


class Finder:
    """Finds the effective weights of one region whose codes live on `side`."""

    def __init__(self, replay: Replay, region: Region, side: str, relaxed: Collection[Node]) -> None:
        self.replay, self.region, self.side, self.relaxed = replay, region, side, relaxed
        self.other = "before" if side == "after" else "after"
        self.piece: tuple[Node, ...] = getattr(region, side)
        plan = replay.plan
        self.program = plan.after if side == "after" else plan.before
        self.constant = region.constant(side)
        self.mine, self.theirs = (functools.cache(Passage(replay, region, s).gains) for s in (side, self.other))
        self.floating = self._floating(plan.before if side == "after" else plan.after)

    def _floating(self, program: object) -> dict[Node, Tensor]:
        found = {}
        for node in getattr(self.region, self.other):
            if node.op == "get_attr":
                value = program.attribute(node)  # type: ignore[attr-defined]
                if _is_floating(value) and value.dtype not in FP8 and value.numel() > 1:
                    found[node] = value.detach()
        return found

    def codes(self) -> list[Node]:
        """Return the weights of the piece that may hold codes of a floating weight of the other side."""
        found = []
        for node in self.piece:
            if node.op == "get_attr":
                value = self.program.attribute(node)
                if isinstance(value, torch.Tensor) and value.dtype in _CODES and self._fields(value):
                    found.append(node)
        return found

    def _fields(self, codes: Tensor) -> set[int]:
        """Return how many codes one element may pack, by the numbers of elements."""
        counts = {w.numel() for w in self.floating.values()}
        fields = (1,) if codes.dtype in FP8 else (2,) if codes.dtype in _FP4 else (1, 2, 4, 8)
        return {f for f in fields if codes.numel() * f in counts and f <= codes.dtype.itemsize * 4}

    def find(self, leaf: Node) -> Effective | None:
        """Return what the codes of `leaf` stand for, or None where no floating weight is near."""
        codes = self.program.attribute(leaf).detach()
        best: tuple[float, _Target, _Way, int] | None = None
        for fields in sorted(self._fields(codes)):
            for target in self._targets(leaf, codes.numel() * fields):
                for way in self._ways(leaf, target.weight, target.wanted):
                    held = way.evaluate(codes)
                    far = _distance(held, target.wanted) if held is not None else math.inf
                    if far < _NEAR and (best is None or far < best[0] * (1 - _CLOSER)):
                        best = (far, target, way, fields)
                        break  # the cheaper way holds
        return self._effective(codes, self._float8(leaf, codes), *best[1:]) if best is not None else None

    def _targets(self, leaf: Node, elements: int) -> Iterator[_Target]:
        """Yield the weights of so many elements by themselves, then times the gains that they meet on their way."""
        weights = {weight: value for weight, value in self.floating.items() if value.numel() == elements}
        for weight, value in weights.items():
            yield _Target(weight, value, None)
        for weight, value in weights.items():
            for factor in factors(value, self.theirs(weight), self.mine(leaf)):
                yield _Target(weight, value.double() * factor, factor)

    def _float8(self, leaf: Node, codes: Tensor) -> torch.dtype | None:
        """Return the 8-bit float that codes are, or that stored bytes are viewed as."""
        if codes.dtype in FP8:
            return codes.dtype
        for user in leaf.users:
            viewed = nodes.tensor_val(user) if nodes.schema_name(user) == "aten::view" else None
            if viewed is not None and viewed.dtype in FP8:
                return viewed.dtype
        return None

    def _effective(
        self, codes: Tensor, float8: torch.dtype | None, target: _Target, way: _Way, fields: int
    ) -> Effective | None:
        evaluate = way.evaluate
        held, moved = evaluate(codes), evaluate(flip(codes, fields))
        if held is None or moved is None:
            return None
        value = target.wanted
        rows = value.shape[0] if value.dim() > 1 else 1
        wanted, held2, moved2 = (t.double().reshape(rows, -1) for t in (value, held, moved))
        step = (moved2 - held2).abs()
        top = self._top(codes, float8, evaluate, rows)
        step = torch.where(torch.isfinite(step) & (step > 0), step, _fallback(step, top, float8 or codes.dtype))
        bits = 8 if float8 else min(codes.dtype.itemsize * 8 // fields, 8)
        grid = Grid(step, bits, float8, self._rounding(self.floating[target.weight]), top=top)
        if float8 is None and max(grid.group, grid.turned.group) < _SHORTEST:  # a step that changes all the time

            def of(codes: Tensor) -> Tensor:
                made = evaluate(codes)
                assert made is not None
                return made.double().reshape(rows, -1)

            found = uneven(codes, fields, of)
            if found is not None:
                grid = Grid(found[0], 4, None, grid.rounding, found[1])
        if grid.levels is None:
            grid = dataclasses.replace(grid, bits=narrowest(codes, held2, step, bits, grid.group))
        return Effective(target.weight, wanted, held2, grid, value.shape, way.made_of, target.factor)

    def _top(self, codes: Tensor, float8: torch.dtype | None, evaluate: Evaluate, rows: int) -> Tensor | None:
        """Return what the largest 8-bit float would stand for at every element."""
        if float8 is None:
            return None
        largest = torch.full_like(codes.float(), torch.finfo(float8).max).to(float8)
        made = evaluate(largest.view(codes.dtype))
        return None if made is None else made.double().abs().reshape(rows, -1)

    def _rounding(self, value: Tensor) -> float:
        """Return the unit roundoff of the coarsest scale, or of a division in the weight's dtype."""
        coarsest = torch.finfo(value.dtype).eps
        for node in self.piece:
            if node.op == "get_attr":
                scale = self.program.attribute(node)
                if isinstance(scale, torch.Tensor) and scale.dtype in (torch.float32, torch.float16, torch.bfloat16):
                    coarsest = max(coarsest, torch.finfo(scale.dtype).eps)
        return coarsest / 2

    # --- the three ways ---------------------------------------------------------------------------------------------

    def _ways(self, leaf: Node, weight: Node, value: Tensor) -> list[_Way]:
        constant = self.constant
        tops = [n for n in constant if n.op != "get_attr" and self._is_top(n, constant) and leaf in self._sources(n)]
        if self._is_top(leaf, constant):
            tops.append(leaf)
        scales = [n for n in constant if self._is_top(n, constant) and n not in tops and self._is_scale(n, value)]
        ways: list[_Way] = []
        for top in tops:
            lay = _Layout(value)
            ways.append(_Way(lambda codes, top=top, lay=lay: lay(self._fold(leaf, codes, top)), self._sources(top)))  # type: ignore[misc]
        for top in tops:
            for scale in scales:
                for axis in (0, 1):
                    lay = _Layout(value)

                    def scaled(
                        codes: Tensor, top: Node = top, scale: Node = scale, axis: int = axis, lay: _Layout = lay
                    ) -> Tensor | None:
                        return _scaled(lay(self._fold(leaf, codes, top)), self._fold(leaf, codes, scale), axis)

                    ways.append(_Way(scaled, self._sources(top) | self._sources(scale)))
        probed = frozenset(n for n in constant if n.op == "get_attr")  # who takes part is not known
        ways.append(_Way(lambda codes: self._probed(leaf, codes, weight, value), probed))
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
        leaves = [p for p, _ in self.region.frontier if _is_floating(self.replay.values.get(p))]
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
                if _distance(stored * gain, theirs) < 1e-9 and bool((gain != 0).all()):
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


def _is_floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _distance(x: Tensor, y: Tensor) -> float:
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


def _fallback(step: Tensor, top: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return steps for where a flipped code is NaN (the largest fp8 number) or changes nothing: that of the largest
    number, or the row's largest."""
    if top is not None:
        largest = torch.finfo(dtype).max
        return top * (torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) / largest)
    known = torch.where(torch.isfinite(step), step, 0.0)
    return known.amax(1, keepdim=True).expand_as(step)

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
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.chains import FP8
from graphprobe.judge.codes import Grid
from graphprobe.judge.gains import Passage, factors
from graphprobe.judge.packing import flip, narrowest, uneven
from graphprobe.judge.ways import Evaluate, Way, Ways, distance, is_floating
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

Tensor = torch.Tensor
_FP4 = {getattr(torch, n) for n in dir(torch) if n.startswith("float4_")}  # two of them in a byte
_CODES = {torch.int8, torch.uint8, torch.int16, torch.int32, *FP8, *_FP4}
_NEAR = 0.5  # a candidate farther off than this, relative, stands for another weight
_CLOSER = 1e-6  # relative: two ways to one distance are told apart by their order
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
class _Target:
    """What codes may stand for: a floating weight, or one times gains."""

    weight: Node
    wanted: Tensor
    factor: Tensor | None


class Finder:
    """Finds the effective weights of one region whose codes live on `side`."""

    def __init__(self, replay: Replay, region: Region, side: str, relaxed: Collection[Node]) -> None:
        self.replay, self.region, self.side = replay, region, side
        self.other = "before" if side == "after" else "after"
        self.piece: tuple[Node, ...] = getattr(region, side)
        plan = replay.plan
        self.program = plan.after if side == "after" else plan.before
        self.ways = Ways(replay, region, side, self.program, relaxed)
        self.mine, self.theirs = (functools.cache(Passage(replay, region, s).gains) for s in (side, self.other))
        self.floating = self._floating(plan.before if side == "after" else plan.after)

    def _floating(self, program: object) -> dict[Node, Tensor]:
        found = {}
        for node in getattr(self.region, self.other):
            if node.op == "get_attr":
                value = program.attribute(node)  # type: ignore[attr-defined]
                if is_floating(value) and value.dtype not in FP8 and value.numel() > 1:
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
        best: tuple[float, _Target, Way, int] | None = None
        for fields in sorted(self._fields(codes)):
            for target in self._targets(leaf, codes.numel() * fields):
                for way in self.ways.of(leaf, target.weight, target.wanted):
                    held = way.evaluate(codes)
                    far = distance(held, target.wanted) if held is not None else math.inf
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
        self, codes: Tensor, float8: torch.dtype | None, target: _Target, way: Way, fields: int
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


def _fallback(step: Tensor, top: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return steps for where a flipped code is NaN (the largest fp8 number) or changes nothing: that of the largest
    number, or the row's largest."""
    if top is not None:
        largest = torch.finfo(dtype).max
        return top * (torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) / largest)
    known = torch.where(torch.isfinite(step), step, 0.0)
    return known.amax(1, keepdim=True).expand_as(step)

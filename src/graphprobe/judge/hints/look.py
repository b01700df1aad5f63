"""What a hint may look at: one guilty region, both of its exact values, and the values inside both pieces."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.execute import Values
from graphprobe.judge.culprit import Culprit
from graphprobe.judge.same import difference, rms
from graphprobe.lanes import elements, exact
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

Tensor = torch.Tensor
#: Two float64 tensors are called equal below this relative distance; what hints name differs by far more.
EQUAL = 1e-9


@dataclass(frozen=True, eq=False)
class Look:
    """A guilty region. Tensors are float64 on before's values at the frontier; elements nobody cares for are zero."""

    replay: Replay
    region: Region
    culprit: Culprit
    proved: list[Node] = field(default_factory=list)  # the operation that a trial has shown to be to blame

    @functools.cached_property
    def inside(self) -> tuple[Values, Values]:
        """The exact values of the nodes of both pieces and of their frontiers: of before, of after."""
        return self.replay.exact_values("before", self.region), self.replay.exact_values("after", self.region)

    @functools.cached_property
    def raw(self) -> tuple[Tensor, Tensor]:
        """The two exact results as they are: of before, of after."""
        mine, theirs = (
            self.replay.result(side, self.region, values)
            for side, values in zip(("before", "after"), self.inside, strict=True)
        )
        return mine, theirs

    @functools.cached_property
    def results(self) -> tuple[Tensor, Tensor]:
        """The two exact results in float64, without infinities and mask values that both sides share."""
        change, truth, _ = difference(self.replay, self.region, *self.raw)
        change, truth = torch.nan_to_num(change, 0.0, 0.0, 0.0), torch.nan_to_num(truth, 0.0, 0.0, 0.0)
        return truth, truth + change

    @property
    def truth(self) -> Tensor:
        """What before computes."""
        return self.results[0]

    @property
    def other(self) -> Tensor:
        """What after computes."""
        return self.results[1]

    @property
    def change(self) -> Tensor:
        """After minus before."""
        return self.other - self.truth

    def label(self, node: Node) -> str:
        """Return the node's name as reports show it."""
        plan = self.replay.plan
        return plan.after.label(node) if node in plan.after.order else plan.before.label(node)

    def weights(self, side: str) -> dict[Node, Tensor]:
        """Return the floating weights that one piece reads."""
        program = self.replay.plan.before if side == "before" else self.replay.plan.after
        found = {n: program.attribute(n) for n in getattr(self.region, side) if n.op == "get_attr"}
        return {n: v.detach() for n, v in found.items() if isinstance(v, Tensor) and v.is_floating_point()}

    def again(
        self, override: Mapping[Node, Tensor] | None = None, given: Mapping[Node, Tensor] | None = None
    ) -> Tensor | None:
        """Evaluate after's piece exactly with other values inside or at the frontier; None where that is impossible."""
        try:
            return self.replay.exact("after", self.region, given=given, override=override)
        except Exception:  # a value that does not fit: the trial fails, which is an answer
            return None

    def agrees(self, value: Any) -> bool:
        """Whether a trial's value is what before computes."""
        return isinstance(value, Tensor) and self.distance(value) < EQUAL

    def distance(self, value: Tensor) -> float:
        """Return the relative distance of a trial's value from what before computes; infinite for another class."""
        if value.shape != self.raw[0].shape:
            return math.inf
        change, truth, wrong = difference(self.replay, self.region, self.raw[0], value)
        if bool(wrong.any()):
            return math.inf
        return relative(rms(change), rms(truth))


def relative(top: float, bottom: float) -> float:
    """Return top / bottom; 0 for 0 / 0."""
    return top / bottom if bottom > 0 else (0.0 if top == 0 else math.inf)


def close(x: Tensor, y: Tensor, tolerance: float = EQUAL) -> bool:
    """Whether x is y up to a relative distance."""
    return x.shape == y.shape and relative(rms(x - y), rms(y)) < tolerance


def as_float(value: Any) -> Tensor | None:
    """Return a real floating tensor in float64, or None."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    return elements.real(exact.lift(value.detach())).double()


def dimension(x: Tensor, dim: int) -> str:
    """Name a dimension from the end, as people write it: 'dimension -1 (64)'."""
    return f"dimension {dim - x.dim()} ({x.shape[dim]})"


def bound(look: Look) -> float:
    """Return the size from which on a value is a mask's."""
    value = nodes.tensor_val(look.region.claim.before)
    return elements.sentinel_bound(value.dtype if value is not None else torch.float32)

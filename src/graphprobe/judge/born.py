"""Rule 8 in after's own run: NaN in an output of after where before has numbers, though every region agrees.

Masks compare as a class, so -inf may stand for the lowest number. But a softmax tells them apart: a row of lowest
numbers is a mean, a row of -inf is NaN. What a region makes of before's own mask does not show that; after's run does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch.fx import Node

from graphprobe.execute import run_program
from graphprobe.judge.nonfinite import RULE
from graphprobe.judge.rows import Measured, unit_roundoff
from graphprobe.lanes.replay import Replay
from graphprobe.program import Program


class Kind(Protocol):
    """What is needed of a judged region."""

    @property
    def measured(self) -> Measured: ...
    @property
    def kind(self) -> str: ...
    @property
    def spread(self) -> float | None: ...


_ROUNDING = 8.0  # unit roundoffs of an output that is the same but for NaN
J = TypeVar("J", bound=Kind)


def nan_is_told(replay: Replay, judged: list[J], standing: Sequence[str]) -> list[J]:
    """Call a finding nonfinite whose masks make NaN further down; where nothing stands, the region that makes it.

    Where it is before's mask that makes NaN, and all else agrees, after is the better one.
    """
    reached = [j for j in judged if j.measured.free_class]
    outputs = [j for j in reached if j.measured.region.claim.output]
    if not outputs:
        return judged
    plan = replay.plan
    mine = _count(plan.before, replay.inputs, [j.measured.region.claim.before for j in reached])
    theirs = _count(plan.after, replay.inputs, [j.measured.region.claim.after for j in reached], plan.dead())
    more = {j: theirs.get(c.after, 0) - mine.get(c.before, 0) for j in reached for c in [j.measured.region.claim]}
    stands = [j for j in judged if j.kind in standing]
    birth = _first(replay, [j for j in reached if more[j] > 0])
    if birth is not None:
        return _replaced(judged, _told(replay, birth, stands))
    birth = _first(replay, [j for j in reached if more[j] < 0])
    if (
        birth is None
        or not stands
        or len(_masks(stands)) < len(stands)
        or not all(_agrees(j, more[j]) for j in outputs)
    ):
        return judged
    note = f"before's mask makes NaN in {plan.before.label(birth.measured.region.claim.before)}: a row is masked whole"
    return _replaced(judged, {j: ("rounding", note, "after") for j in stands})


def _told(replay: Replay, birth: J, stands: list[J]) -> dict[J, tuple[str, str, str]]:
    """Return what becomes of which finding: (kind, note, which side is better)."""
    order = replay.plan.after.order
    place = order[birth.measured.region.claim.after]
    above = [j for j in stands if order[j.measured.region.claim.after] <= place]
    name = replay.plan.after.label(birth.measured.region.claim.after)
    note = f"its mask makes NaN in {name}: a row is masked whole"
    if above:
        return {j: ("nonfinite", note, "before") for j in _masks(above)}
    note = "on before's own values it agrees: after hands it a mask of infinities, before one of numbers"
    return {birth: ("nonfinite", note, "before")}


def _masks(stands: list[J]) -> list[J]:
    """Return the findings in which all numbers agree, and only infinities and mask values do not."""
    return [j for j in stands if j.kind == "semantic" and j.spread == float("inf") and not j.measured.introduced]


def _agrees(output: Kind, more: int) -> bool:
    """Whether an output is what before's is but for numbers where before has NaN."""
    m = output.measured
    return m.free_class == -more and m.total is not None and m.total <= _ROUNDING * unit_roundoff(m.region)


def _replaced(judged: list[J], told: dict[J, tuple[str, str, str]]) -> list[J]:
    def replaced(j: J) -> J:
        kind, note, better = told[j]
        return dataclasses.replace(j, kind=kind, rule=RULE, note=note, better=better)  # type: ignore[type-var]

    return [replaced(j) if j in told else j for j in judged]


def _first(replay: Replay, found: list[J]) -> J | None:
    """Return the first of the regions that starts from none of them."""
    ends = {j.measured.region.claim.after for j in found}
    fresh = [j for j in found if not any(q in ends for _, q in j.measured.region.frontier)]
    return min(fresh, key=lambda j: replay.plan.after.order[j.measured.region.claim.after], default=None)


def _count(program: Program, inputs: Any, wanted: list[Node], dead: Any = ()) -> dict[Node, int]:
    """Return how many NaNs each of these nodes holds in a run of its own."""

    def nans(_: Node, value: Any) -> int:
        floating = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
        return int(torch.isnan(value).sum()) if floating else 0

    return run_program(program, inputs, wanted, skip=dead, observe=nans)

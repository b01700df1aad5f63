"""Regions of which nobody can say what they compute: where they differ by more than rounding, nothing is fine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprobe import nodes
from graphprobe.execute import run_program
from graphprobe.judge.judging import Judged, Judgement
from graphprobe.judge.rows import unit_roundoff
from graphprobe.lanes.same import isomorphic

_LOUD = 8.0  # times the unit roundoff: a handful of operations may round so much


def is_open(judged: Judged) -> bool:
    """Whether a region could not be judged and introduces more than a few roundings."""
    introduced = judged.measured.introduced
    if judged.kind != "unknown" or introduced is None:
        return False
    return introduced > _LOUD * unit_roundoff(judged.region)


def question(judgement: Judgement, regions: Sequence[Judged]) -> str:
    """Say what is left open, and how it may be closed."""
    worst = max(regions, key=lambda j: j.measured.introduced or 0.0)
    name = judgement.replay.plan.after.label(worst.region.claim.after)
    why = f" ({worst.note})" if worst.note else ""
    many = f"{len(regions)} regions differ" if len(regions) > 1 else "a region differs"
    return (
        f"{many} by more than rounding and could not be judged: {name} by {worst.measured.introduced:.1e}{why}. No bug "
        "is known, and none is ruled out; graphprobe.exact_rule gives an operator its exact form"
    )


def void(judgement: Judgement, judged: Sequence[Judged]) -> list[Judged]:
    """Return the outputs that hold no number to compare, empty or all NaN, where other programs may have made them."""
    replay, silent = judgement.replay, [j for j in judged if j.measured.silent and j.kind == "identical"]
    outputs = [j.region.claim.before for j in silent if j.region.claim.output]
    replay.fetch(outputs)  # left behind by the lanes: hardly ever must anything be run for these alone
    if all(_numbers(replay.values.get(node)) for node in outputs):
        return []
    known = run_program(replay.plan.before, replay.inputs, [j.region.claim.before for j in silent])
    none = [j for j in silent if not _numbers(known.get(j.region.claim.before))]
    if all(isomorphic(j.region, judgement.weights) for j in none):
        return []
    return [j for j in none if j.region.claim.output]


def _numbers(value: object) -> bool:
    if not isinstance(value, torch.Tensor):
        return True
    narrow = value.dtype.itemsize == 1 and value.is_floating_point()  # 8-bit floats know no such questions
    return bool((value.float() if narrow else value).isfinite().any())


def emptiness(judgement: Judgement, outputs: Sequence[Judged]) -> str:
    """Say that nothing was compared of some outputs."""
    names = ", ".join(repr(j.region.claim.output) for j in outputs[:4]) + (" ..." if len(outputs) > 4 else "")
    sizes = [nodes.shape(j.region.claim.before) or () for j in outputs]
    why = "empty" if all(0 in size for size in sizes) else "empty, or NaN or infinite in every element,"
    return f"nothing was compared of {names}: it is {why} on these inputs; give others (--inputs)"

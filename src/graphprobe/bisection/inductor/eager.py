"""The model itself against the graphs that Dynamo has traced of it, and against itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphprobe.bisection.inductor.outputs import Compared, compared
from graphprobe.bisection.inductor.recording import Recording
from graphprobe.bisection.oracle import Answer
from graphprobe.bisection.search import BAD, GOOD, UNKNOWN
from graphprobe.capturing import quiet
from graphprobe.lanes import exact
from graphprobe.records import VERDICTS, Report


@dataclass(frozen=True)
class Traced:
    """What came of the comparison; `stage` is the guilty one, "eager" or "dynamo"."""

    answer: Answer
    stage: str = ""
    match: str | None = None
    notes: tuple[str, ...] = ()


def against_traced(recorded: Recording) -> Traced:
    """Run the model twice without the compiler and once as Dynamo has traced it, on the same inputs and seeds."""
    once, again, traced = recorded.eager(), recorded.eager(), recorded.run(recorded.as_fx())
    truth = _exact_leaves(recorded)
    unsteady = _compare(once, again, truth)
    if unsteady is None or unsteady.answer.verdict != GOOD:
        said = "eager itself returns another result when it is called again on the same inputs with the same seeds"
        report = Report(verdict="semantic", notes=(said,), outputs=_rows(once, again, truth))
        return Traced(Answer(BAD, said, report=report), "eager", None, (said,))
    found = _compare(once, traced, truth)
    if found is not None:
        return found
    said = "the model cannot be run in float64, so what is rounding between eager and Dynamo's graphs is unknown"
    return Traced(Answer(UNKNOWN, said), notes=(said,))


def _compare(x: list[Any], y: list[Any], truth: list[Any] | None) -> Traced | None:
    if [isinstance(a, torch.Tensor) for a in x] != [isinstance(b, torch.Tensor) for b in y]:
        said = f"{len(y)} values came back in place of {len(x)}"
        return Traced(Answer(BAD, said, report=Report(verdict="structural", notes=(said,))), "dynamo")
    found = _leaves(x, y, truth)
    if found is None:
        return None
    worst = max(found, key=lambda one: VERDICTS.index(one.kind), default=None)
    if worst is None or worst.kind in ("identical", "rounding"):
        return Traced(Answer(GOOD, worst.kind if worst else "identical"))
    stage = "eager" if worst.better == "after" else "dynamo"
    rows = tuple(one.row for one in found if one.row is not None)
    said = f"the graph that Dynamo has traced, output {worst.path}: {worst.said}"
    return Traced(Answer(BAD, worst.kind, report=Report(verdict=worst.kind, outputs=rows, notes=(said,))), stage)


def _leaves(x: list[Any], y: list[Any], truth: list[Any] | None) -> list[Compared] | None:
    """Compare leaf by leaf; None where values differ and nobody knows what is exact."""
    found = []
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        if not isinstance(a, torch.Tensor):
            continue
        t = truth[i] if truth is not None and isinstance(truth[i], torch.Tensor) else None
        one = compared(f"[{i}]", a, b, a if t is None else t)
        if t is None and one.kind not in ("identical", "structural"):
            return None
        found.append(one)
    return found


def _rows(x: list[Any], y: list[Any], truth: list[Any] | None) -> tuple[Any, ...]:
    return tuple(one.row for one in _leaves(x, y, truth or x) or () if one.row is not None)


def _exact_leaves(recorded: Recording) -> list[Any] | None:
    """Return the leaves of the model raised to float64, None where it cannot be run so."""
    lifted = pytree.tree_map(exact.lift, (recorded.args, recorded.kwargs))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
            model = copy.deepcopy(recorded.model).double()
            torch.manual_seed(0)
            return pytree.tree_leaves(model(*lifted[0], **lifted[1]))
    except Exception:
        return None

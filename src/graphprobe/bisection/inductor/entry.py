"""`graphprobe.bisect(..., pipeline="inductor")`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from graphprobe.bisection.inductor import recording
from graphprobe.bisection.inductor.checked import Check, Checked
from graphprobe.bisection.inductor.eager import Eager
from graphprobe.bisection.inductor.inquiry import Inquiry
from graphprobe.bisection.inductor.recorder import Interrupted, Plan, Recorder
from graphprobe.bisection.records import Bisection, BisectStep
from graphprobe.records import Report

Progress = Callable[[int, int, str], None]


def bisect(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    options: dict[str, Any],
    check: Check | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Bisection:
    """Say which stage, pass and match of Inductor, or which operation's generated code, makes the model wrong.

    With `check`, a function of something that is called like the model decides in place of graphprobe.diff; what
    graphprobe.diff finds at the stage that it names is reported beside it.
    """
    if progress is not None:
        progress(0, 5, "compiling")
    try:
        recorded = recording.record(model, args, kwargs)
        found = (
            Inquiry(recorded, options, command, progress).run() if check is None else _checked(recorded, check, options)
        )
        return found
    except Interrupted as error:
        return (
            _fails_itself(model, args, kwargs, error) or _spoiled(model, args, kwargs, error, options) or _failed(error)
        )
    finally:
        torch.compiler.reset()


def _checked(recorded: recording.Recording, check: Check, options: dict[str, Any]) -> Bisection:
    inquiry = Inquiry(recorded, options)
    found = Checked(recorded, check, inquiry.trials.stops()).run()
    judged = inquiry.run()
    if found.transform is None or found.transform != judged.transform:
        return dataclasses.replace(found, report=judged.report if found.transform is None else None)
    return dataclasses.replace(found, match=judged.match, matches=judged.matches, report=judged.report)


def _fails_itself(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Interrupted
) -> Bisection | None:
    """Return the answer for a model that raises without the compiler, too; None for one that does not."""
    eager = Eager(recording.Recording(model, model, Recorder(), args, kwargs))
    if not eager.error:
        return None
    note = f"the model itself raises {eager.error}: no stage of the compiler is to blame"
    return Bisection(verdict="unknown", steps=(_compiling("unknown", error),), notes=(note,), pipeline="inductor")


def _spoiled(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Interrupted, options: dict[str, Any]
) -> Bisection | None:
    """Return the answer where the compiler fails on a graph that one of its own passes has made wrong before."""
    try:
        recorded = recording.record(model, args, kwargs, Plan(codegen=False))
    except Interrupted:
        return None
    found = Inquiry(recorded, options).run_graphs()
    if found.transform is None:
        return None
    note = f"after {found.transform} the compiler fails in {error.label}: {error}"
    steps = (_compiling("bad", error), *found.steps)
    return dataclasses.replace(found, steps=steps, notes=(note, *found.notes))


def _compiling(verdict: str, error: Interrupted) -> BisectStep:
    return BisectStep("compiling the model", (), verdict, str(error))


def _failed(error: Interrupted) -> Bisection:
    label = error.label
    return Bisection(
        verdict="bad",
        transform=label,
        transforms=(label,),
        together=((label,),),
        report=Report(verdict="structural", notes=(f"the compiler failed in {label}: {error}",)),
        steps=(_compiling("bad", error),),
        pipeline="inductor",
    )

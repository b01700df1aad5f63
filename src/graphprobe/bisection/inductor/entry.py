"""`graphprobe.bisect(..., pipeline="inductor")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphprobe.bisection.inductor import recording
from graphprobe.bisection.inductor.inquiry import Inquiry
from graphprobe.bisection.records import Bisection, BisectStep
from graphprobe.records import Report

Progress = Callable[[int, int, str], None]


def bisect(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    options: dict[str, Any],
    progress: Progress | None = None,
) -> Bisection:
    """Say which stage, pass and match of Inductor, or which operation's generated code, makes the model wrong."""
    if progress is not None:
        progress(0, 5, "compiling")
    try:
        recorded = recording.record(model, args, kwargs)
        return Inquiry(recorded, options, progress=progress).run()
    except recording.Interrupted as error:
        return _failed(error)
    finally:
        torch.compiler.reset()


def _failed(error: recording.Interrupted) -> Bisection:
    label = f"{error.stage}: {error.name}" if error.name else error.stage
    reason = str(error)
    return Bisection(
        verdict="bad",
        transform=label,
        transforms=(label,),
        together=((label,),),
        report=Report(verdict="structural", notes=(f"the compiler failed in {label}: {reason}",)),
        steps=(BisectStep("compiling the model", (), "bad", reason),),
        pipeline="inductor",
    )

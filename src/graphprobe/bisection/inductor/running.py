"""`graphprobe.run(..., pipeline="inductor")`: every pass of Inductor as a step of a run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from graphprobe.bisection.inductor import code, recording
from graphprobe.bisection.inductor.inquiry import Segment, segments_of
from graphprobe.bisection.inductor.outputs import Reference
from graphprobe.bisection.inductor.snapshots import Piece, Snapshot
from graphprobe.bisection.oracle import Answer, compare
from graphprobe.bisection.search import UNKNOWN
from graphprobe.records import VERDICTS, Report, RunReport, RunStep

Write = Callable[[GraphModule, str, str, RunStep | None], str]


def run(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    names: Sequence[str],
    options: dict[str, Any],
    write: Write | None = None,
) -> RunReport:
    """Compile a model and return one step for each pass that changed a graph, the generated code last.

    `names` are the checks asked for: "diff" compares each graph with the one before it and the code with the last
    graph, "total" the first graph with the last and the code. `write` dumps a graph and returns the dump's name.
    """
    started = time.perf_counter()
    try:
        recorded = recording.record(model, args, kwargs)
        steps = [step for piece in recorded.pieces for step in _steps(piece, names, options, write)]
        total = _total(recorded.pieces, options) if "total" in names else None
        last = recorded.pieces[-1].snapshots[-1].gm if recorded.pieces else None
    except recording.Interrupted as error:
        label = f"{error.stage}: {error.name}" if error.name else error.stage
        steps = [RunStep(error.name or error.stage, label, error.stage, "failed", reason=str(error), error=str(error))]
        total = last = None
    finally:
        torch.compiler.reset()
    return RunReport("inductor", tuple(steps), total, seconds=time.perf_counter() - started, gm=last)


def _steps(piece: Piece, names: Sequence[str], options: dict[str, Any], write: Write | None) -> list[RunStep]:
    steps = []
    for segment in segments_of(piece):
        for place, snapshot in enumerate(segment.snapshots):
            found = _compared(segment, place, options) if "diff" in names and place else None
            step = _step(segment, place, snapshot, found)
            dump = write(segment.graphs[place], snapshot.stage, snapshot.name or "traced", step) if write else ""
            steps.append(dataclasses.replace(step, dump=dump))
    if "diff" in names:
        found = _code(piece)
        steps.append(RunStep("generated_code", "codegen", "codegen", "applied", report=found.report))
    return steps


def _step(segment: Segment, place: int, snapshot: Snapshot, found: Answer | None) -> RunStep:
    before = segment.graphs[max(place - 1, 0)]
    return RunStep(
        name=snapshot.name or snapshot.stage,
        transform=snapshot.label,
        stage=snapshot.stage,
        status="applied",
        matches=tuple(str(hit) for hit in snapshot.hits),
        created=snapshot.created,
        erased=snapshot.erased,
        rewritten=snapshot.rewritten,
        replacements=snapshot.replacements,
        nodes_before=len(before.graph.nodes),
        nodes_after=len(segment.graphs[place].graph.nodes),
        seconds=snapshot.seconds,
        report=found.report if found is not None else None,
    )


def _compared(segment: Segment, place: int, options: dict[str, Any]) -> Answer:
    before, after = segment.graphs[place - 1], segment.graphs[place]
    return compare(before, after, segment.inputs, {}, segment.snapshots[place].replacements, options)


def _code(piece: Piece) -> Answer:
    try:
        reference = Reference.of(piece.snapshots[-1].gm, piece.inner_inputs or ())
        return code.judge(reference, piece.inner_outputs or (), "the generated code")
    except Exception as error:  # the graph cannot be run in exact arithmetic
        reason = f"the generated code cannot be judged: {type(error).__name__}: {error}"
        return Answer(UNKNOWN, reason, report=Report(verdict="unknown", notes=(reason,)))


def _total(pieces: Sequence[Piece], options: dict[str, Any]) -> Report | None:
    """Return the gravest report of any piece: its first graph against its last, and that against the code."""
    answers = []
    for piece in pieces:
        for segment in segments_of(piece):
            events = tuple(e for snapshot in segment.snapshots for e in snapshot.replacements)
            answers.append(compare(segment.graphs[0], segment.graphs[-1], segment.inputs, {}, events, options))
        answers.append(_code(piece))
    reports = [answer.report for answer in answers if answer.report is not None]
    return max(reports, key=lambda report: VERDICTS.index(report.verdict), default=None)

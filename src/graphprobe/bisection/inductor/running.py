"""`graphprobe.run(..., pipeline="inductor")`: every pass of Inductor as a step of a run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from graphprobe.bisection.choice import CODE, Choice
from graphprobe.bisection.inductor import recording
from graphprobe.bisection.inductor.recorder import Interrupted
from graphprobe.bisection.inductor.segments import Segment
from graphprobe.bisection.inductor.snapshots import Piece, Snapshot
from graphprobe.bisection.inductor.trials import Trials
from graphprobe.bisection.oracle import Answer
from graphprobe.bisection.search import GOOD, UNKNOWN
from graphprobe.records import VERDICTS, Report, RunReport, RunStep

Write = Callable[[GraphModule, str, str, RunStep | None], str]


def run(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    names: Sequence[str],
    options: dict[str, Any],
    choice: Choice | None = None,
    write: Write | None = None,
) -> RunReport:
    """Compile a model and return one step for each pass that changed a graph, the generated code last.

    `names` are the checks asked for: "diff" compares each graph with the one before it and the code with the last
    graph, "total" the first graph with the last and the code. With a `choice` of two points only these are compared.
    `write` dumps a graph and returns the dump's name. Raises PipelineError for a choice that the compilation has not.
    """
    started = time.perf_counter()
    choice = choice or Choice()
    try:
        recorded = recording.record(model, args, kwargs)
        trials = Trials(recorded, options)
        last = recorded.pieces[-1].snapshots[-1].gm if recorded.pieces else None
        if choice.is_all:
            steps = [step for piece in recorded.pieces for step in _steps(trials, piece, names, write)]
            total = _total(trials) if "total" in names else None
        else:
            total = _chosen(trials, choice)
            steps = [RunStep(choice.after or CODE, f"{choice.before} to {choice.after or 'the end'}", "", "applied")]
    except Interrupted as error:
        steps = [
            RunStep(error.name or error.stage, error.label, error.stage, "failed", reason=str(error), error=str(error))
        ]
        total = last = None
    finally:
        torch.compiler.reset()
    return RunReport(str(choice), tuple(steps), total, seconds=time.perf_counter() - started, gm=last)


def _chosen(trials: Trials, choice: Choice) -> Report:
    answer = trials.ask(choice)
    verdict = {GOOD: "rounding", UNKNOWN: "unknown"}.get(answer.verdict, "semantic")
    return answer.report or Report(verdict=verdict, notes=(answer.reason,))


def _steps(trials: Trials, piece: Piece, names: Sequence[str], write: Write | None) -> list[RunStep]:
    steps = []
    for segment in trials.segments(piece):
        for place, snapshot in enumerate(segment.snapshots):
            pair = Choice(segment.labels[place - 1], segment.labels[place], piece.number)
            found = trials.ask(pair) if "diff" in names and place else None
            step = _step(segment, place, snapshot, found)
            dump = write(segment.graphs[place], snapshot.stage, snapshot.name or "traced", step) if write else ""
            steps.append(dataclasses.replace(step, dump=dump))
    if "diff" in names:
        report = _report(trials.ask(Choice("", CODE, piece.number)))
        steps.append(RunStep("generated_code", "codegen", "codegen", "applied", report=report))
    return steps


def _step(segment: Segment, place: int, snapshot: Snapshot, found: Answer | None) -> RunStep:
    before = segment.graphs[max(place - 1, 0)]
    return RunStep(
        name=snapshot.name or snapshot.stage,
        transform=segment.labels[place],
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


def _report(answer: Answer) -> Report:
    return answer.report or Report(verdict="unknown", notes=(f"it cannot be judged: {answer.reason}",))


def _total(trials: Trials) -> Report | None:
    """Return the gravest report of any piece: its first graph against its last, and that against the code."""
    reports = []
    for piece in trials.recorded.pieces:
        ends = [(segment.labels[0], segment.labels[-1]) for segment in trials.segments(piece)]
        reports += [_report(trials.ask(Choice(before, after, piece.number))) for before, after in ends]
        reports.append(_report(trials.ask(Choice("", CODE, piece.number))))
    return max(reports, key=lambda report: VERDICTS.index(report.verdict), default=None)

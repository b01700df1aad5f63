"""The answer of a run: its steps, and what the checks found after each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from graphprobe.records.graphs import Lint, Replacement
from graphprobe.records.plain import SCHEMA_VERSION, parse, to_data
from graphprobe.records.reports import Report

#: How a transform of a run can end.
STATUSES = ("applied", "matched nothing", "disabled", "skipped", "failed")


@dataclass(frozen=True)
class RunStep:
    """One transform of a run: what came of it, what it did to the graph, and what the checks found after it."""

    name: str
    transform: str  # its text form, with its options
    stage: str
    status: str  # one of STATUSES
    matches: tuple[str, ...] = ()  # one name (a module path or node) for each place that matched
    missed: int = 0  # places that it looked at and left alone, where others matched
    reason: str = ""  # why it matched nothing or not there, or was not run to its end
    near_miss: str = ""  # the node where it came nearest to a match
    created: tuple[str, ...] = ()
    erased: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    replacements: tuple[Replacement, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0  # of the transform itself
    overhead: float = 0.0  # seconds of clean-up, checks and dumps around it
    weights_before: int = 0  # bytes of the tensors that the graph owns
    weights_after: int = 0
    memory_before: int = 0  # bytes: allocated on the accelerator, on a CPU the resident memory of the process
    memory_after: int = 0
    lints: tuple[Lint, ...] = ()  # defects that were not there before it, healed later or not
    notes: tuple[str, ...] = ()
    report: Report | None = None  # the graph before it against the graph after it, where that was asked for
    error: str = ""  # the traceback of what ended it
    dump: str = ""  # the name of its dump, without directory

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong here."""
        return self.status != "failed" and not self.lints and (self.report is None or self.report.ok)


@dataclass(frozen=True)
class RunReport:
    """What a pipeline did to a model, step by step. `gm` is the transformed graph; it is not part of the JSON form."""

    pipeline: str  # the text form that reproduces the run
    steps: tuple[RunStep, ...] = ()
    report: Report | None = None  # the captured graph against the last one, where that was asked for
    notes: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    dump_dir: str = ""
    seconds: float = 0.0
    version: int = SCHEMA_VERSION
    gm: Any = field(default=None, repr=False, compare=False, metadata={"unsaved": True})

    @property
    def ok(self) -> bool:
        """Whether no transform failed, no check found a defect, and every comparison passed."""
        return all(step.ok for step in self.steps) and (self.report is None or self.report.ok)

    @property
    def first(self) -> RunStep | None:
        """The first transform with which something went wrong, or None."""
        return next((step for step in self.steps if not step.ok), None)

    @property
    def events(self) -> tuple[Replacement, ...]:
        """All replacements of all steps, in order: what `graphprobe.diff` takes as ``events=``."""
        return tuple(event for step in self.steps for event in step.replacements)

    @property
    def exit_code(self) -> int:
        """0 all is well, 1 a check or a comparison found something, 2 a transform failed or could not be judged."""
        reports = [step.report for step in self.steps] + [self.report]
        unjudged = any(report is not None and report.exit_code == 2 for report in reports)
        if unjudged or any(step.status == "failed" for step in self.steps):
            return 2
        return 0 if self.ok else 1

    def to_json(self, indent: int | None = None) -> str:
        """Return the report as JSON text; non-finite numbers become strings."""
        return json.dumps(to_data(self), indent=indent)

    @staticmethod
    def from_json(text: str) -> RunReport:
        """Read a report that `to_json` wrote. Raises ValueError where it is not one."""
        return parse(RunReport, text, "pipeline")

    def __str__(self) -> str:
        from graphprobe.render import runs

        return runs.text(self)

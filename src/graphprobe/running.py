"""`graphprobe.run`: a pipeline over a model, with checks and dumps after each transform."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule

from graphprobe import api, checking, fxfile, inputs
from graphprobe.bisection import built_in
from graphprobe.bisection.choice import Choice, is_inductor
from graphprobe.capturing import capture
from graphprobe.dumps.directory import DumpDirectory
from graphprobe.dumps.names import ENVIRONMENT
from graphprobe.errors import GraphprobeError
from graphprobe.pipeline import Applied, NotApplied, Pipeline, Step, Transform, commonest, fresh_copy
from graphprobe.pipeline.hygiene import clean_up
from graphprobe.pipeline.running import Run
from graphprobe.records import Lint, Replacement, Report, RunReport, RunStep

Progress = Callable[[int, int, str], None]
_EVENTS = "graphprobe_events"  # where graphprobe.save looks for replacements
_MEMORY_STEP = 5_000_000  # bytes; AutoDeploy's threshold for a change worth a word


def run(
    model: api.Side,
    args: tuple[Any, ...] | list[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    pipeline: Any,
    dump_dir: str | os.PathLike[str] | None = None,
    dump_weights: bool = True,
    check: Sequence[str] = checking.DEFAULT,
    dynamic_shapes: Any = None,
    exact: str = "auto",
    valid: torch.Tensor | None = None,
    accept: Sequence[str] = (),
    allow: Sequence[str] = (),
    min_coverage: float = 0.9,
    progress: Progress | None = None,
) -> RunReport:
    """Run a pipeline of graph transforms over a model and say, step by step, what each did and what it broke.

    `model` is an nn.Module, an ExportedProgram, a GraphModule or the path of an ``.fx`` file, `pipeline` whatever
    ``Pipeline.of`` takes: its text form, a YAML file, transforms, functions, a PassManager, or a list of such; or
    "inductor", PyTorch's own compiler, each of whose passes that changes a graph is a step (compared where `check`
    asks for it, without lints; ``inductor{before="aot", after="codegen"}`` compares these two points). After each
    transform the graph is checked as `check` says (``checking.NAMES``; "lint" stands for all that needs no inputs,
    "all" for all; "diff" compares with the graph before the transform, "total" the last graph with the first, under
    the given `exact`, `valid`, `accept`, `allow` and `min_coverage`), and dumped into
    `dump_dir`, by default what ``AD_DUMP_GRAPHS_DIR`` names; without `dump_weights` the dumps hold no weights and
    cannot be run. A transform that raises ends the run: its step is marked failed and the result is the graph before
    it. The transforms work on a copy that shares the model's weights. Raises PipelineError, CaptureError, InputError,
    FxFileError, MismatchError.
    """
    names = checking.chosen(check)
    options = {
        "exact": exact,
        "valid": valid,
        "accept": tuple(accept),
        "allow": tuple(allow),
        "min_coverage": min_coverage,
    }
    directory = dump_dir if dump_dir is not None else os.environ.get(ENVIRONMENT) or None
    if is_inductor(pipeline):
        dumps = None if directory is None else DumpDirectory.open(Path(directory), weights=dump_weights)
        return _compiler(pipeline, model, tuple(args), kwargs, names, options, dumps)
    gm, call = _captured(model, tuple(args), kwargs, dynamic_shapes, names)
    gm = fresh_copy(gm)
    session = _Session(
        plan=built_in.plan(pipeline, gm, *call),
        names=names,
        options=options,
        progress=progress,
        watchman=checking.Watchman(names),
        call=call,
    )
    if directory is not None:
        session.dumps = DumpDirectory.open(Path(directory), weights=dump_weights)
    return session.run(gm)


def _compiler(
    pipeline: str,
    model: api.Side,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
    names: Sequence[str],
    options: dict[str, Any],
    dumps: DumpDirectory | None,
) -> RunReport:
    from graphprobe.bisection import entry, inductor  # late: Inductor takes seconds to import

    module, args, call = entry.callable_model(model, args, kwargs)
    write = None if dumps is None else dumps.write
    choice = Choice.parse(pipeline)
    report = inductor.run(module, args, call, names=names, options=options, choice=choice, write=write)
    report = dataclasses.replace(report, environment=api.environment(dict(enumerate_leaves(args, call))))
    if dumps is not None:
        report = dataclasses.replace(report, dump_dir=str(dumps.path))
        dumps.close(report)
    return report


def enumerate_leaves(*values: Any) -> list[tuple[str, Any]]:
    """Return the leaves of nested values with their numbers as names."""
    return [(str(i), leaf) for i, leaf in enumerate(pytree.tree_leaves(values))]


def _captured(
    model: api.Side, args: tuple[Any, ...], kwargs: dict[str, Any] | None, dynamic_shapes: Any, names: Sequence[str]
) -> tuple[GraphModule, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the graph and the inputs to compare with: given, stored with a file, or drawn where one will compare."""
    stored = None
    if isinstance(model, (str, os.PathLike)):
        stored = fxfile.load_inputs(model)
        model = fxfile.load(model)
    if not args and not kwargs and stored is not None:
        args, kwargs = stored
    gm = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    if not args and not kwargs and set(names) & set(checking.COMPARISONS):
        args, kwargs = inputs.draw(gm)
    return gm, (args, dict(kwargs or {}))


@dataclass
class _Session:
    """One run: the pipeline's hooks, and what they have seen."""

    plan: Pipeline
    names: tuple[str, ...]
    options: dict[str, Any]
    progress: Progress | None
    watchman: checking.Watchman
    call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    dumps: DumpDirectory | None = None
    steps: list[RunStep] = field(default_factory=list)
    _before: GraphModule | None = None
    _started: float = 0.0
    _lints: tuple[Lint, ...] = ()
    _weights: int = 0
    _memory: int = 0

    def run(self, gm: GraphModule) -> RunReport:
        started = time.perf_counter()
        captured, gm = gm, fresh_copy(gm)
        clean_up(gm)  # what export leaves behind is no transform's doing
        self._mark(gm)
        if self.dumps is not None:
            self.dumps.write(gm, "export", "export_to_gm")
        self._started = time.perf_counter()
        result = self.plan.run(
            gm,
            self._after_each,
            before_each=self._before_each,
            after_apply=self._after_apply,
            raising=False,
        )
        self._say("done")
        result.gm.meta[_EVENTS] = (*captured.meta.get(_EVENTS, ()), *result.events)
        report = RunReport(
            pipeline=self._text(),
            steps=tuple(self.steps),
            report=self._total(captured, result),
            notes=self.plan.notes,
            environment=api.environment({str(i): v for i, v in enumerate(pytree.tree_leaves(self.call))}),
            dump_dir="" if self.dumps is None else str(self.dumps.path),
            seconds=time.perf_counter() - started,
            gm=result.gm,
        )
        if self.dumps is not None:
            self.dumps.close(report)
        return report

    def _text(self) -> str:
        try:
            return str(self.plan)
        except GraphprobeError:  # an option without a text form; the steps name their transforms all the same
            return ",".join(transform.name for transform in self.plan.transforms)

    # --- hooks -------------------------------------------------------------------------------------------------------

    def _before_each(self, gm: GraphModule, transform: Transform) -> None:
        self._say(transform.name)
        self.watchman.start(gm)
        self._before = fresh_copy(gm) if "diff" in self.names else None
        self._mark(gm)

    def _mark(self, gm: GraphModule) -> None:
        self._lints, self._weights, self._memory = (), weight_bytes(gm), memory_in_use(gm)

    def _after_apply(self, gm: GraphModule, step: Step) -> None:
        self._lints = self.watchman.after_apply(gm, step.transform)

    def _after_each(self, gm: GraphModule, step: Step) -> None:
        ran = step.status in ("applied", "matched nothing")
        settled = step.status == "skipped" and bool(step.traceback)  # it raised, was undone, and the run goes on
        if ran:
            self._lints += self.watchman.after_clean_up(gm, step.transform)
        report, notes = self._compared(gm, step) if ran else (None, ())
        row = self._row(gm, step, report, notes)
        if self.dumps is not None and (ran or step.status == "disabled" or settled):
            changed = ran and (self.watchman.changed or step.observation.changed)
            written = self.watchman.written if ran else ()
            name = self.dumps.write(gm, step.stage, step.name, row, changed=changed, written=written)
            row = dataclasses.replace(row, dump=name)
        now = time.perf_counter()
        self.steps.append(dataclasses.replace(row, overhead=max(0.0, now - self._started - step.seconds)))
        self._started = now
        self._mark(gm)

    def _row(self, gm: GraphModule, step: Step, report: Report | None, notes: tuple[str, ...]) -> RunStep:
        outcome, seen = step.outcome, step.observation
        missed = outcome.misses if isinstance(outcome, Applied) else ()
        why = outcome if isinstance(outcome, NotApplied) else commonest(missed) if missed else NotApplied("")
        weights = weight_bytes(gm)
        index = len(self.steps)
        expected = index < len(self.plan.settings) and self.plan.settings[index].expect_mem_change
        if abs(weights - self._weights) > _MEMORY_STEP and not expected:
            notes = (*notes, f"the weights went from {self._weights / 1e6:.0f} to {weights / 1e6:.0f} MB")
        return RunStep(
            name=step.name,
            transform=step.transform,
            stage=step.stage,
            status=step.status,
            matches=outcome.matches if isinstance(outcome, Applied) else (),
            missed=len(missed),
            reason=why.reason,
            near_miss=why.node,
            created=seen.created,
            erased=seen.erased,
            rewritten=seen.rewritten,
            replacements=seen.replacements,
            nodes_before=step.nodes_before,
            nodes_after=step.nodes_after,
            seconds=step.seconds,
            weights_before=self._weights,
            weights_after=weights,
            memory_before=self._memory,
            memory_after=memory_in_use(gm),
            lints=self._lints,
            notes=(*step.notes, *notes),
            report=report,
            error=step.traceback,
        )

    # --- comparisons -------------------------------------------------------------------------------------------------

    def _compared(self, gm: GraphModule, step: Step) -> tuple[Report | None, tuple[str, ...]]:
        seen = step.observation
        if self._before is None or not seen.changed:
            return None, ()
        return self._diff(self._before, gm, seen.replacements, Run(gm, (step,)))

    def _total(self, captured: GraphModule, result: Run) -> Report | None:
        if "total" not in self.names:
            return None
        return self._diff(captured, result.gm, result.events, result)[0]

    def _diff(
        self, before: GraphModule, after: GraphModule, events: Sequence[Replacement], run: Run
    ) -> tuple[Report | None, tuple[str, ...]]:
        """Compare; a graph that cannot be compared at all is an answer, too."""
        args, kwargs = self.call
        try:
            return run.attributed(api.diff(before, after, args, kwargs, events=events, **self.options)), ()
        except GraphprobeError as error:
            failed = Report(verdict="structural", notes=(f"it could not be compared: {error}",))
            return failed, failed.notes

    def _say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(len(self.steps), len(self.plan.transforms), what)


def weight_bytes(gm: GraphModule) -> int:
    """Return the bytes of the tensors that a graph owns, shared memory counted once."""
    owned = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*gm.parameters(), *gm.buffers())}
    return sum(owned.values())


def memory_in_use(gm: GraphModule) -> int:
    """Return the bytes allocated on the graph's accelerator; on a CPU the resident memory of the process (Linux)."""
    device = inputs.device_of(gm)
    if device is not None and device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

"""Run a pipeline step by step under observation."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.fx import GraphModule

from graphprobe import observe
from graphprobe.errors import PipelineError
from graphprobe.pipeline import hygiene
from graphprobe.pipeline.functions import adopt
from graphprobe.pipeline.text import transform_text
from graphprobe.pipeline.transform import Applied, NotApplied, Outcome, Settings, Transform, Unsaid
from graphprobe.records import Replacement, Report


@dataclass(frozen=True)
class Step:
    """One transform of one run: what came of it, what it did, and the graph's size before and after."""

    transform: str  # its text form
    stage: str
    outcome: Outcome
    observation: observe.Observation
    seconds: float
    nodes_before: int
    nodes_after: int
    name: str = ""
    status: str = "applied"  # one of records.STATUSES
    notes: tuple[str, ...] = ()
    traceback: str = ""  # of the error that ended it


@dataclass(frozen=True)
class Run:
    """A transformed graph, and how it came about."""

    gm: GraphModule
    steps: tuple[Step, ...]

    @property
    def events(self) -> tuple[Replacement, ...]:
        """All replacements of all steps, in order: what `graphprobe.diff` takes as ``events=``."""
        return tuple(event for step in self.steps for event in step.observation.replacements)

    def author(self, node: str) -> str:
        """Return the text form of the transform that last made or rewrote the node, or put another weight in its
        place; '' where none did.
        """
        found = next((n for n in self.gm.graph.nodes if n.name == node), None)
        weights = [] if found is None else [n.name for n in found.all_input_nodes if n.op == "get_attr"]
        for step in reversed(self.steps):
            changed = {*step.observation.created, *step.observation.rewritten}
            if not changed.isdisjoint((node, *weights)):
                return step.transform
        return ""

    def attributed(self, report: Report) -> Report:
        """Return the report of a diff against `gm` in which each finding names the transform that made its culprit."""
        findings = tuple(
            dataclasses.replace(finding, transform=self.author(finding.culprit) or finding.transform)
            for finding in report.findings
        )
        return dataclasses.replace(report, findings=findings)


Before = Callable[[GraphModule, Transform], None]
After = Callable[[GraphModule, Step], None]


@dataclass
class Runner:
    """Applies transforms to one graph, where it stands, and keeps account of its state between them."""

    gm: GraphModule
    before_each: Before | None = None
    after_apply: After | None = None  # before clean-up and shape propagation can hide what a transform left behind
    after_each: After | None = None
    raising: bool = True
    clean: bool = True
    shapes_known: bool = True
    failed: str = ""

    def step(self, transform: Transform, settings: Settings) -> Step:
        """Apply one transform, or say why not. Raises PipelineError where it fails and `raising` is set."""
        if self.failed:
            step = self._idle(transform, settings, "skipped", f"not run, because {self.failed} failed before it")
        elif not settings.enabled:
            step = self._idle(transform, settings, "disabled", "switched off by the pipeline")
        else:
            step = self._apply(transform, settings)
        if step.status == "failed":
            self.failed = step.transform
        if self.after_each is not None:
            self.after_each(self.gm, step)
        return step

    def _apply(self, transform: Transform, settings: Settings) -> Step:
        notes = list(self._prepare(settings))
        if self.before_each is not None:
            self.before_each(self.gm, transform)
        backup = None if self.raising and not settings.skip_on_error else hygiene.fresh_copy(self.gm, compiled=False)
        text, size = transform_text(transform), len(self.gm.graph.nodes)
        start = time.perf_counter()
        try:
            outcome, observation = _watched(transform, self.gm, text)
        except (Exception, SystemExit) as error:
            if backup is None:
                raise error if isinstance(error, PipelineError) else _failure(text, error) from error
            adopt(self.gm, backup, text)
            status = "skipped" if settings.skip_on_error else "failed"
            return dataclasses.replace(
                self._idle(transform, settings, status, str(error) or type(error).__name__),
                seconds=time.perf_counter() - start,
                traceback="".join(traceback.format_exception(error)),
            )
        step = Step(
            text,
            settings.stage or transform.stage,
            outcome,
            observation,
            time.perf_counter() - start,
            size,
            len(self.gm.graph.nodes),
            transform.name,
            "applied" if isinstance(outcome, Applied) else "matched nothing",
            (*notes, *_contradictions(outcome, observation)),
        )
        self._note_state(observation)
        if self.after_apply is not None:
            self.after_apply(self.gm, step)
        more = tuple(self._finish(settings))
        return dataclasses.replace(step, nodes_after=len(self.gm.graph.nodes), notes=step.notes + more)

    def _idle(self, transform: Transform, settings: Settings, status: str, reason: str) -> Step:
        size, stage = len(self.gm.graph.nodes), settings.stage or transform.stage
        text, nothing = transform_text(transform), observe.Observation()
        return Step(text, stage, NotApplied(reason), nothing, 0.0, size, size, transform.name, status)

    def _note_state(self, observation: observe.Observation) -> None:
        if observation.changed:
            self.clean = self.shapes_known = False

    def _prepare(self, settings: Settings) -> Iterator[str]:
        if settings.requires_clean_graph and not self.clean:
            yield from self._clean()
        if settings.requires_shape_prop and not self.shapes_known:
            yield from self._propagate()

    def _finish(self, settings: Settings) -> Iterator[str]:
        if settings.run_graph_cleanup and not self.clean:
            yield from self._clean()
        if settings.run_shape_prop and not self.shapes_known:
            yield from self._propagate()

    def _clean(self) -> Iterator[str]:
        hygiene.clean_up(self.gm)
        self.clean = True
        yield from ()

    def _propagate(self) -> Iterator[str]:
        why = hygiene.propagate_shapes(self.gm)
        self.shapes_known = not why
        if why:
            yield f"shape propagation stopped: {why}"


def _watched(transform: Transform, gm: GraphModule, text: str) -> tuple[Outcome, observe.Observation]:
    """Apply a transform and check what it leaves. Raises PipelineError, and whatever the transform raises."""
    with observe.watch(gm, text) as observation:
        outcome = transform.apply(gm)
    if not isinstance(outcome, (Applied, NotApplied, Unsaid)):
        raise PipelineError(
            f"the transform {text} returned {type(outcome).__name__}: apply(gm) must return Applied or NotApplied"
        )
    try:
        for one in gm.modules():
            if isinstance(one, GraphModule):
                one.graph.lint()
                one.recompile()
    except Exception as error:
        raise PipelineError(f"the transform {text} left an invalid graph: {error}") from error
    if len(gm.graph.find_nodes(op="output")) != 1:
        raise PipelineError(f"the transform {text} left an invalid graph: it must have one output node")
    return (_inferred(observation) if isinstance(outcome, Unsaid) else outcome), observation


def _failure(text: str, error: Exception | SystemExit) -> PipelineError:
    return PipelineError(f"the transform {text} failed: {type(error).__name__}: {error}")


def _inferred(observation: observe.Observation) -> Outcome:
    """What a function that says nothing has matched: the nodes that it replaced, else those that it touched."""
    if observation.retraced and observation.changed:
        return Applied(("(the whole graph)",))
    replaced = tuple(dict.fromkeys(claim.old for claim in observation.replacements))
    touched = replaced or observation.created or observation.rewritten or observation.erased
    return Applied(touched) if touched else NotApplied("it made, erased and rewrote no node")


def _contradictions(outcome: Outcome, observation: observe.Observation) -> Iterator[str]:
    changed = len(observation.created) + len(observation.erased) + len(observation.rewritten)
    if isinstance(outcome, NotApplied) and changed:
        yield f"it says that it matched nothing, but {changed} nodes were made, erased or rewritten"
    if isinstance(outcome, Applied) and outcome.matches and not changed:
        yield f"it says that it matched {len(outcome.matches)} places, but no node was made, erased or rewritten"

"""Trials of a pipeline: any part of it, over a copy of the captured graph, under observation."""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from dataclasses import dataclass, field

from torch.fx import GraphModule

from graphprobe import checking
from graphprobe.bisection import store
from graphprobe.bisection.oracle import deep_copy
from graphprobe.errors import GraphprobeError
from graphprobe.pipeline import Applied, FunctionTransform, Pipeline, Settings, Step, Transform
from graphprobe.pipeline.options import options_of
from graphprobe.pipeline.running import Run, Runner
from graphprobe.records import Lint, Replacement

#: The option by which a transform, or a function of the graph, can be limited to the first matches.
LIMIT = "first"
_TRIES = 4  # for a transform that makes another graph half of the time: found in 15 of 16 cases


@dataclass(frozen=True)
class Entry:
    """One transform of the pipeline, with a name that is its own."""

    transform: Transform
    settings: Settings
    label: str

    @property
    def is_limitable(self) -> bool:
        """Whether it takes ``first=k``: rewrite the first k matches only."""
        if isinstance(self.transform, FunctionTransform):
            try:
                return LIMIT in inspect.signature(self.transform.function).parameters
            except (TypeError, ValueError):
                return False
        return LIMIT in {f.name for f in options_of(type(self.transform))}

    def limited(self, count: int) -> Entry:
        """Return it limited to its first `count` matches."""
        if isinstance(self.transform, FunctionTransform):
            given = {**dict(self.transform.options), LIMIT: count}
            changed: Transform = dataclasses.replace(self.transform, options=tuple(sorted(given.items())))
        else:
            changed = dataclasses.replace(self.transform, **{LIMIT: count})  # type: ignore[type-var]
        return dataclasses.replace(self, transform=changed)


def entries_of(plan: Pipeline) -> tuple[Entry, ...]:
    """Name the transforms of a pipeline; a name that is there again is numbered."""
    met: Counter[str] = Counter()
    out = []
    for transform, settings in zip(plan.transforms, plan.settings, strict=True):
        met[transform.name] += 1
        number = met[transform.name]
        out.append(Entry(transform, settings, transform.name + (f"#{number}" if number > 1 else "")))
    return tuple(out)


def text_of(entries: tuple[Entry, ...]) -> str:
    """Return the text form of a part of a pipeline, the bare names where there is none."""
    try:
        return str(Pipeline(tuple(e.transform for e in entries), tuple(e.settings for e in entries)))
    except GraphprobeError:  # an option that has no text form
        return ",".join(entry.transform.name for entry in entries)


@dataclass(frozen=True)
class Trial:
    """What one part of a pipeline made of the captured graph."""

    gm: GraphModule
    steps: tuple[Step, ...]
    crashed: int | None = None  # position within the part of the transform that failed
    lints: tuple[Lint, ...] = ()

    @property
    def events(self) -> tuple[Replacement, ...]:
        """All replacements of all steps, in order."""
        return Run(self.gm, self.steps).events

    def matches(self, position: int) -> tuple[str, ...]:
        """Return what the transform at a position matched."""
        outcome = self.steps[position].outcome
        return outcome.matches if isinstance(outcome, Applied) else ()


def run(captured: GraphModule, entries: tuple[Entry, ...], *, lint: bool = False) -> Trial:
    """Apply transforms to a deep copy of `captured`; with `lint` note what defects each leaves behind."""
    watch = _Watch(checking.Watchman(checking.DEFAULT)) if lint else None
    runner = Runner(deep_copy(captured), raising=False)
    if watch is not None:
        runner.before_each, runner.after_apply, runner.after_each = watch.before, watch.applied, watch.after
    steps = []
    for entry in entries:
        if watch is not None:
            watch.label = entry.label
        steps.append(runner.step(entry.transform, entry.settings))
    crashed = next((i for i, step in enumerate(steps) if step.status == "failed"), None)
    return Trial(runner.gm, tuple(steps), crashed, tuple(watch.lints) if watch is not None else ())


def unsteady(captured: GraphModule, entries: tuple[Entry, ...]) -> str:
    """Return the label of the first transform that makes another graph when it is applied again, or an empty string."""

    def prints() -> list[int]:
        runner = Runner(deep_copy(captured), raising=False)
        found = []
        for entry in entries:
            runner.step(entry.transform, entry.settings)
            found.append(store.print_of(runner.gm))
        return found

    first = prints()
    for again in (prints() for _ in range(_TRIES)):
        for entry, one, other in zip(entries, first, again, strict=True):
            if one != other:
                return entry.label
    return ""


@dataclass
class _Watch:
    """Looks for new defects around each transform."""

    watchman: checking.Watchman
    label: str = ""
    lints: list[Lint] = field(default_factory=list)

    def before(self, gm: GraphModule, transform: Transform) -> None:
        self.watchman.start(gm)

    def applied(self, gm: GraphModule, step: Step) -> None:
        self.lints += self.watchman.after_apply(gm, self.label)

    def after(self, gm: GraphModule, step: Step) -> None:
        if step.status in ("applied", "matched nothing"):
            self.lints += self.watchman.after_clean_up(gm, self.label)

"""Transforms and pipelines: a visible list of graph passes that is run step by step under observation.

A transform is a frozen dataclass with a `name`, a `stage` and its options as further fields; it changes a graph where
it stands and says what it matched. Plain functions of a graph and torch's pass managers are transforms, too. Pipelines
have a text form, ``fuse_qkv{where="*.3.*"}``, that reads back equal, so that a report can name the pipeline that
reproduces it, and a YAML form in AutoDeploy's shape.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from graphprobe.errors import PipelineError, nearest
from graphprobe.pipeline import config, options, registry, text
from graphprobe.pipeline.functions import FunctionTransform, from_any
from graphprobe.pipeline.hygiene import fresh_copy
from graphprobe.pipeline.registry import ENTRY_POINTS, Known, given, installed
from graphprobe.pipeline.running import After, Before, Run, Runner, Step
from graphprobe.pipeline.text import transform_text
from graphprobe.pipeline.transform import (
    STAGES,
    Applied,
    NotApplied,
    Outcome,
    Settings,
    Transform,
    Unsaid,
    commonest,
)

__all__ = [
    "ENTRY_POINTS",
    "STAGES",
    "Applied",
    "FunctionTransform",
    "NotApplied",
    "Outcome",
    "Pipeline",
    "Run",
    "Settings",
    "Step",
    "Transform",
    "Unsaid",
    "commonest",
    "fresh_copy",
    "given",
    "installed",
    "transform_text",
]


@dataclass(frozen=True)
class Pipeline:
    """A list of transforms, each with its settings. `str` gives its text form, `parse` reads it back."""

    transforms: tuple[Transform, ...] = ()
    settings: tuple[Settings, ...] = ()  # one for each transform; empty: the defaults for all
    notes: tuple[str, ...] = field(default=(), compare=False)  # what a file asked for that has no effect here

    def __post_init__(self) -> None:
        settings = self.settings or (Settings(),) * len(self.transforms)
        if len(settings) != len(self.transforms):
            raise PipelineError(f"{len(self.transforms)} transforms have {len(settings)} settings: give one for each")
        for transform, one in zip(self.transforms, settings, strict=True):
            _check(transform, one)
        object.__setattr__(self, "settings", settings)

    def __str__(self) -> str:
        return ",".join(text.entry_text(*entry) for entry in zip(self.transforms, self.settings, strict=True))

    @staticmethod
    def parse(source: str, known: Known | None = None) -> Pipeline:
        """Read ``a,b{x=1},pkg.mod:c``; names are looked up in `known`, by default the installed transforms.

        Raises PipelineError.
        """
        return _pipeline(text.read(source, known))

    @staticmethod
    def from_yaml(*paths: str | os.PathLike[str], known: Known | None = None) -> Pipeline:
        """Read YAML files in AutoDeploy's shape, each merged deeply over those left of it.

        Transforms run in the order of their stages, within a stage in the order of the file. Raises PipelineError for a
        transform, a key or a stage that does not exist.
        """
        entries, notes = [], []
        for name, keys in config.load(paths).items():
            without = sorted(keys.keys() & config.WITHOUT_EFFECT)
            notes += [f"{name}: {key} has no effect: {config.WITHOUT_EFFECT[key]}" for key in without]
            entries += list(text.entry(name, {k: v for k, v in keys.items() if k not in without}, known))
        return _pipeline(entries, tuple(notes)).sorted()

    @staticmethod
    def of(value: Any, known: Known | None = None) -> Pipeline:
        """Make a pipeline of what a caller has: a pipeline, its text form, a YAML file, a transform, a function
        ``gm -> gm`` or ``gm -> None``, a pair (name, function), a torch PassManager, or a list of such.

        Raises PipelineError.
        """
        if isinstance(value, Pipeline):
            return value
        if isinstance(value, os.PathLike) or (isinstance(value, str) and value.endswith((".yaml", ".yml"))):
            return Pipeline.from_yaml(Path(value), known=known)
        if isinstance(value, str):
            return Pipeline.parse(value, known)
        if isinstance(value, (list, tuple)) and not _is_pair(value):
            parts = [Pipeline.of(one, known) for one in value]
            return Pipeline(
                tuple(t for part in parts for t in part.transforms),
                tuple(s for part in parts for s in part.settings),
                tuple(n for part in parts for n in part.notes),
            )
        return Pipeline(tuple(from_any(value)))

    def to_yaml(self) -> str:
        """Return the YAML form. Raises PipelineError where a transform is in the pipeline twice."""
        keys: dict[str, dict[str, Any]] = {}
        for transform, settings in zip(self.transforms, self.settings, strict=True):
            name = registry.spec(transform)
            if name in keys:
                raise PipelineError(f"YAML has one place for each transform, and {name} is in the pipeline twice")
            stage = settings.stage or transform.stage
            keys[name] = {"stage": stage, **_plain({**text.said(transform, settings), "stage": stage})}
        return config.dump(keys)

    def sorted(self) -> Pipeline:
        """Return the pipeline in the order of the stages; within a stage the order stays."""
        order = sorted(
            range(len(self.transforms)),
            key=lambda i: STAGES.index(self.settings[i].stage or self.transforms[i].stage),
        )
        return Pipeline(
            tuple(self.transforms[i] for i in order), tuple(self.settings[i] for i in order), notes=self.notes
        )

    def run(
        self,
        gm: GraphModule,
        after_each: After | None = None,
        *,
        before_each: Before | None = None,
        after_apply: After | None = None,
        raising: bool = True,
    ) -> Run:
        """Apply the transforms one after the other to a copy of `gm` that shares its weights.

        The hooks are called with the graph: `before_each` before a transform is applied, `after_apply` right after it,
        and `after_each`, with the step just made, after the clean-up that its settings ask for. Raises PipelineError
        where a transform fails; without `raising` that step is marked failed, the graph is as it was before it, and the
        rest is skipped.
        """
        runner = Runner(fresh_copy(gm), before_each, after_apply, after_each, raising)
        steps = [runner.step(*entry) for entry in zip(self.transforms, self.settings, strict=True)]
        return Run(runner.gm, tuple(steps))


def _pipeline(entries: Iterable[text.Entry], notes: tuple[str, ...] = ()) -> Pipeline:
    pairs = list(entries)
    return Pipeline(tuple(t for t, _ in pairs), tuple(s for _, s in pairs), notes)


def _check(transform: Transform, settings: Settings) -> None:
    stage = settings.stage or transform.stage
    if stage not in STAGES:
        raise PipelineError(
            f"the transform {transform.name} has the unknown stage {stage!r}{nearest(stage, STAGES)}; "
            f"the stages are {', '.join(STAGES)}"
        )
    taken = {*options.SETTINGS, *config.WITHOUT_EFFECT} - {"stage"}
    fields: tuple[dataclasses.Field[Any], ...] = ()
    if dataclasses.is_dataclass(transform):
        fields = dataclasses.fields(transform)
    clash = sorted(taken & {f.name for f in fields})
    if clash:
        raise PipelineError(
            f"the transform {transform.name} has an option {clash[0]!r}, which a pipeline takes for its own: rename it"
        )


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and callable(value[1])


def _plain(value: Any) -> Any:
    """Return the value with tuples made lists, which YAML has."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value

"""Transforms and pipelines: a visible list of graph passes that is run step by step under observation.

A transform is a frozen dataclass with a `name`, a `stage` and its options as further fields; it changes a graph where
it stands and says what it matched. Both transforms and pipelines have a text form, ``fuse_qkv{layers="*.3"}``, that
reads back equal, so that a report can name the pipeline that reproduces it.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, runtime_checkable

from torch.fx import GraphModule

from graphprobe import observe
from graphprobe.errors import PipelineError, nearest
from graphprobe.records import Replacement, Report

ENTRY_POINTS = "graphprobe.transforms"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Applied:
    """The transform changed the graph; one name (a module path or node) for each place that matched."""

    matches: tuple[str, ...]


@dataclass(frozen=True)
class NotApplied:
    """The transform changed nothing; why, and the node of the nearest miss where there was one."""

    reason: str
    node: str = ""


Outcome = Applied | NotApplied


@runtime_checkable
class Transform(Protocol):
    """A graph pass: a frozen dataclass whose fields beside `name` and `stage` are its options."""

    @property
    def name(self) -> str: ...

    @property
    def stage(self) -> str: ...

    def apply(self, gm: GraphModule) -> Outcome:
        """Change `gm` where it stands and say what matched; `gm` is recompiled afterwards."""
        ...


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
        """Return the text form of the transform that last made or rewrote the node, '' where none did."""
        for step in reversed(self.steps):
            if node in step.observation.created or node in step.observation.rewritten:
                return step.transform
        return ""

    def attributed(self, report: Report) -> Report:
        """Return the report of a diff against `gm` in which each finding names the transform that made its culprit."""
        findings = tuple(
            dataclasses.replace(finding, transform=self.author(finding.culprit) or finding.transform)
            for finding in report.findings
        )
        return dataclasses.replace(report, findings=findings)


@dataclass(frozen=True)
class Pipeline:
    """A list of transforms. `str` gives its text form, `parse` reads it back."""

    transforms: tuple[Transform, ...] = ()

    def __str__(self) -> str:
        return ",".join(transform_text(t) for t in self.transforms)

    @staticmethod
    def parse(text: str, known: dict[str, type] | None = None) -> Pipeline:
        """Read ``a,b{x=1}``; names are looked up in `known`, by default the installed transforms.

        Raises PipelineError.
        """
        return Pipeline(tuple(_Reader(text, known).transforms()))

    def run(self, gm: GraphModule, after_each: Callable[[GraphModule, Step], None] | None = None) -> Run:
        """Apply the transforms one after the other to a copy of `gm` that shares its weights.

        `after_each` is called with the graph and the step just made. Raises PipelineError where a transform fails.
        """
        gm = fresh_copy(gm)
        steps = []
        for transform in self.transforms:
            step = _apply(transform, gm)
            steps.append(step)
            if after_each is not None:
                after_each(gm, step)
        return Run(gm, tuple(steps))


def fresh_copy(gm: GraphModule) -> GraphModule:
    """Return a GraphModule with a graph of its own and the weights of `gm`."""
    with warnings.catch_warnings():  # torch's own pytree classes, which the graph's calling convention holds
        warnings.simplefilter("ignore", FutureWarning)
        graph = copy.deepcopy(gm.graph)
    duplicate = GraphModule(gm, graph, type(gm).__name__)
    duplicate.meta = dict(gm.meta)
    duplicate.train(gm.training)
    return duplicate


def _apply(transform: Transform, gm: GraphModule) -> Step:
    text = transform_text(transform)
    start, size = time.perf_counter(), len(gm.graph.nodes)
    with observe.watch(gm, text) as observation:
        try:
            outcome = transform.apply(gm)
        except Exception as error:
            raise PipelineError(f"the transform {text} failed: {type(error).__name__}: {error}") from error
    if not isinstance(outcome, (Applied, NotApplied)):
        raise PipelineError(
            f"the transform {text} returned {type(outcome).__name__}: apply(gm) must return Applied or NotApplied"
        )
    try:
        gm.graph.lint()
    except Exception as error:
        raise PipelineError(f"the transform {text} left an invalid graph: {error}") from error
    gm.recompile()
    seconds = time.perf_counter() - start
    return Step(text, transform.stage, outcome, observation, seconds, size, len(gm.graph.nodes))


# --- text form -------------------------------------------------------------------------------------------------------


def transform_text(transform: Transform) -> str:
    """Return ``name`` or ``name{option=value, ...}``: the options that differ from their defaults, values as JSON."""
    options = []
    for f in _options(type(transform)):
        value = getattr(transform, f.name)
        if value != _default(f):
            options.append(f"{f.name}={json.dumps(value)}")
    return transform.name + (f"{{{', '.join(options)}}}" if options else "")


def _options(kind: type) -> list[dataclasses.Field[Any]]:
    if not dataclasses.is_dataclass(kind):
        return []
    return [f for f in dataclasses.fields(kind) if f.init and f.name not in ("name", "stage")]


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


class _Reader:
    """Reads ``name{key=json, ...},name,...`` from left to right."""

    def __init__(self, text: str, known: dict[str, type] | None) -> None:
        self._text = text
        self._at = 0
        self._known = known

    def transforms(self) -> Iterator[Transform]:
        while self._peek():
            name = self._name("a transform")
            kind = _lookup(name, self._known)
            yield self._make(kind, name, dict(self._items()) if self._take("{") else {})
            if self._peek() and not self._take(","):
                self._fail("',' between transforms")

    def _items(self) -> Iterator[tuple[str, Any]]:
        while not self._take("}"):
            key = self._name("an option")
            if not self._take("="):
                self._fail("'=' after the option")
            yield key, self._value()
            if not self._take(",") and self._peek() != "}":
                self._fail("',' or '}'")

    def _value(self) -> Any:
        self._peek()
        try:
            value, self._at = json.JSONDecoder().raw_decode(self._text, self._at)
        except ValueError:
            self._fail('a value such as 3, 0.5, true, "text" or [1, 2]')
        return tuple(value) if isinstance(value, list) else value

    def _make(self, kind: type, name: str, options: dict[str, Any]) -> Transform:
        known = [f.name for f in _options(kind)]
        for key in options:
            if key not in known:
                raise PipelineError(f"the transform {name} has no option {key!r}{nearest(key, known)}")
        made = kind(**options)
        if not isinstance(made, Transform):
            raise PipelineError(
                f"{name} ({kind.__module__}.{kind.__qualname__}) is no transform: it lacks name, stage or apply"
            )
        return made

    def _peek(self) -> str:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._text[self._at : self._at + 1]

    def _take(self, character: str) -> bool:
        found = self._peek() == character
        self._at += found
        return found

    def _name(self, what: str) -> str:
        self._peek()
        match = _NAME.match(self._text, self._at)
        if match is None:
            self._fail(f"the name of {what}")
        self._at = match.end()
        return match.group()

    def _fail(self, expected: str) -> NoReturn:
        rest = self._text[self._at : self._at + 20] or "the end"
        raise PipelineError(
            f"pipeline {self._text!r}: expected {expected} at {rest!r}, as in fuse_qkv{{layers=[3]}},other"
        )


# --- installed transforms --------------------------------------------------------------------------------------------


def installed() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the transforms that installed packages offer under the entry-point group ``graphprobe.transforms``."""
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _lookup(name: str, known: dict[str, type] | None) -> type:
    names = installed() if known is None else known
    if name not in names:
        raise PipelineError(
            f"there is no transform {name!r}{nearest(name, names)}; known are: {', '.join(sorted(names)) or 'none'}"
        )
    found = names[name]
    if not isinstance(found, importlib.metadata.EntryPoint):
        return found
    try:
        loaded = found.load()
    except (ImportError, AttributeError) as error:
        raise PipelineError(f"the transform {name} ({found.value}) cannot be loaded: {error}") from error
    if not isinstance(loaded, type):
        raise PipelineError(f"the transform {name} ({found.value}) is no class")
    return loaded

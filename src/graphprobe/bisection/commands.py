"""The command that reproduces a trial, for a shell where the model was named in one, else for Python."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphprobe.bisection import bench
from graphprobe.bisection.bench import Entry
from graphprobe.bisection.oracle import filled
from graphprobe.errors import GraphprobeError
from graphprobe.pipeline import FunctionTransform, Pipeline, Settings
from graphprobe.pipeline.functions import function_name

#: What is not printed: a default of graphprobe.run.
_DEFAULTS: dict[str, Any] = {"exact": "auto", "valid": None, "accept": (), "allow": (), "min_coverage": 0.9}


@dataclass(frozen=True)
class Commands:
    """How trials are reproduced. `model` is a shell's words for the model and its inputs: "models:net --length 8".

    `options` are those of graphprobe.diff, `more` further keywords of graphprobe.run as Python text.
    """

    model: str = ""
    check: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    more: tuple[tuple[str, str], ...] = ()

    @property
    def has_check(self) -> bool:
        """Whether a user's own check decides."""
        return self.check is not None

    @property
    def _wants_before(self) -> bool:
        return "{before}" in str(self.check)

    def trial(self, entries: Sequence[Entry]) -> str:
        """Return the command that runs these transforms and judges the result."""
        if not self.model:
            return self._python(tuple(entries))
        text = bench.text_of(tuple(entries))
        run = f"graphprobe run {self.model} --pipeline {shlex.quote(text)}"
        if not self.has_check:
            return f"{run} --check total"
        if callable(self.check):
            return f"{run} -o after.fx"
        before = f"graphprobe run {self.model} --pipeline '' -o before.fx && " if self._wants_before else ""
        return f"{before}{run} -o after.fx && {filled(self.check, 'before.fx', 'after.fx')}"

    def _python(self, entries: tuple[Entry, ...]) -> str:
        run = f"graphprobe.run(model, args, kwargs, pipeline={expression(entries)}"
        run += "".join(f", {name}={text}" for name, text in self.more)
        if not self.has_check:
            return f"print({run}, check=('total',){self._options()}))"
        if callable(self.check):
            return f"print({_name(self.check, 'check')}({run}).gm))"
        saved = f"graphprobe.save({run}).gm, 'after.fx', args=args, kwargs=kwargs)"
        if self._wants_before:
            saved += "; graphprobe.save(graphprobe.capture(model, args, kwargs), 'before.fx', args=args, kwargs=kwargs)"
        return f"{saved}  # then in a shell: {filled(self.check, 'before.fx', 'after.fx')}"

    def _options(self) -> str:
        """Return the options of graphprobe.diff that are no defaults, as keywords; a mask by the caller's own name."""
        said = {name: value for name, value in self.options.items() if name in _DEFAULTS}
        return "".join(
            f", {name}={'valid' if name == 'valid' else repr(value)}"
            for name, value in said.items()
            if value is not _DEFAULTS[name] and (name == "valid" or value != _DEFAULTS[name])
        )


def expression(entries: tuple[Entry, ...]) -> str:
    """Return Python that makes this part of a pipeline: its text form where that reads back, else a list of names.

    What cannot be named, such as a function within a function, goes by its bare name, for a place where that is known.
    """
    text = bench.text_of(entries)
    if _reads_back(text, entries):
        return repr(text)
    return f"[{', '.join(_item(entry) for entry in entries)}]"


def _reads_back(text: str, entries: tuple[Entry, ...]) -> bool:
    try:
        found = Pipeline.parse(text)
    except GraphprobeError:
        return False
    return [_same(t) for t in found.transforms] == [_same(entry.transform) for entry in entries]


def _same(transform: Any) -> Any:
    """Names are not compared: a function that was given one by its user is the same function without."""
    if isinstance(transform, FunctionTransform):
        return transform.function, transform.options
    return transform


def _item(entry: Entry) -> str:
    transform = entry.transform
    if not isinstance(transform, FunctionTransform):
        text = bench.text_of((entry,))
        return repr(text) if _reads_back(text, (entry,)) or entry.settings != Settings() else repr(transform)
    name = _name(transform.function, transform.name)
    if transform.options:
        options = ", ".join(f"{key}={value!r}" for key, value in transform.options)
        name = f"functools.partial({name}, {options})"
    plain = transform.name == function_name(transform.function)
    return name if plain else f"({transform.name!r}, {name})"


def _name(function: Any, otherwise: str) -> str:
    """Return the name by which a caller most likely has a function: its own, else what stands for it."""
    if isinstance(function, functools.partial):
        given = [repr(value) for value in function.args] + [f"{k}={v!r}" for k, v in function.keywords.items()]
        return f"functools.partial({', '.join([_name(function.func, otherwise), *given])})"
    name = getattr(function, "__name__", "")
    return name if name.isidentifier() else otherwise if otherwise.isidentifier() else "function"

"""The text form of transforms and pipelines: ``fuse_qkv{where="*.3.*", enabled=false},my.module:pass``."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from graphprobe.errors import PipelineError
from graphprobe.pipeline import options, registry
from graphprobe.pipeline.functions import FunctionTransform
from graphprobe.pipeline.transform import Settings, Transform

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NAME = re.compile(r"[A-Za-z_][\w.]*(:[A-Za-z_][\w.]*)?")

Entry = tuple[Transform, Settings]


def said(transform: Transform, settings: Settings | None = None) -> dict[str, Any]:
    """Return the options and settings that differ from their defaults."""
    found: dict[str, Any] = {}
    if isinstance(transform, FunctionTransform):
        found.update(transform.options)
    else:
        for field in options.options_of(type(transform)):
            value = getattr(transform, field.name)
            if value != options.default_of(field):
                found[field.name] = value
    if settings is not None:
        plain = Settings()
        for name in options.SETTINGS:
            if getattr(settings, name) != getattr(plain, name):
                found[name] = getattr(settings, name)
    return found


def transform_text(transform: Transform) -> str:
    """Return ``name`` or ``name{option=value, ...}``: the options that differ from their defaults, values as JSON.

    It is for reading: an option without a JSON form is shown as its class.
    """
    inner = ", ".join(f"{key}={json.dumps(value, default=_class_name)}" for key, value in said(transform).items())
    return f"{transform.name}{{{inner}}}" if inner else transform.name


def _class_name(value: Any) -> str:
    return f"<{type(value).__name__}>"


def entry_text(transform: Transform, settings: Settings) -> str:
    """Return what `read` reads back: as `transform_text`, with settings, and ``pkg.mod:Name`` where not installed.

    Raises PipelineError for an option that has no JSON form.
    """
    return _text(registry.spec(transform), said(transform, settings))


def _text(name: str, values: Mapping[str, Any]) -> str:
    try:
        inner = ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
    except TypeError as error:
        raise PipelineError(f"an option of {name} has no text form: {error}; use numbers, texts, lists") from error
    return f"{name}{{{inner}}}" if inner else name


def read(text: str, known: registry.Known | None = None) -> Iterator[Entry]:
    """Yield the transforms of a text with their settings. Raises PipelineError."""
    reader = _Reader(text)
    for name, given in reader.items():
        yield from entry(name, given, known)


def entry(name: str, given: Mapping[str, Any], known: registry.Known | None) -> Iterator[Entry]:
    """Yield what one item of a pipeline stands for: usually one transform. Raises PipelineError."""
    values, settings = options.split({key: options.as_tuples(value) for key, value in given.items()}, name)
    for transform in registry.make(name, values, known):
        yield transform, settings


@dataclasses.dataclass
class _Reader:
    """Reads ``name{key=json, ...},name,...`` from left to right."""

    text: str
    at: int = 0

    def items(self) -> Iterator[tuple[str, dict[str, Any]]]:
        while self._peek():
            name = self._match(_NAME, "the name of a transform")
            yield name, self._options() if self._take("{") else {}
            if self._peek() and not self._take(","):
                self._fail("',' between transforms")

    def _options(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._take("}"):
            key = self._match(_KEY, "the name of an option")
            if key in found:
                raise PipelineError(f"pipeline {self.text!r}: the option {key} is given twice")
            if not self._take("="):
                self._fail("'=' after the option")
            found[key] = self._value()
            if not self._take(",") and self._peek() != "}":
                self._fail("',' or '}'")
        return found

    def _value(self) -> Any:
        self._peek()
        try:
            value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
        except ValueError:
            self._fail('a value such as 3, 0.5, true, "text" or [1, 2]')
        return value

    def _peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def _take(self, character: str) -> bool:
        found = self._peek() == character
        self.at += found
        return found

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        self._peek()
        match = pattern.match(self.text, self.at)
        if match is None:
            self._fail(what)
        self.at = match.end()
        return match.group()

    def _fail(self, expected: str) -> NoReturn:
        rest = self.text[self.at : self.at + 20] or "the end"
        raise PipelineError(
            f"pipeline {self.text!r}: expected {expected} at {rest!r}, as in fuse_qkv{{layers=[3]}},other"
        )

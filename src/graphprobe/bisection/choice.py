"""Which two points of a compilation are compared: the text form ``inductor{before="aot", after="codegen"}``."""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from typing import Any

from graphprobe.errors import PipelineError, nearest

NAME = "inductor"  # the pipeline that is PyTorch's own compiler
EAGER, CODE, RUNTIME = "eager", "codegen", "runtime"


@dataclass(frozen=True)
class Choice:
    """Two points of the way from eager to generated code, by the labels that a run prints; '' for the first and last.

    Besides graphs `before` can be "eager", `after` "codegen" (the generated code) or "runtime" (what the compiled model
    returns to its caller).
    """

    before: str = ""
    after: str = ""
    graph: int = 0  # which of Dynamo's graphs
    first: int | None = None  # the pass `after`, or `before` where that is codegen, applies so many of its matches only
    lowered: int | None = None  # so many operations are lowered, the others run their eager kernels
    config: dict[str, Any] = field(default_factory=dict)  # switches of torch._inductor.config

    @property
    def is_all(self) -> bool:
        """Whether nothing was chosen: every step is looked at."""
        return self == Choice()

    def __str__(self) -> str:
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {f.name: getattr(Choice(), f.name) for f in dataclasses.fields(self)}
        inner = ", ".join(f"{key}={json.dumps(value)}" for key, value in said.items() if value != plain[key])
        return f"{NAME}{{{inner}}}" if inner else NAME

    @staticmethod
    def parse(text: str) -> Choice:
        """Read what `str` wrote. Raises PipelineError."""
        inner = text[len(NAME) :].strip()
        if not inner:
            return Choice()
        if not (inner.startswith("{") and inner.endswith("}")):
            raise PipelineError(f'pipeline {text!r}: expected {NAME} or {NAME}{{before="aot", after="codegen"}}')
        decoder, at, found, rest = json.JSONDecoder(), 0, {}, inner[1:-1].strip()
        names = [f.name for f in dataclasses.fields(Choice)]
        while rest:
            key, _, rest = rest.partition("=")
            key = key.strip()
            if key not in names:
                raise PipelineError(f"{NAME} has no option {key!r}{nearest(key, names)}; it has {', '.join(names)}")
            try:
                found[key], at = decoder.raw_decode(rest.lstrip())
            except ValueError as error:
                raise PipelineError(f"pipeline {text!r}: {key} is no JSON value: {error}") from error
            rest = rest.lstrip()[at:].lstrip().removeprefix(",").lstrip()
        return Choice(**found)

    def command(self, model: str) -> str:
        """Return the command that compares again; `model` is a shell's words for the model, '' for Python."""
        if model:
            return f"graphprobe run {model} --pipeline {shlex.quote(str(self))} --check total"
        return f"print(graphprobe.run(model, args, kwargs, pipeline={str(self)!r}, check=('total',)))"


def is_inductor(pipeline: Any) -> bool:
    """Whether a pipeline is PyTorch's own compiler."""
    return isinstance(pipeline, str) and (pipeline == NAME or pipeline.startswith(f"{NAME}{{"))

"""The command that reproduces a trial, for a shell where the model was named in one, else for Python."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphprobe.bisection import bench
from graphprobe.bisection.bench import Entry
from graphprobe.bisection.oracle import filled


@dataclass(frozen=True)
class Commands:
    """How trials are reproduced. `model` is a shell's words for the model and its inputs: "models:net --length 8"."""

    model: str = ""
    check: Any = None
    options: tuple[str, ...] = ()  # of `graphprobe run`, as words

    @property
    def has_check(self) -> bool:
        """Whether a user's own check decides."""
        return self.check is not None

    def trial(self, entries: Sequence[Entry]) -> str:
        """Return the command that runs these transforms and judges the result."""
        text = bench.text_of(tuple(entries))
        if not self.model:
            return self._python(text)
        run = f"graphprobe run {self.model} --pipeline {shlex.quote(text)}"
        if not self.has_check:
            return " ".join((run, "--check total", *self.options))
        if callable(self.check):
            return f"{run} -o after.fx"
        return f"{run} -o after.fx && {filled(self.check, 'before.fx', 'after.fx')}"

    def _python(self, text: str) -> str:
        run = f"graphprobe.run(model, args, kwargs, pipeline={text!r}"
        if not self.has_check:
            return f"print({run}, check=('total',)))"
        if callable(self.check):
            return f"print({getattr(self.check, '__name__', 'check')}({run}).gm))"
        then = filled(self.check, "before.fx", "after.fx")
        return f"graphprobe.save({run}).gm, 'after.fx', args=args, kwargs=kwargs)  # then in a shell: {then}"

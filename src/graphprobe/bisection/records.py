"""The answer of a bisection: frozen, JSON round-trip, without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from graphprobe.records import SCHEMA_VERSION, Lint, Report, from_data, to_data


@dataclass(frozen=True)
class BisectStep:
    """One trial: what was run, and what came of it."""

    what: str  # "the whole pipeline", "the first 3 of 8 transforms", "fuse_qkv alone", ...
    transforms: tuple[str, ...]  # the transforms that ran, in text form
    verdict: str  # good, bad or unknown
    reason: str = ""  # the verdict of the diff, what the check said, the error that ended it
    seconds: float = 0.0
    remembered: bool = False  # taken from the state file
    command: str = ""  # reproduces it


@dataclass(frozen=True)
class Bisection:
    """Which transform made the model wrong, by which match, and every trial that led there."""

    verdict: str  # good: nothing is wrong; bad; unknown: it could not be judged
    transform: str | None = None  # the first guilty one; of Inductor with its stage: "joint: pass_pattern_1"
    transforms: tuple[str, ...] = ()  # all guilty ones in the pipeline's order
    together: tuple[tuple[str, ...], ...] = ()  # the same, those that are wrong only together as one
    match: str | None = None  # the single match, pattern or operation within `transform`
    matches: tuple[str, ...] = ()  # all matches that the report's findings lie in
    report: Report | None = None  # of the step of `transform`; of the whole pipeline where none is guilty
    lints: tuple[Lint, ...] = ()  # defects that transforms left behind, each in its transform's name
    steps: tuple[BisectStep, ...] = ()
    notes: tuple[str, ...] = ()
    pipeline: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    version: int = SCHEMA_VERSION

    @property
    def commands(self) -> tuple[str, ...]:
        """One command a step, in their order, that reproduces it."""
        return tuple(step.command for step in self.steps)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with the pipeline."""
        return self.verdict == "good"

    @property
    def exit_code(self) -> int:
        """0 nothing is wrong, 1 a transform is guilty, 2 it could not be judged."""
        return {"good": 0, "bad": 1}.get(self.verdict, 2)

    def to_json(self, indent: int | None = None) -> str:
        """Return the bisection as JSON text; non-finite numbers become strings."""
        return json.dumps({**to_data(self), "commands": list(self.commands)}, indent=indent)

    @staticmethod
    def from_json(text: str) -> Bisection:
        """Read a bisection that `to_json` wrote. Raises ValueError where it is not one."""
        data = json.loads(text)
        if not isinstance(data, dict) or "together" not in data:
            raise ValueError("this JSON is no graphprobe Bisection: it has no 'together'")
        if data.get("version", 0) > SCHEMA_VERSION:
            raise ValueError(
                f"this bisection has schema version {data['version']}, this graphprobe reads up to "
                f"{SCHEMA_VERSION}: update graphprobe"
            )
        return from_data(Bisection, data)

    def __str__(self) -> str:
        from graphprobe.bisection import wording

        return wording.text(self)

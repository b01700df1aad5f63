"""Read a directory of dumps, ours or AutoDeploy's."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from graphprobe.dumps.names import RUN
from graphprobe.errors import DumpError, nearest
from graphprobe.foreign import autodeploy
from graphprobe.foreign.autodeploy import Dump, Line
from graphprobe.records import RunReport, RunStep

_FILE = re.compile(r"(\d{3,})_.+\.txt")


@dataclass(frozen=True)
class Entry:
    """One dump: its place in the run, its file, and the graphs in it."""

    number: int
    file: str
    dump: Dump

    @property
    def transform(self) -> str:
        """The transform after which it was written."""
        return self.dump.transform

    @property
    def stage(self) -> str:
        """The transform's stage."""
        return self.dump.stage

    @property
    def lines(self) -> dict[str, Line]:
        """Every node by name, behind its section's name where that is not the root."""
        found: dict[str, Line] = {}
        for section in self.dump.sections:
            prefix = "" if section.name == autodeploy.ROOT else f"{section.name}/"
            found |= {f"{prefix}{line.name or 'output'}": line for line in section.lines}
        return found

    @property
    def weights(self) -> dict[str, str]:
        """{name: 'shape : dtype'} of what the graphs read and do not compute."""
        return {name: typed for section in self.dump.sections for name, typed in autodeploy.weights(section).items()}


@dataclass(frozen=True)
class Dumps:
    """A directory of dumps in the order of the run; `run` is what graphprobe noted of it, None for foreign ones."""

    path: str
    entries: tuple[Entry, ...]
    run: RunReport | None = None

    def step(self, entry: Entry) -> RunStep | None:
        """Return what the run noted of the transform after which the dump was written."""
        steps = self.run.steps if self.run is not None else ()
        return next((step for step in steps if step.dump == entry.file), None)

    def find(self, wanted: str) -> Entry:
        """Return a dump by its number, its transform (the last of that name) or its file. Raises DumpError."""
        for entry in reversed(self.entries):
            if wanted in (entry.transform, entry.file) or (wanted.isdecimal() and int(wanted) == entry.number):
                return entry
        names = [entry.transform for entry in self.entries]
        raise DumpError(
            f"{self.path} has no dump {wanted!r}{nearest(wanted, names)}; there are numbers "
            f"{self.entries[0].number} to {self.entries[-1].number}"
        )


def read(path: str | os.PathLike[str]) -> Dumps:
    """Read a directory of dumps. Raises DumpError where there is none, or where a file is damaged."""
    folder = Path(path)
    if not folder.is_dir():
        raise DumpError(f"there is no directory {folder}")
    found = [(int(m.group(1)), name) for name in os.listdir(folder) if (m := _FILE.fullmatch(name))]
    if not found:
        raise DumpError(
            f"{folder} holds no dumps (files such as 001_export_export_to_gm.txt): write them with "
            "`graphprobe run ... --dump DIR`, or with AD_DUMP_GRAPHS_DIR=DIR before starting AutoDeploy"
        )
    entries = tuple(Entry(number, name, autodeploy.read(folder / name)) for number, name in sorted(found))
    return Dumps(str(folder), entries, _run(folder / RUN))


def _run(path: Path) -> RunReport | None:
    if not path.is_file():
        return None
    try:
        return RunReport.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DumpError(f"cannot read {path}: {error}") from error

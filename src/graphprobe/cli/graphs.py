"""From what a user names to a graph that can be drawn: an ``.fx``, a dump, a saved report, or a model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprobe.errors import InputError, nearest
from graphprobe.records import GraphView, Report, RunReport
from graphprobe.render import run_comparison

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from graphprobe.foreign.autodeploy import Section

_DUMP = re.compile(r"(\d{3,})_.+\.txt$")


@dataclass(frozen=True)
class Drawable:
    """A graph to draw; `report` where it comes from one, `path` or `gm` where it can be run."""

    view: GraphView
    report: Report | None = None
    run: RunReport | None = None  # where the report is one of a run of transforms
    path: str = ""
    gm: GraphModule | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def runnable(self, inputs_file: str | None) -> tuple[GraphModule, tuple[Any, ...], dict[str, Any]]:
        """Return the graph with weights, and inputs to run it with. Raises InputError where it holds no weights."""
        from graphprobe import fxfile
        from graphprobe.cli import inputs

        if self.gm is not None:
            return self.gm, self.args, self.kwargs
        if not self.path:
            raise InputError("only an .fx file or a model can be run; give --taps and --trace the file of a run")
        gm = fxfile.load(self.path)
        return gm, *inputs.for_graph(gm, self.path, inputs_file)


def drawable(spec: str, *, side: str = "after", section: str | None = None) -> Drawable:
    """Read what `spec` names: ``.fx``, a dump ``.txt`` or a directory of dumps, a report ``.json``, or a model.

    A run that `graphprobe run --json` printed stands for its gravest comparison. `side` chooses the graph of a report,
    `section` the graph of a dump that holds several. Raises InputError, FxFileError, DumpError, RenderError.
    """
    suffix = Path(spec).suffix
    if suffix == ".json":
        run = _read_run(spec)
        report = read_report(spec) if run is None else run_comparison(run)
        return Drawable(report.before if side == "before" else report.after, report, run)
    if suffix == ".txt":
        return Drawable(_from_dump(spec, section))
    if os.path.isdir(spec) and not Path(spec, "config.json").is_file():
        return Drawable(_from_dump(_last_dump(spec), section))
    if os.path.isdir(spec) or (":" in spec and not os.path.exists(spec)):
        return _captured(spec)
    return _from_fx(spec)


def read_report(path: str) -> Report:
    """Read a report that `graphprobe diff -o` wrote. Raises InputError."""
    try:
        return Report.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is no report of graphprobe diff -o: {error}") from error


def _read_run(path: str) -> RunReport | None:
    """Read what `graphprobe run --json` printed; None where the file is something else."""
    try:
        return RunReport.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _from_fx(path: str) -> Drawable:
    import graphprobe

    return Drawable(graphprobe.view(graphprobe.load(path, weights=False), Path(path).stem), path=path)


def _from_dump(path: str, wanted: str | None) -> GraphView:
    from graphprobe.foreign import autodeploy

    sections = {section.name: section for section in autodeploy.read(path).sections}
    if wanted is not None and wanted not in sections:
        raise InputError(f"{path} holds no graph {wanted!r}{nearest(wanted, sections)}; it has {', '.join(sections)}")
    if not sections:
        raise InputError(f"{path} holds no graph: the transform left none")
    # after compilation the graph of the root is a shell around another one
    chosen = sections[wanted] if wanted is not None else max(sections.values(), key=_size)
    return autodeploy.view(chosen, Path(path).stem + (f" {chosen.name}" if len(sections) > 1 else ""))


def _size(section: Section) -> int:
    return len(section.lines)


def _last_dump(directory: str) -> str:
    found = [(int(match.group(1)), path) for path in Path(directory).iterdir() if (match := _DUMP.match(path.name))]
    if not found:
        raise InputError(
            f"{directory} is neither a transformers model (no config.json) nor a directory of dumps (no 001_*.txt)"
        )
    return str(max(found)[1])


def _captured(spec: str) -> Drawable:
    import graphprobe
    from graphprobe.cli import models

    if os.path.isdir(spec):
        loaded = models.from_directory(spec, prompt=None, length=16, dtype="auto", attn=None)
    else:
        loaded = models.from_factory(spec)
    gm = graphprobe.capture(loaded.model, loaded.args, loaded.kwargs)
    name = Path(spec).name if os.path.isdir(spec) else spec.rpartition(":")[2]
    return Drawable(graphprobe.view(gm, name), gm=gm, args=loaded.args, kwargs=loaded.kwargs)

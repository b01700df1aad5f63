"""``graphprobe dumps``: what a directory of graph dumps tells, ours or AutoDeploy's."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from graphprobe.cli import output
from graphprobe.errors import InputError
from graphprobe.render.numbers import WIDTH, table, wrap

if TYPE_CHECKING:
    from graphprobe.dumps.comparing import Change
    from graphprobe.dumps.reading import Dumps, Entry

SUMMARY = "read a directory of graph dumps: what each transform changed, where metadata was lost"
DESCRIPTION = """\
Read the dumps that `graphprobe run --dump DIR` or AutoDeploy (AD_DUMP_GRAPHS_DIR) has written. Without more: a table of
the transforms, what each added, removed and rewrote, and the nodes that lost their metadata, with the transform that
lost it. With A and B (numbers, transforms or files): the difference of two dumps, line by line. With --config: whether
what a pipeline file asked for is really in the graphs.
Exit status: 0 nothing to complain about (or no difference), 1 metadata is missing, the dumps differ, or the graphs are
not as configured, 2 trouble.
"""
EXAMPLES = """\
  graphprobe dumps dumps
  graphprobe dumps dumps 3 4
  graphprobe dumps dumps fuse_rmsnorm fuse_add_rms_norm
  graphprobe dumps dumps --config default.yaml --config mine.yaml
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("directory", metavar="DIR", help="the directory")
    parser.add_argument("first", metavar="A", nargs="?", help="a dump: its number, its transform or its file")
    parser.add_argument("second", metavar="B", nargs="?", help="another one")
    parser.add_argument("--config", metavar="FILE.yaml", action="append", default=[], help="a pipeline file, see above")


def run(options: argparse.Namespace) -> int:
    """Read and print. Raises DumpError, PipelineError, InputError."""
    from graphprobe.dumps.reading import read

    if options.first and not options.second:
        raise InputError("give two dumps to compare: graphprobe dumps DIR A B")
    dumps = read(options.directory)
    if options.first:
        return _between(dumps, options)
    if options.config:
        return _configured(dumps, options)
    return _overview(dumps, options)


def _overview(dumps: Dumps, options: argparse.Namespace) -> int:
    from graphprobe.dumps import comparing

    changes = [comparing.change(before, after) for before, after in zip(dumps.entries, dumps.entries[1:], strict=False)]
    changes.insert(0, comparing.Change(lost=comparing.missing(dumps.entries[0])))
    if options.json:
        output.print_json([_data(dumps, entry, change) for entry, change in zip(dumps.entries, changes, strict=True)])
    else:
        print(_table(dumps, changes))
        for entry, change in zip(dumps.entries, changes, strict=True):
            print(_details(dumps, entry, change), end="")
    return 1 if any(change.lost for change in changes) else 0


def _table(dumps: Dumps, changes: list[Change]) -> str:
    rows = []
    for entry, change in zip(dumps.entries, changes, strict=True):
        rows.append(
            [
                str(entry.number),
                entry.stage,
                entry.transform,
                _came(dumps, entry, change),
                str(len(entry.lines)),
                _count(len(change.added), len(change.removed), len(change.rewritten)),
                _count(len(change.weights_added), len(change.weights_removed), len(change.weights_changed)),
                str(len(change.lost) or ""),
            ]
        )
    headers = ["", "stage", "transform", "came of it", "nodes", "+ - ~ nodes", "+ - ~ weights", "lost val"]
    return table(headers, rows, flexible=(1, 2))


def _came(dumps: Dumps, entry: Entry, change: Change) -> str:
    from graphprobe.render.runs import matches

    step = dumps.step(entry)
    if step is not None:
        return matches(step) if step.status == "applied" else step.status
    if entry is dumps.entries[0]:
        return "first"
    return "changed" if change else "unchanged"


def _count(added: int, removed: int, changed: int) -> str:
    return f"+{added} -{removed} ~{changed}" if added or removed or changed else ""


def _details(dumps: Dumps, entry: Entry, change: Change) -> str:
    from graphprobe.render.runs import came

    lines = _operators(change.operators, "")
    if change.collectives:
        lines += _operators(change.collectives, "collectives: ")
    if change.weights_changed:
        now = entry.weights
        lines += wrap("weights: " + ", ".join(f"{name} is now {now[name]}" for name in change.weights_changed), "  ")
    if change.lost:
        lines += wrap(f"without metadata: {', '.join(change.lost)}", "  ")
    step = dumps.step(entry)
    if step is not None and step.rewritten and not change:
        what = f"rewrote what the text form does not show (keyword arguments, weights): {', '.join(step.rewritten)}"
        lines += wrap(what, "  ")
    if step is not None and step.reason:
        lines += wrap(came(step), "  ")
    return "\n".join(["", f"{entry.number} {entry.transform}", *lines, ""]) if lines else ""


def _operators(operators: dict[str, int], title: str) -> list[str]:
    """Return '+5 aten.rms_norm.default, -5 aten.rsqrt.default' in lines that break at commas only."""
    from graphprobe.dumps.conformance import signed

    lines = [""]
    for item in (title + signed(operators)).split(", ") if operators else []:
        if lines[-1] and len(lines[-1]) + len(item) + 4 > WIDTH:
            lines.append("")
        lines[-1] += f", {item}" if lines[-1] else item
    return [f"  {line}{',' if line is not lines[-1] else ''}" for line in lines if line]


def _data(dumps: Dumps, entry: Entry, change: Change) -> dict[str, object]:
    from graphprobe.records import to_data

    return {
        "number": entry.number,
        "stage": entry.stage,
        "transform": entry.transform,
        "file": entry.file,
        "status": _came(dumps, entry, change),
        "nodes": len(entry.lines),
        "collectives": change.collectives,
        **to_data(change),
    }


def _between(dumps: Dumps, options: argparse.Namespace) -> int:
    from graphprobe.dumps import comparing

    before, after = dumps.find(options.first), dumps.find(options.second)
    lines = list(comparing.lines(before, after))
    if options.json:
        output.print_json({"before": before.file, "after": after.file, "lines": lines})
    else:
        print("\n".join([f"--- {before.file}", f"+++ {after.file}", *lines]))
    return 1 if lines else 0


def _configured(dumps: Dumps, options: argparse.Namespace) -> int:
    from graphprobe.dumps.conformance import conformance
    from graphprobe.pipeline import config

    answers = conformance(dumps, config.load(options.config))
    if options.json:
        output.print_json(list(answers))
    else:
        rows = [[answer.transform, answer.stage, answer.status, str(len(answer.operators) or "")] for answer in answers]
        print(table(["transform", "stage", "in the graphs", "operators changed"], rows, flexible=(0,)))
        for answer in answers:
            said = (wrap(answer.reason, "  ") if answer.reason else []) + _operators(answer.operators, "")
            if said:
                print("\n".join(["", answer.transform, *said]))
    return 0 if all(answer.ok for answer in answers) else 1

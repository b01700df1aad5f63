"""``index.html``: the transforms of a run as one table, with links to what was dumped after each."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from graphprobe.records import Lint, Report, RunReport, RunStep
from graphprobe.render.numbers import error
from graphprobe.render.runs import came

_SHOWN = 8  # defects of one kind that are not folded in

_STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em; color: #222; }
table { border-collapse: collapse; }
th, td { padding: .25em .7em; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
p code { overflow-wrap: anywhere; } li { margin: .2em 0; } .fix { color: #555; } summary { cursor: pointer; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.applied td.status { color: #1b6e35; } tr.failed td.status { color: #b00020; font-weight: bold; }
tr.idle { color: #777; } td.bad { color: #b00020; } code, pre { font-size: 13px; } pre { white-space: pre-wrap; }
"""
_HEADERS = (
    "", "stage", "transform", "what came of it", "nodes", "weights, MB", "memory, MB", "ms", "checks, ms", "lints",
    "verdict", "dump",
)  # fmt: skip


def html(report: RunReport, files: Sequence[str]) -> str:
    """Return the page; `files` are the names of what lies beside it."""
    rows = "\n".join(_row(number, step, files) for number, step in enumerate(report.steps, 2))
    head = "".join(f"<th>{escape(title)}</th>" for title in _HEADERS)
    details = "\n".join(_details(step) for step in report.steps if not step.ok or step.error or step.notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="graphprobe">
<title>graphprobe run: {len(report.steps)} transforms</title><style>{_STYLE}</style></head><body>
<h1>{escape(_title(report))}</h1>
<p><code>{escape(report.pipeline)}</code></p>
{_summary(report)}
<table><thead><tr>{head}</tr></thead><tbody>
{_first(files)}
{rows}
</tbody></table>
{details}
</body></html>
"""


def _title(report: RunReport) -> str:
    applied = sum(step.status == "applied" for step in report.steps)
    bad = report.first
    wrong = f"; first trouble: {bad.transform}" if bad is not None else ""
    return f"{applied} of {len(report.steps)} transforms applied in {report.seconds:.1f} s{wrong}"


def _summary(report: RunReport) -> str:
    lines = [f"note: {note}" for note in report.notes]
    if report.report is not None:
        lines.insert(0, f"from the captured graph to the last one: {report.report.verdict}{_culprit(report.report)}")
    return "\n".join(f"<p>{escape(line)}</p>" for line in lines)


def _culprit(report: Report) -> str:
    """Return ': operation in module, introduced ..., in exact arithmetic ...' of the first finding."""
    first = report.first
    if first is None or report.ok:
        return ""
    where = f" in {first.module_path}" if first.module_path else ""
    exact = f", {error(first.exact)} in exact arithmetic" if first.exact is not None else ""
    return f": {first.culprit or first.op}{where}; relative L2 error {error(first.introduced)} made there{exact}"


def _first(files: Sequence[str]) -> str:
    name = next((file for file in files if file.endswith(".txt")), "")
    empty = "".join("<td></td>" for _ in range(len(_HEADERS) - 5))
    return (
        f'<tr class="idle"><td class="number">1</td><td>export</td><td>export_to_gm</td><td>captured</td>{empty}'
        f"<td>{_links(name, files)}</td></tr>"
    )


def _row(number: int, step: RunStep, files: Sequence[str]) -> str:
    kind = step.status if step.status in ("applied", "failed") else "idle"
    verdict = step.report.verdict if step.report is not None else ""
    passed = step.report is None or step.report.ok
    cells = [
        f'<td class="number">{number}</td><td>{escape(step.stage)}</td><td><code>{escape(step.transform)}</code></td>',
        f'<td class="status" title="{escape(", ".join(step.matches))}">{escape(came(step))}</td>',
        f'<td class="number">{step.nodes_before} → {step.nodes_after}</td>',
        f'<td class="number">{_mega(step.weights_before, step.weights_after)}</td>',
        f'<td class="number">{_mega(step.memory_before, step.memory_after)}</td>',
        f'<td class="number">{1e3 * step.seconds:.0f}</td><td class="number">{1e3 * step.overhead:.0f}</td>',
        f'<td class="number{" bad" if step.lints else ""}">{len(step.lints) or ""}</td>',
        f'<td class="{"" if passed else "bad"}">{escape(verdict)}</td>',
        f"<td>{_links(step.dump, files)}</td>",
    ]
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _mega(before: int, after: int) -> str:
    was, now = f"{before / 1e6:.1f}", f"{after / 1e6:.1f}"
    return was if was == now else f"{was} → {now}"


def _links(dump: str, files: Sequence[str]) -> str:
    stem = dump.removesuffix(".txt")
    found = [file for file in files if stem and file.startswith(f"{stem}.") and not file.endswith(".safetensors")]
    return " ".join(f'<a href="{escape(file)}">{escape(file[len(stem) + 1 :])}</a>' for file in found)


def _details(step: RunStep) -> str:
    groups: dict[tuple[str, str], list[Lint]] = {}
    for lint in step.lints:
        groups.setdefault((lint.rule, lint.fix), []).append(lint)
    items = [_group(rule, fix, lints) for (rule, fix), lints in groups.items()]
    if step.report is not None and not step.report.ok:
        items.append(f"<li><b>{escape(step.report.verdict)}</b>{escape(_culprit(step.report))}</li>")
    items += [f"<li>{escape(note)}</li>" for note in step.notes]
    trace = f"<pre>{escape(step.error)}</pre>" if step.error else ""
    return f"<h2><code>{escape(step.transform)}</code></h2><ul>{''.join(items)}</ul>{trace}"


def _group(rule: str, fix: str, lints: Sequence[Lint]) -> str:
    """Return defects of one kind with the one way to mend them; many are folded in."""
    rows = [f"<li><code>{escape(lint.node)}</code> {escape(lint.message)}</li>" for lint in lints]
    shown, rest = "".join(rows[:_SHOWN]), rows[_SHOWN:]
    more = f"<details><summary>and {len(rest)} more</summary><ul>{''.join(rest)}</ul></details>" if rest else ""
    head = f"<b>{escape(rule)}</b> {len(rows) if len(rows) > 1 else ''}"
    return f'<li>{head}<ul>{shown}</ul>{more}<span class="fix">to mend it: {escape(fix)}</span></li>'

"""A run of a pipeline as text: one row a transform, then what is wrong with each."""

from __future__ import annotations

from graphprobe.records import Lint, RunReport, RunStep
from graphprobe.render.numbers import count, share, table, wrap

_SHOWN = 5  # defects of one rule that are told in full; the others are named


def text(report: RunReport) -> str:
    """Return a run as text of at most 100 columns."""
    parts = [headline(report), steps_table(report)]
    parts += [_details(step) for step in report.steps if step.lints or step.notes or step.reason or not step.ok]
    if report.report is not None:
        parts.append(f"from the captured graph to the last one: {report.report.verdict}")
    parts += ["\n".join(wrap(note, "note: ")) for note in report.notes]
    parts.append(_costs(report))
    return "\n\n".join(part for part in parts if part)


def headline(report: RunReport) -> str:
    """Return the one line that says what matters: how much was applied, and where the first trouble is."""
    applied = sum(step.status == "applied" for step in report.steps)
    line = f"{applied} of {count(len(report.steps), 'transform')} applied"
    bad = report.first
    if bad is None:
        total = report.report
        return line if total is None or total.ok else f"{line}; together they are {total.verdict}"
    if bad.status == "failed":
        return f"{line}; {bad.transform} failed"
    if bad.report is not None and not bad.report.ok:
        return f"{line}; {bad.transform} is the first whose graph differs: {bad.report.verdict}"
    return f"{line}; {bad.transform} is the first that left {count(len(bad.lints), 'defect')}"


def steps_table(report: RunReport) -> str:
    """Return the table of transforms."""
    rows = [
        [
            step.stage,
            step.transform,
            _briefly(step),
            f"{step.nodes_before} > {step.nodes_after}",
            _megabytes(step),
            f"{1e3 * step.seconds:.0f}",
            str(len(step.lints) or ""),
            step.report.verdict if step.report is not None else "",
        ]
        for step in report.steps
    ]
    headers = ["stage", "transform", "came of it", "nodes", "weights, MB", "ms", "lints", "verdict"]
    return table(headers, rows, flexible=(0, 1)) if rows else "the pipeline is empty"


def _briefly(step: RunStep) -> str:
    return matches(step) if step.status == "applied" else step.status


def matches(step: RunStep) -> str:
    """Return '1 match', '5 matches'."""
    return f"{len(step.matches):,} match{'' if len(step.matches) == 1 else 'es'}"


def _megabytes(step: RunStep) -> str:
    before, after = (f"{size / 1e6:.1f}" for size in (step.weights_before, step.weights_after))
    return after if before == after else f"{before} > {after}"


def came(step: RunStep) -> str:
    """Say what came of a transform: 'applied, 5 matches', 'matched nothing: ... (nearest: mul_3)'."""
    near = f" (nearest: {step.near_miss})" if step.near_miss else ""
    if step.status == "applied":
        missed = f"; not in {count(step.missed, 'more place')}: {step.reason}{near}" if step.missed else ""
        return f"applied, {matches(step)}{missed}"
    return f"{step.status}: {step.reason}{near}" if step.reason else step.status


def _details(step: RunStep) -> str:
    lines = wrap(f"{step.transform}: {came(step)}")
    for rule in dict.fromkeys(lint.rule for lint in step.lints):
        lines += _of_one_rule([lint for lint in step.lints if lint.rule == rule])
    for note in step.notes:
        lines += wrap(note, "  note: ")
    finding = step.report.first if step.report is not None else None
    if finding is not None:
        where = f" in {finding.module_path}" if finding.module_path else ""
        lines += wrap(f"{finding.kind}: {finding.culprit or finding.op}{where}", "  ")
    lines += [f"  | {line}" for line in step.error.splitlines()[-8:]]
    return "\n".join(lines)


def _of_one_rule(lints: list[Lint]) -> list[str]:
    lines = []
    for lint in lints[:_SHOWN]:
        place = f"{lint.node} ({lint.target})" if lint.target and lint.target != lint.node else lint.node
        lines += wrap(f"{lint.rule}: {place}: {lint.message}", "  ")
    if rest := lints[_SHOWN:]:
        names = ", ".join(lint.node for lint in rest[: 4 * _SHOWN])
        unnamed = ", ..." if len(rest) > 4 * _SHOWN else ""
        lines += wrap(f"{rest[0].rule}: and {len(rest)} more: {names}{unnamed}", "  ")
    return lines


def _costs(report: RunReport) -> str:
    own, around = sum(step.seconds for step in report.steps), sum(step.overhead for step in report.steps)
    line = f"{report.seconds:.1f} s, of which the transforms {own:.1f} s, checks and dumps around them {around:.1f} s"
    if report.seconds > 0 and own > 0:
        line += f" ({share(around / report.seconds)})"
    return line + (f"; dumps in {report.dump_dir}" if report.dump_dir else "")

"""A report, taps and lint issues as text: at most 100 columns, worst first, and the first line says what matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from graphprobe.records import (
    EXACT_RULES,
    VERDICTS,
    Coverage,
    ExactRow,
    Finding,
    Lint,
    OutputRow,
    RegionRow,
    Report,
    Tap,
)
from graphprobe.render.code import region_code
from graphprobe.render.headline import headline, next_step
from graphprobe.render.labels import clip, dims, dtype
from graphprobe.render.numbers import (
    WIDTH,
    count,
    error,
    flat,
    hang,
    made,
    share,
    size,
    statistic,
    table,
    wrap,
)
from graphprobe.render.telling import details_text

_CURES = "of the output error goes when only this region is replaced"
_LABEL = 12  # columns of the names of a finding's figures


def text(report: Report, *, verbose: bool = False) -> str:
    """Return the whole report as text of at most 100 columns; `verbose` adds every judged region."""
    parts = [headline(report)]
    shown = report.first or (worst(report.findings)[0] if report.findings else None)
    if shown is not None:
        parts.append(finding_text(shown, report))
    others = [f for f in report.findings if f is not shown]
    if others:
        parts.append(f"{count(len(others), 'other finding')}, worst first:\n{findings_table(report, skip=shown)}")
    parts.append(next_step(report))
    parts.append("\n".join(_outputs(report.outputs)))
    if verbose and report.regions:
        parts.append(f"{count(len(report.regions), 'region')}, worst first:\n{regions_table(report, None)}")
    parts.append(coverage_text(report.coverage, report.min_coverage))
    parts.append("\n".join(line for note in report.notes for line in hang("note: ", note)))
    parts.append("\n".join(_provenance(report)))
    return "\n\n".join(part for part in parts if part)


def finding_text(finding: Finding, report: Report | None = None) -> str:
    """Return one finding in full: its figures with their meaning, its region, and its explanation.

    With the report it is from, what the region computes on either side is listed, too.
    """
    sides = f"{count(len(finding.before), 'operation')} of before, {len(finding.after)} of after"
    region = f"{sides}; closed by {' = '.join(name for name in finding.outputs if name)}".removesuffix("; closed by ")
    rows = [
        ("operation", f"{finding.culprit or '-'}  {finding.op}{'' if finding.located else ', or a later one'}"),
        ("module", finding.module_path or "(root)"),
        ("source", finding.source),
        ("transform", finding.transform),
        ("introduced", f"{error(finding.introduced):9} relative L2 error made here, on before's own inputs"),
        ("total", f"{error(finding.total):9} accumulated up to here"),
        ("values", details_text(finding.details)),
        ("exact", f"{error(finding.exact):9} difference in exact arithmetic"),
        ("floor", f"{error(finding.floor):9} rounding error of before itself"),
        ("cures", f"{share(finding.cures):9} {_CURES if finding.cures is not None else 'no share of an output error'}"),
    ]
    closing = [
        ("region", region),
        ("opened by", ", ".join(" = ".join(pair) for pair in finding.frontier)),
        ("nearer", f"{finding.better} is nearer to exact arithmetic" if finding.better else ""),
        ("rule", finding.rule),
        ("accepted", finding.accepted),
    ]
    lines = [f"{flat(finding.kind)}{'' if finding.located else ' (only the region is known, not the operation)'}"]
    lines += _fields(rows)
    lines += _code(finding, report) if report is not None else []
    lines += _fields(closing)
    for prose in (finding.explanation, "" if finding.hint in finding.explanation else finding.hint):
        if prose:
            lines.extend(wrap(prose, "  "))
    return "\n".join(lines)


def _fields(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [line for name, value in rows if value for line in hang(f"  {name:{_LABEL}}", value)]


def _code(finding: Finding, report: Report) -> list[str]:
    """Return what the region computes in before and in after, a line an operation, the culprit marked."""
    lines = []
    for side, code in zip(("before", "after"), region_code(report, finding), strict=True):
        for number, line in enumerate(code):
            head = f"  {side if number == 0 else '':{_LABEL - 2}}{'>' if line.culprit else ' '} "
            lines.append(head + clip(flat(line.text), WIDTH - len(head)))
    return lines


def findings_table(report: Report, skip: Finding | None = None) -> str:
    """Return the report's findings as a table, worst first; '' where there are none."""
    rows = [
        [
            f.kind + (" (accepted)" if f.accepted else "" if f.causal else " (passed on)"),
            f.module_path,
            f.culprit or f.op,
            error(f.introduced),
            error(f.total),
            error(f.exact),
            error(f.floor),
            share(f.cures),
        ]
        for f in worst(report.findings)
        if f is not skip
    ]
    headers = ["kind", "module", "operation", "introduced", "total", "exact", "floor", "cures"]
    return table(headers, rows, flexible=(1, 2)) if rows else ""


def regions_table(report: Report, limit: int | None = 20) -> str:
    """Return the judged regions as a table, worst first, at most `limit` of them (None: all)."""
    ranked = sorted(report.regions, key=_region_rank)
    rows = [
        [
            r.verdict,
            r.before,
            r.after,
            r.module_path,
            error(r.introduced),
            error(r.total),
            error(r.exact),
            error(r.floor),
        ]
        for r in ranked[:limit]
    ]
    if not rows:
        return ""
    headers = ["verdict", "before", "after", "module", "introduced", "total", "exact", "floor"]
    lines = table(headers, rows, flexible=(1, 2, 3))
    hidden = len(ranked) - len(rows)
    return lines + (f"\n{count(hidden, 'more region')}" if hidden else "")


def worst(findings: Sequence[Finding]) -> list[Finding]:
    """Order findings by gravity, then the causal before the passed-on, then by the error they make."""
    return sorted(
        findings, key=lambda f: (bool(f.accepted), -_gravity(f.kind), not f.causal, -size(made(f.introduced, f.exact)))
    )


def coverage_text(coverage: Coverage, min_coverage: float = 0.0) -> str:
    """Return what was compared and what was not, in a sentence or two."""
    low = f", below the {share(min_coverage)} asked for" if coverage.resolution < min_coverage else ""
    first = (
        f"coverage: {count(coverage.compared, 'operation')} compared ({share(coverage.fraction)} of after's), "
        f"{coverage.inside:,} inside judged regions; resolution {share(coverage.resolution)}{low}"
    )
    left_out = (
        (coverage.derived, "views"),
        (coverage.pardoned, "pardoned"),
        (coverage.unknown, "unknown"),
        (coverage.unmatched_before, "of before and"),
        (coverage.unmatched_after, "of after without a partner"),
    )
    rest = ", ".join(f"{number:,} {what}" for number, what in left_out).replace("before and,", "before and")
    lines = hang("", f"{first}; {rest}.")
    if coverage.evidence:
        claims = ", ".join(f"{n:,} by {name}" for name, n in sorted(coverage.evidence.items(), key=lambda kv: -kv[1]))
        lines += hang("", f"claims: {claims}.")
    if coverage.largest:
        lines += hang("", f"largest region: {coverage.largest}.")
    if coverage.dont_care:
        lines += hang("", f"left out as padding or fully masked: {count(coverage.dont_care, 'element')}.")
    if coverage.unmatched:
        names = ", ".join(coverage.unmatched[:6]) + (" ..." if len(coverage.unmatched) > 6 else ".")
        lines += hang("", f"in no judged region: {names}")
    return "\n".join(lines)


def taps_text(taps: Sequence[Tap]) -> str:
    """Return the taps as a table in graph order; the first line tells where NaN and infinities begin."""
    measured = [tap for tap in taps if not tap.derived]
    bad = [tap for tap in measured if tap.nan or tap.inf]
    first = f"; the first with NaN or infinity is {bad[0].name}, {len(bad)} in all" if bad else ", all finite"
    lines = hang("", f"{count(len(measured), 'value')} measured, {count(len(taps) - len(measured), 'view')}{first}")
    if not taps:
        return lines[0]
    headers = ["name", "op", "shape", "min", "max", "mean", "rms", "odd"]
    rows = [_tap_row(tap) for tap in taps]
    if any(tap.checksum is not None for tap in taps):
        headers.append("checksum")
        for row, tap in zip(rows, taps, strict=True):
            row.append("" if tap.checksum is None else f"{tap.checksum:08x}")
    return "\n".join([*lines, table(headers, rows, flexible=(0, 1, 2))])


def _tap_row(tap: Tap) -> list[str]:
    shape = f"{dims(tap.shape)} {dtype(tap.dtype)}"
    if tap.derived:
        return [tap.name, tap.op, shape, "", "", "", "", f"view of {clip(tap.of, 20)}"]
    odd = [f"{n:,} {what}" for n, what in ((tap.nan, "nan"), (tap.inf, "inf"), (tap.zeros, "zero")) if n]
    figures = [statistic(value) for value in (tap.min, tap.max, tap.mean, tap.rms)]
    return [tap.name, tap.op, shape, *figures, ", ".join(odd)]


def exact_text(rows: Sequence[ExactRow]) -> str:
    """Return the operators with the rule that judges each, and below what the rules mean."""
    if not rows:
        return "no operators"
    counted = any(row.count for row in rows)
    headers = ["operator", *(["nodes"] if counted else []), "rule", "by"]
    cells = [[row.operator, *([str(row.count)] if counted else []), row.rule, row.note] for row in rows]
    used = [rule for rule in EXACT_RULES if any(row.rule == rule for row in rows)]
    legend = [line for rule in used for line in hang(f"{rule:14}", EXACT_RULES[rule])]
    return "\n".join([table(headers, cells, flexible=(0, len(headers) - 1)), "", *legend])


def lint_text(issues: Sequence[Lint]) -> str:
    """Return the defects of a graph, each with its place and its cure; the first line counts them by rule."""
    if not issues:
        return "no defects found"
    rules = ", ".join(f"{n} {rule}" for rule, n in Counter(issue.rule for issue in issues).most_common())
    lines = hang("", f"{count(len(issues), 'defect')}: {rules}")
    for issue in issues:
        where = ", ".join(word for word in (issue.module_path, issue.source) if word)
        made = f", made by transform {issue.transform}" if issue.transform else ""
        target = f" ({issue.target})" if issue.target else ""
        lines += ["", *hang("", f"{issue.rule}: {issue.node}{target}{' at ' + where if where else ''}{made}")]
        lines += wrap(issue.message, "  ")
        lines += hang("  mend: ", issue.fix)
    return "\n".join(lines)


def _outputs(rows: Sequence[OutputRow]) -> list[str]:
    ranked = sorted(rows, key=lambda row: -size(row.error))
    lines = []
    for row in ranked[:8]:
        how = f"relative L2 {error(row.error)}, largest {error(row.max_abs)}"
        how = "bitwise equal" if row.identical else "not compared" if row.error is None else how
        lines += hang("", f"{_named(row.path)} {dims(row.shape)} {dtype(row.dtype)}: {how}")
        lines += wrap(details_text(row.details), "  ") if row.details and not row.identical else []
    if len(ranked) > 8:
        equal = sum(1 for row in ranked[8:] if row.identical)
        lines.append(f"{count(len(ranked) - 8, 'more output')}, {equal} of them bitwise equal")
    return lines


def _named(path: str) -> str:
    return "output" if path in ("", "output") else f"output {path}"


def _provenance(report: Report) -> list[str]:
    lines = hang("reproduce: ", report.command) if report.command else []
    if report.environment:
        said = ", ".join(f"{key} {value}" for key, value in report.environment.items())
        lines += hang("environment: ", said)
    return lines


def _gravity(kind: str) -> int:
    return VERDICTS.index(kind) if kind in VERDICTS else len(VERDICTS)


def _region_rank(row: RegionRow) -> tuple[int, float]:
    return (-_gravity(row.verdict), -size(made(row.introduced, row.exact)))

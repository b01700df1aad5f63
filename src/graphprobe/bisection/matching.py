"""Which match of a transform a finding lies in. A transform names its matches by module path or by node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphprobe.records import Finding, GraphView, Report


def all_of(report: Report, matches: Sequence[str]) -> tuple[str, ...]:
    """Return the match of each finding of the report's verdict, the earliest first; without one, its place."""
    first = report.first
    if first is None:
        return ()
    findings = [first, *(f for f in report.findings if f.causal and not f.accepted and f.kind == first.kind)]
    return tuple(dict.fromkeys(match_of(finding, report, matches) for finding in findings))


def match_of(finding: Finding, report: Report, matches: Sequence[str]) -> str:
    """Return the match that holds the finding, else the module path or the node of its culprit."""
    for place in _places(finding, report):
        held = [match for match in matches if match == place or _holds(match, place)]
        if held:
            return max(held, key=len)
    for place in _places(finding, report):  # the match may be deeper than the finding
        held = [match for match in matches if place and _holds(place, match)]
        if len(held) == 1:
            return held[0]
    return finding.module_path or finding.culprit


def _holds(outer: str, inner: str) -> bool:
    return inner.startswith(f"{outer}.")


def _places(finding: Finding, report: Report) -> Iterator[str]:
    """Names and module paths of the finding's nodes, the culprit's first."""
    nodes = (finding.culprit, *reversed(finding.after), *reversed(finding.before), *finding.outputs)
    for name in nodes:
        if name:
            yield name
            yield from filter(None, (_path(view, name) for view in (report.after, report.before)))
    yield finding.module_path


def _path(view: GraphView, name: str) -> str:
    node = view.by_name.get(name)
    return node.module_path if node is not None else ""

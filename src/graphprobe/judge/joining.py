"""The reports of several input sets become one: a defect may show on one input and hide on another.

One finding stands for all sets that show it, taken from the set where it is largest; regions and outputs keep their
gravest row, and what was compared least is what the report vouches for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from graphprobe.records import VERDICTS, Finding, RegionRow, Report

Row = TypeVar("Row")


def join(reports: Sequence[Report]) -> Report:
    """Join the reports of the same two graphs on several input sets, in the order of the sets.

    The verdict is the gravest of them; `unknown` on one set is not covered up by a pass on another. Raises ValueError
    where there are no reports.
    """
    if not reports:
        raise ValueError("there are no reports to join")
    if len(reports) == 1:
        return reports[0]
    gravest = max(reports, key=lambda r: VERDICTS.index(r.verdict))
    least = min(reports, key=lambda r: r.coverage.resolution)
    return dataclasses.replace(
        gravest,
        findings=_findings(gravest, reports),
        coverage=least.coverage,
        regions=_worst((row for r in reports for row in r.regions), lambda row: (row.before, row.after), _gravity),
        outputs=_worst((row for r in reports for row in r.outputs), lambda row: row.path, lambda row: row.error or 0.0),
        notes=tuple(dict.fromkeys(note for r in reports for note in r.notes)),
        seconds=sum(r.seconds for r in reports),
    )


def _findings(gravest: Report, reports: Sequence[Report]) -> tuple[Finding, ...]:
    """Of each finding the largest showing, in the order of the graph; roundings only where nothing graver stands."""
    shown = [dataclasses.replace(f, inputs=i) for i, r in enumerate(reports) for f in r.findings]
    if gravest.verdict not in ("identical", "rounding"):
        shown = [f for f in shown if f.kind != "rounding"]
    kept = _worst(shown, lambda f: (f.kind, f.outputs), lambda f: f.introduced or 0.0)
    order = {node.name: i for i, node in enumerate(gravest.after.nodes)}
    return tuple(sorted(kept, key=lambda f: (not f.causal, order.get(f.outputs[1], len(order)))))


def _gravity(row: RegionRow) -> tuple[int, float]:
    grade = VERDICTS.index(row.verdict) if row.verdict in VERDICTS else -1  # "pardoned" is no verdict
    return grade, row.introduced or 0.0


def _worst(rows: Iterable[Row], same: Callable[[Row], Hashable], size: Callable[[Row], object]) -> tuple[Row, ...]:
    kept: dict[Hashable, Row] = {}
    for row in rows:
        key = same(row)
        if key not in kept or size(row) > size(kept[key]):  # type: ignore[operator]
            kept[key] = row
    return tuple(kept.values())

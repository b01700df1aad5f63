"""A step of the compiler that writes one operation as many: what was one operation before is located, however many now.

A report's resolution asks for regions of at most 16 operations of after. AOTAutograd makes 36 of one attention; such a
region is as good an answer where it is one operation of before.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from graphprobe.bisection.oracle import Answer
from graphprobe.bisection.search import GOOD, UNKNOWN
from graphprobe.records import Report

_SMALL = 16  # operations of a region on either side, views included
_RIGHT = ("identical", "rounding")


def judged(answer: Answer, options: dict[str, Any]) -> Answer:
    """Return the answer; where only large expansions made it unknown, the one that the regions give."""
    report = answer.report
    if answer.verdict != UNKNOWN or report is None or not _is_whole(report):
        return answer
    size = sum(row.size_after for row in report.regions)
    small = [row for row in report.regions if min(row.size_before, row.size_after) <= _SMALL]
    share = sum(row.size_after for row in small) / size if size else 0.0
    if share < options.get("min_coverage", 0.9):
        return answer
    verdict = "identical" if all(row.identical for row in report.outputs) else "rounding"
    note = f"{share:.0%} of the operations lie in regions of at most {_SMALL} operations of one of the sides"
    return Answer(GOOD, verdict, report=dataclasses.replace(report, verdict=verdict, notes=(*report.notes, note)))


def _is_whole(report: Report) -> bool:
    """Whether all was judged, and nothing stands."""
    coverage = report.coverage
    left = coverage.unknown or coverage.unmatched
    return bool(report.regions and report.outputs) and not left and all(r.verdict in _RIGHT for r in report.regions)

"""Assertions for other people's unit tests: a fusion, a kernel or an export must compute what it replaces.

    from graphprobe.testing import assert_equivalent

    def test_my_fusion():
        assert_equivalent(model, fuse(model), (x,))

There is no tolerance to choose: both sides are compared in exact arithmetic, region by region.
"""

from __future__ import annotations

from typing import Any

from graphprobe.api import Args, Kwargs, Side, diff
from graphprobe.records import Report

__all__ = ["assert_equivalent"]


def assert_equivalent(before: Side, after: Side, args: Args = (), kwargs: Kwargs = None, **options: Any) -> Report:
    """Assert that two versions of a model compute the same function, up to rounding; return the report.

    Takes what `graphprobe.diff` takes, also its options (`allow=("quantization",)`, `accept=`, `valid=`, ...). Raises
    AssertionError with the finding in words where they differ or where too little could be compared, and
    GraphprobeError on bad input.
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    report = diff(before, after, args, kwargs, **options)
    if not report.ok:
        raise AssertionError(str(report))
    return report

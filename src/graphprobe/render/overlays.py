"""What a report or taps have to say about a graph, ready to be written over its picture."""

from __future__ import annotations

from collections.abc import Sequence

from graphprobe.records import Report, Tap
from graphprobe.render.boxes import Overlay
from graphprobe.render.heat import AGREED, heat, scale_keys
from graphprobe.render.numbers import error, made, statistic
from graphprobe.render.scene import Key
from graphprobe.render.wording import headline


def overlay_report(report: Report, side: str = "after") -> Overlay:
    """Write the error of every judged region at its output in one of the report's graphs; `side` is before or after."""
    lines: dict[str, list[str]] = {}
    fills: dict[str, str] = {}
    for row in report.regions:
        name = row.after if side == "after" else row.before
        grave = row.verdict not in ("identical", "rounding")
        fills[name] = heat(made(row.introduced, row.exact)) if grave else AGREED
        same = row.verdict == "identical" and not row.total
        figures = f"{row.verdict}: {error(row.introduced)}, total {error(row.total)}"
        lines[name] = ["identical" if same else figures]
    legend = (Key("agrees", AGREED), *scale_keys(set(fills.values())))
    return Overlay(lines, fills, headline(report), legend)


def overlay_taps(taps: Sequence[Tap]) -> Overlay:
    """Write each tap's range and rms at its operation, and mark those with NaN or infinities."""
    lines: dict[str, list[str]] = {}
    fills: dict[str, str] = {}
    for tap in taps:
        if tap.derived:
            continue
        name = tap.name.rsplit("/", 1)[-1]
        lines[name] = [f"{statistic(tap.min)} to {statistic(tap.max)}, rms {statistic(tap.rms)}"]
        if tap.nan or tap.inf:
            lines[name].append(f"{tap.nan:,} NaN, {tap.inf:,} infinite")
            fills[name] = heat(float("nan"))
    legend = (Key("NaN or infinity", heat(float("nan"))),) if fills else ()
    return Overlay(lines, fills, legend=legend)

"""What a report or taps have to say about a graph, ready to be written over its picture."""

from __future__ import annotations

from collections.abc import Sequence

from graphprobe.records import Report, Tap
from graphprobe.render.boxes import Overlay
from graphprobe.render.context import tainted_by, was_passed_on
from graphprobe.render.headline import headline
from graphprobe.render.heat import AGREED, HATCH, heat, scale_keys
from graphprobe.render.numbers import error, made, statistic
from graphprobe.render.scene import Key
from graphprobe.render.wiring import wire


def overlay_report(report: Report, side: str = "after") -> Overlay:
    """Write the error of every judged region at its output in one of the report's graphs; `side` is before or after."""
    lines: dict[str, list[str]] = {}
    fills: dict[str, str] = {}
    below = tainted_by(report, wire(report.after))
    hatched: set[str] = set()
    for row in report.regions:
        name = row.after if side == "after" else row.before
        grave = row.verdict not in ("identical", "rounding")
        fills[name] = heat(made(row.introduced, row.exact)) if grave else AGREED
        if not grave and was_passed_on(row, below):
            hatched.add(name)
        same = row.verdict == "identical" and not row.total
        what = "passed on" if name in hatched else row.verdict
        lines[name] = ["identical" if same else f"{what}: made {error(row.introduced)}, total {error(row.total)}"]
    legend = [Key("agrees", AGREED), *scale_keys(set(fills.values()))]
    if hatched:
        legend.append(Key("error passed on", HATCH, hatched=True))
    return Overlay(lines, fills, headline(report), tuple(legend), hatched=hatched)


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


def combine(overlays: Sequence[Overlay]) -> Overlay | None:
    """Lay several overlays on one another; the fills of later ones go over those of earlier ones. None of none."""
    lines: dict[str, list[str]] = {}
    for overlay in overlays:
        for name, texts in overlay.lines.items():
            lines.setdefault(name, []).extend(texts)
    if not overlays:
        return None
    return Overlay(
        lines,
        {name: fill for overlay in overlays for name, fill in overlay.fills.items()},
        "; ".join(overlay.title for overlay in overlays if overlay.title),
        tuple(dict.fromkeys(key for overlay in overlays for key in overlay.legend)),
        {name: time for overlay in overlays for name, time in overlay.micros.items()},
        {name for overlay in overlays for name in overlay.hatched},
    )

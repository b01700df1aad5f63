"""The first diverging subgraph: the region of one finding in both graphs, side by side, with what lies around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graphprobe.records import Finding, RegionRow, Report
from graphprobe.render import labels
from graphprobe.render.boxes import tooltip
from graphprobe.render.context import LIMIT, Focus, Side, focus_of, side_of, tainted_by, was_passed_on
from graphprobe.render.folding import Group, group_of
from graphprobe.render.headline import headline
from graphprobe.render.heat import AGREED, ALONE, HATCH, PART, heat, scale_keys
from graphprobe.render.numbers import error, made
from graphprobe.render.roles import NO_VALUE
from graphprobe.render.scene import Box, Frame, Key, Line, Link, Scene, stripes, to_dot
from graphprobe.render.wiring import CALLS, Wiring, wire

EDGE, CLAIM, FAINT = "#7f2704", "#1f65ad", "#9dbcdc"


def dot_divergence(report: Report, finding: Finding | None = None, *, limit: int = LIMIT, heading: bool = True) -> str:
    """Return a finding's region in both graphs side by side as DOT text, in at most about `limit` boxes.

    Without `finding` it is the report's first one; where there is none, the region that introduces the largest error.
    Without `heading` only the legend stands above it.
    """
    before, after = wire(report.before), wire(report.after)
    focus = focus_of(report, finding, before, after)
    forward = {claim.before: claim.after for claim in report.claims}
    backward = {claim.after: claim.before for claim in report.claims}
    forward |= dict(focus.frontier) | dict([focus.outputs])
    backward |= {y: x for x, y in (*focus.frontier, focus.outputs)}
    sides = (
        side_of("before", before, focus, {r.before: r for r in report.regions}, forward, limit // 2),
        side_of(
            "after", after, focus, {r.after: r for r in report.regions}, backward, limit // 2, tainted_by(report, after)
        ),
    )
    boxes = [_box(side, group, focus) for side in sides for group in side.groups]
    links = [link for side in sides for link in _links(side)]
    claims, level = _claims(sides, focus)
    title = [Line(headline(report), "title"), *(Line(text) for text in focus.lines)] if heading else []
    legend = _legend(boxes, bool(claims))
    return to_dot(Scene(tuple(title), tuple(boxes), (*links, *claims), _frames(sides, focus), legend, level))


def _box(side: Side, group: Group, focus: Focus) -> Box:
    wiring = side.wiring
    inside = not side.region.isdisjoint(group.members)
    row = next((side.rows[n] for n in reversed(group.members) if n in side.rows), None)
    closes = focus.outputs[0 if side.name == "before" else 1] in group.members
    culprit = focus.culprit in group.members and (inside or not side.region)
    fill, style = _fill(side, group, inside, made(focus.introduced, focus.exact) if closes else None, row)
    lines = [*_words(wiring, group, focus.culprit), *_where(side, group, inside, focus)]
    lines += _figures(side, row, focus if closes else None)
    if culprit and side.name == ("after" if focus.culprit in focus.after else "before"):
        lines.insert(0, Line("the first operation that differs", "small", EDGE))
    if style == "striped" or (closes and inside):
        lines = [replace(line, colour="#000000") for line in lines]
    missing = any(not wiring.node(n).has_val for n in group.members)
    if missing:
        lines.append(Line('no meta["val"]', "small"))
    return Box(
        id=f"{side.name} {group.id}",
        lines=tuple(lines),
        fill=NO_VALUE.fill if missing else fill,
        border=EDGE if culprit else NO_VALUE.line if missing else "#b57a00" if inside else "#888888",
        width=3.0 if culprit else 1.5 if inside else 1.0,
        style="rounded,filled" if missing else style,
        tooltip=tooltip(wiring, group),
        cluster=(side.name, "region") if inside else (side.name,),
    )


def _figures(side: Side, row: RegionRow | None, closed: Focus | None) -> list[Line]:
    """Say what was measured at an operation of after."""
    if side.name == "before":
        return []
    if closed is not None:
        return [Line(f"introduced {error(closed.introduced)}, exact {error(closed.exact)}", "plain", EDGE)]
    if row is None:
        return []
    if row.verdict == "identical" and not row.total:
        return [Line("identical", "small", "#444444")]
    what = "passed on" if was_passed_on(row, side.tainted) else row.verdict
    return [Line(f"{what}: introduced {error(row.introduced)}, total {error(row.total)}", "small", "#444444")]


def _fill(side: Side, group: Group, inside: bool, here: float | None, row: RegionRow | None) -> tuple[str, str]:
    """Return fill and style: by error in the region, hatched where error was passed on, grey where the sides agree."""
    if inside:
        return (heat(here), "rounded,filled")
    if row is not None and row.verdict not in ("identical", "rounding"):
        return (heat(made(row.introduced, row.exact)), "rounded,filled")
    if was_passed_on(row, side.tainted):
        return (stripes(HATCH), "striped")
    if group.kind in ("module", "run") or any(n in side.partners for n in group.members):
        return (AGREED, "rounded,filled")
    view = side.wiring.node(group.members[-1]).is_view or side.wiring.node(group.members[0]).op not in CALLS
    return (AGREED, "rounded,filled") if view else (ALONE, "rounded,filled,dashed")


def _words(wiring: Wiring, group: Group, asked: str) -> list[Line]:
    last = wiring.node(group.members[-1])
    if group.kind in ("module", "run"):
        counted = f"{len(group.members)} operations"
        ends = f"{group.members[0]} to {group.members[-1]}"
        if group.kind == "run":  # of a module, without its parts: only the ends tell which
            return [Line(counted, "title"), Line(ends, "small", "#555555")]
        return [Line(group.path or "root", "title"), Line(counted, "small", "#555555")]
    if group.kind == "views":
        ops = " · ".join(labels.short_op(wiring.node(n)) for n in group.members)
        return [Line(labels.clip(ops), "plain"), Line(labels.shape_line(last), "small")]
    name = group.members[0]
    folded = [*labels.weight_lines(wiring, name), labels.detail_line(wiring, name)]
    weights = [Line(text, "plain", "#444444") for text in folded]
    text = "outputs" if last.op == "output" else labels.title(wiring, name)
    named = (
        [Line(labels.clip(name, 40), "small", "#555555")]
        if last.op in CALLS and (asked == name or not last.is_view)
        else []
    )
    return [Line(text, "title"), *named, *weights, Line(labels.shape_line(last))]


def _where(side: Side, group: Group, inside: bool, focus: Focus) -> list[Line]:
    """Name the module where it is not the region's own, and the source line inside the region."""
    lines = []
    if group.kind in ("op", "views") and group.path and group.path != focus.module:
        lines.append(Line(labels.clip(group.path), "small", "#555555"))
    source = side.wiring.node(group.members[0]).source
    if inside and source and group.kind == "op":
        lines.append(Line(labels.clip(source), "small", "#555555"))
    return lines


def _links(side: Side) -> list[Link]:
    owner = group_of(side.groups)
    drawn: dict[tuple[str, str], Link] = {}
    for group in side.groups:
        for name in group.members:
            for source in side.wiring.inputs(name):
                above = owner.get(source)
                if above is not None and above.id != group.id:
                    key = (f"{side.name} {above.id}", f"{side.name} {group.id}")
                    drawn.setdefault(key, Link(*key, colour="#666666"))
    return list(drawn.values())


def _claims(sides: tuple[Side, Side], focus: Focus) -> tuple[list[Link], tuple[tuple[str, ...], ...]]:
    """Draw the claims between boxes of the two sides; pairs in the same order on both stand at one height."""
    left, right = group_of(sides[0].groups), group_of(sides[1].groups)
    place = {group.id: index for index, group in enumerate(sides[1].groups)}
    links: dict[tuple[str, str], Link] = {}
    level: list[tuple[str, ...]] = []
    opening = {pair[0] for pair in focus.frontier}
    lowest = -1
    for group in sides[0].groups:
        for name in group.members:
            partner = right.get(sides[0].partners.get(name, ""))
            key = (f"before {group.id}", f"after {partner.id}") if partner else ("", "")
            if partner is None or left[name] is not group or key in links:
                continue
            differ, opens = name == focus.outputs[0], name in opening
            aligned = place[partner.id] > lowest and all(key[0] not in pair for pair in level)
            if aligned:
                lowest = place[partner.id]
                level.append(key)
            links[key] = Link(
                *key,
                colour=EDGE if differ else CLAIM if opens else FAINT,
                width=2.5 if differ else 1.3 if opens else 1.0,
                style="dashed",
                ranked=aligned,
                arrow=False,
                tooltip="claimed to be equal, and differ" if differ else "claimed to be equal",
            )
    return list(links.values()), tuple(level)


def _frames(sides: Sequence[Side], focus: Focus) -> dict[tuple[str, ...], Frame]:
    frames: dict[tuple[str, ...], Frame] = {}
    for side in sides:
        graph = side.wiring.graph.name
        text = side.name + (f"  {labels.clip(graph)}" if graph and graph != side.name else "")
        frames[(side.name,)] = Frame((Line(text, "title"),), "#fbfbfb")
        what = Line(labels.clip(f"region  {focus.module}".strip(), 60), "title", EDGE)
        frames[(side.name, "region")] = Frame((what,), "#fff3d6", "#b57a00", 2.0)
    return frames


def _legend(boxes: Sequence[Box], claims: bool) -> tuple[Key, ...]:
    used = {box.fill for box in boxes}
    keys = scale_keys(used)
    keys += [Key("part of the region", PART, "#b57a00")] if PART in used else []
    keys += [Key("agrees", AGREED)] if AGREED in used else []
    keys += [Key("error passed on", HATCH, hatched=True)] if any(box.style == "striped" for box in boxes) else []
    keys += [Key("no claim", ALONE)] if ALONE in used else []
    keys += [Key('no meta["val"]', NO_VALUE.fill, NO_VALUE.line)] if NO_VALUE.fill in used else []
    keys += [Key("dashed line: claimed to be equal", "#ffffff", CLAIM)] if claims else []
    return tuple(keys)

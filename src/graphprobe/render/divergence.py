"""The first diverging subgraph: the region of one finding in both graphs, side by side, with what lies around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from graphprobe.records import Finding, RegionRow, Report
from graphprobe.render import labels
from graphprobe.render.boxes import tooltip
from graphprobe.render.folding import Group, fold, group_of, singles
from graphprobe.render.numbers import error, made, share, size
from graphprobe.render.roles import NO_VALUE
from graphprobe.render.scene import Box, Frame, Key, Line, Link, Scene, stripes, to_dot
from graphprobe.render.wiring import CALLS, Wiring, wire
from graphprobe.render.wording import headline, worst

LIMIT = 60  # boxes of the whole picture
ABOVE, BELOW = 2, 1  # levels of context
#: error made -> fill, light to dark; the figure itself stands in the box.
SCALE = ((1e-6, "#fff7bc"), (1e-4, "#fee391"), (1e-2, "#fec44f"), (1e-1, "#fe9929"), (1.0, "#ec7014"))
GRAVE = "#cc4c02"  # an error of one and more, NaN and infinity
AGREED, PART, ALONE, HATCH = "#e6e6e6", "#fff9e8", "#ffffff", "#dddddd"
EDGE, CLAIM, FAINT = "#7f2704", "#1f65ad", "#9dbcdc"
PASSED_ON = 3.0  # below a finding, a total this many times what an operation introduced came from above


@dataclass(frozen=True)
class Focus:
    """What the picture is about: a finding, or the region with the largest error where there is none."""

    before: frozenset[str]
    after: frozenset[str]
    outputs: tuple[str, str]
    frontier: tuple[tuple[str, str], ...]
    module: str
    culprit: str
    introduced: float | None
    exact: float | None
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """One graph's half of the picture."""

    name: str  # before, after
    wiring: Wiring
    region: frozenset[str]
    groups: list[Group]
    rows: dict[str, RegionRow]
    partners: dict[str, str]  # claimed operations of this graph -> of the other
    tainted: frozenset[str]  # what lies below a finding


def dot_divergence(report: Report, finding: Finding | None = None, *, limit: int = LIMIT) -> str:
    """Return a finding's region in both graphs side by side as DOT text, in at most about `limit` boxes.

    Without `finding` it is the report's first one; where there is none, the region that introduces the largest error.
    """
    before, after = wire(report.before), wire(report.after)
    focus = focus_of(report, finding, before, after)
    forward = {claim.before: claim.after for claim in report.claims}
    backward = {claim.after: claim.before for claim in report.claims}
    forward |= dict(focus.frontier) | dict([focus.outputs])
    backward |= {y: x for x, y in (*focus.frontier, focus.outputs)}
    sides = (
        _side("before", before, focus, {r.before: r for r in report.regions}, forward, limit // 2),
        _side(
            "after", after, focus, {r.after: r for r in report.regions}, backward, limit // 2, _tainted(report, after)
        ),
    )
    boxes = [_box(side, group, focus) for side in sides for group in side.groups]
    links = [link for side in sides for link in _links(side)]
    claims, level = _claims(sides, focus)
    title = [Line(headline(report), "title"), *(Line(text) for text in focus.lines)]
    legend = _legend(boxes, bool(claims))
    return to_dot(Scene(tuple(title), tuple(boxes), (*links, *claims), _frames(sides, focus), legend, level))


def focus_of(report: Report, finding: Finding | None, before: Wiring, after: Wiring) -> Focus:
    """Return what to draw of a report."""
    chosen = finding or report.first or next(iter(worst(report.findings)), None)
    if chosen is not None:
        figures = (
            f"introduced {error(chosen.introduced)}, total {error(chosen.total)}, exact {error(chosen.exact)}, "
            f"rounding floor {error(chosen.floor)}, cures {share(chosen.cures)}"
        )
        where = ", ".join(
            word for word in (chosen.source, f"transform {chosen.transform}" * bool(chosen.transform)) if word
        )
        return Focus(
            frozenset(chosen.before),
            frozenset(chosen.after),
            chosen.outputs,
            chosen.frontier,
            chosen.module_path,
            chosen.culprit,
            chosen.introduced,
            chosen.exact,
            (figures, where, chosen.hint),
        )
    rows = [row for row in report.regions if row.before in before.order and row.after in after.order]
    if not rows:
        return Focus(frozenset(), frozenset(), ("", ""), (), "", "", None, None, ("no region was judged",))
    row = max(rows, key=lambda r: size(r.introduced))
    stops = ({r.before for r in rows}, {r.after for r in rows})
    return Focus(
        _cone(before, row.before, stops[0]),
        _cone(after, row.after, stops[1]),
        (row.before, row.after),
        (),
        row.module_path,
        "",
        row.introduced,
        row.exact,
        (f"nothing diverges; this region introduces the most: {error(row.introduced)}, floor {error(row.floor)}",),
    )


def heat(error_made: float | None) -> str:
    """Return the fill for the error that was made at one place."""
    if error_made is None:
        return PART
    return next((fill for bound, fill in SCALE if error_made < bound), GRAVE)


def scale_keys(used: set[str]) -> list[Key]:
    """Return the legend of the colours for errors that are in use."""
    bounds = [f"{bound:g}" for bound, _ in SCALE]
    spans = [f"below {bounds[0]}", *(f"{low} to {high}" for low, high in pairwise(bounds)), "1 and more"]
    fills = [*(fill for _, fill in SCALE), GRAVE]
    return [Key(f"error made here {span}", fill) for span, fill in zip(spans, fills, strict=True) if fill in used]


def _cone(wiring: Wiring, name: str, stops: set[str]) -> frozenset[str]:
    """Return `name` and what lies above it, down from the next claimed operations."""
    found, todo = set[str](), [name]
    while todo and len(found) < LIMIT:
        current = todo.pop()
        found.add(current)
        above = (i for i in wiring.inputs(current) if i not in stops and wiring.node(i).op in CALLS)
        todo.extend(i for i in above if i not in found)
    return frozenset(found)


def _side(
    name: str,
    wiring: Wiring,
    focus: Focus,
    rows: dict[str, RegionRow],
    partners: dict[str, str],
    limit: int,
    tainted: frozenset[str] = frozenset(),
) -> Side:
    which = 0 if name == "before" else 1
    known = frozenset(wiring.shown) & (focus.before, focus.after)[which]
    seeds = known or frozenset(n for n in (focus.outputs[which],) if n in wiring.order)
    opening = [pair[which] for pair in focus.frontier if pair[which] in wiring.order]
    # what the region hands on is its output; a mask or table inside it may serve every layer of the model
    closing = seeds & {focus.outputs[which]} or seeds
    for levels in (ABOVE, 1):
        context = (_above(wiring, seeds, levels) | _below(wiring, closing, BELOW) | set(opening)) - seeds
        names = sorted((seeds | context) - wiring.weights | seeds, key=wiring.order.__getitem__)
        groups = singles(wiring, names)
        if len(groups) <= limit:
            return Side(name, wiring, seeds, groups, rows, partners, tainted)
    keep = {focus.culprit, *focus.outputs, *opening}
    rest = [n for n in names if n not in keep]
    groups = singles(wiring, [n for n in names if n in keep]) + fold(wiring, rest, max(4, limit - len(keep)))
    order = wiring.order
    groups.sort(key=lambda g: order[g.members[0]])
    return Side(name, wiring, seeds, groups, rows, partners, tainted)


def _tainted(report: Report, after: Wiring) -> frozenset[str]:
    """Return every operation of after that takes a value from a finding's region."""
    found: set[str] = set()
    todo = [name for f in report.findings if not f.accepted for name in f.after if name in after.order]
    while todo:
        below = [user for user in after.users[todo.pop()] if user not in found]
        found.update(below)
        todo.extend(below)
    return frozenset(found)


def _above(wiring: Wiring, seeds: frozenset[str], levels: int) -> set[str]:
    return _reach(seeds, levels, wiring, wiring.inputs)


def _below(wiring: Wiring, seeds: frozenset[str], levels: int) -> set[str]:
    shown = set(wiring.shown)
    return _reach(seeds, levels, wiring, lambda name: tuple(u for u in wiring.users[name] if u in shown))


def _reach(seeds: Iterable[str], levels: int, wiring: Wiring, step: Callable[[str], tuple[str, ...]]) -> set[str]:
    """Return what lies within so many operations of the seeds; views count for nothing."""
    found: set[str] = set()
    edge = list(seeds)
    for _ in range(levels):
        reached: list[str] = []
        todo = [n for name in edge for n in step(name)]
        while todo:
            name = todo.pop()
            if name in found:
                continue
            found.add(name)
            if wiring.node(name).is_view:
                todo.extend(step(name))
            else:
                reached.append(name)
        edge = reached
    return found


def _box(side: Side, group: Group, focus: Focus) -> Box:
    wiring = side.wiring
    inside = not side.region.isdisjoint(group.members)
    row = next((side.rows[n] for n in reversed(group.members) if n in side.rows), None)
    closes = focus.outputs[0 if side.name == "before" else 1] in group.members
    culprit = focus.culprit in group.members and (inside or not side.region)
    fill, style = _fill(side, group, inside, made(focus.introduced, focus.exact) if closes else None, row)
    lines = [*_words(wiring, group), *_where(side, group, inside, focus)]
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
    what = "passed on" if _was_passed_on(side, row) else row.verdict
    return [Line(f"{what}: introduced {error(row.introduced)}, total {error(row.total)}", "small", "#444444")]


def _fill(side: Side, group: Group, inside: bool, here: float | None, row: RegionRow | None) -> tuple[str, str]:
    """Return fill and style: by error in the region, hatched where error was passed on, grey where the sides agree."""
    if inside:
        return (heat(here), "rounded,filled")
    if row is not None and row.verdict not in ("identical", "rounding"):
        return (heat(made(row.introduced, row.exact)), "rounded,filled")
    if _was_passed_on(side, row):
        return (stripes(HATCH), "striped")
    if group.kind in ("module", "run") or any(n in side.partners for n in group.members):
        return (AGREED, "rounded,filled")
    view = side.wiring.node(group.members[-1]).is_view or side.wiring.node(group.members[0]).op not in CALLS
    return (AGREED, "rounded,filled") if view else (ALONE, "rounded,filled,dashed")


def _was_passed_on(side: Side, row: RegionRow | None) -> bool:
    if row is None or row.after not in side.tainted:
        return False
    return size(row.total) > PASSED_ON * max(size(row.introduced), 0.0)


def _words(wiring: Wiring, group: Group) -> list[Line]:
    last = wiring.node(group.members[-1])
    if group.kind in ("module", "run"):
        return [Line(group.path or "root", "title"), Line(f"{len(group.members)} operations", "small", "#555555")]
    if group.kind == "views":
        ops = " · ".join(labels.short_op(wiring.node(n)) for n in group.members)
        return [Line(labels.clip(ops), "plain"), Line(labels.shape_line(last), "small")]
    name = group.members[0]
    weights = [Line(text, "plain", "#444444") for text in labels.weight_lines(wiring, name)]
    text = "outputs" if last.op == "output" else labels.title(wiring, name)
    named = [Line(name, "small", "#555555")] if last.op in CALLS and not last.is_view else []
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

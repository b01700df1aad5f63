"""A layer, or a whole graph, as a picture: boxes by operation or module, clusters by module, the stream marked."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

from graphprobe.records import GraphView
from graphprobe.render import labels
from graphprobe.render.boxes import Canvas, Overlay, arrange, canvas_of, operation_box
from graphprobe.render.folding import Group, fold
from graphprobe.render.layers import part_of
from graphprobe.render.merging import merge
from graphprobe.render.numbers import count
from graphprobe.render.places import layer_prefix
from graphprobe.render.roles import COLOURS, NO_VALUE, SPINE
from graphprobe.render.scene import Box, Key, Line, Link, Scene, to_dot
from graphprobe.render.wiring import CALLS, Wiring, wire

_SHARED = 6  # a source that feeds more boxes than this is drawn at each of them


def dot_layer(
    graph: GraphView,
    layer: str | int,
    *,
    limit: int = 250,
    depth: int | None = None,
    overlay: Overlay | None = None,
    notes: str = "",
) -> str:
    """Return one layer, module, pattern of modules, or the surroundings of one operation, as DOT text.

    More than `limit` operations are folded into their modules, and all that lie more than `depth` modules below the
    layer are. `notes` is DOT text of one's own to be laid over the picture, see `merge`. Raises RenderError where there
    is no such layer.
    """
    wiring = wire(graph)
    part = part_of(wiring, layer)
    names = part.names
    floor = None if depth is None else (part.module.count(".") + 1 if part.module else 0) + depth
    canvas = canvas_of(wiring, names, fold(wiring, names, limit, floor), overlay)
    canvas.boxes.extend(operation_box(canvas, group, part.asked) for group in canvas.groups)
    _inner_links(canvas)
    _inputs(canvas)
    if not part.asked:  # surroundings are cut anywhere: what leaves them is no answer
        _outputs(canvas)
    _split_shared(canvas)
    ops = sum(1 for name in names if not wiring.node(name).is_view)
    kind = wiring.kinds.get(part.module, "") if part.module else ""
    details = f"{kind + ', ' if kind else ''}{count(ops, 'operation')} and {count(len(names) - ops, 'view')}"
    heading = [Line(part.title, "title"), Line(f"{graph.name + ': ' if graph.name else ''}{details}")]
    timed = [canvas.overlay.micros[name] for name in names if name in canvas.overlay.micros]
    if timed:
        heading.append(Line(f"kernels of {count(len(timed), 'operation')} take {sum(timed):.1f} \u00b5s together"))
    return _merged(to_dot(_scene(canvas, heading, base=part.module)), canvas, notes)


def dot_graph(
    graph: GraphView, *, limit: int = 100, depth: int | None = None, overlay: Overlay | None = None, notes: str = ""
) -> str:
    """Return a whole graph as DOT text in at most about `limit` boxes, modules folded where there are more."""
    wiring = wire(graph)
    canvas = canvas_of(wiring, wiring.shown, fold(wiring, wiring.shown, limit, depth, loose=2), overlay)
    canvas.boxes.extend(operation_box(canvas, group) for group in canvas.groups)
    _inner_links(canvas)
    _split_shared(canvas)
    calls = [n for n in wiring.shown if wiring.node(n).op in CALLS]
    ops = sum(1 for name in calls if not wiring.node(name).is_view)
    heading = [
        Line(graph.name or "graph", "title"),
        Line(f"{count(ops, 'operation')} and {count(len(calls) - ops, 'view')} in {len(canvas.groups)} boxes"),
    ]
    return _merged(to_dot(_scene(canvas, heading, base="")), canvas, notes)


def part_facts(graph: GraphView, layer: str | int | None, overlay: Overlay | None = None) -> dict[str, Any]:
    """Return what a picture of a layer, or of the whole graph for None, shows: plain data for JSON and sentences.

    ``what``, ``operations``, ``views``, ``without_val`` (names) and ``kernels_us`` (None without a trace).
    """
    wiring = wire(graph)
    part = None if layer is None else part_of(wiring, layer)
    names = wiring.shown if part is None else part.names
    calls = [name for name in names if wiring.node(name).op in CALLS]
    views = sum(1 for name in calls if wiring.node(name).is_view)
    micros = overlay.micros if overlay is not None else {}
    return {
        "what": part.title if part is not None else graph.name or "graph",
        "operations": len(calls) - views,
        "views": views,
        "without_val": [name for name in names if not wiring.node(name).has_val],
        "kernels_us": sum(micros[name] for name in names if name in micros) if micros else None,
    }


def _merged(dot: str, canvas: Canvas, notes: str) -> str:
    return merge(dot, notes, {name: group.id for name, group in canvas.owner.items()}) if notes else dot


def _scene(canvas: Canvas, heading: list[Line], base: str) -> Scene:
    boxes, frames = arrange(canvas, canvas.boxes, base)
    legend = _legend(canvas)
    title = [*heading, Line(canvas.overlay.title, "small", "#444444")]
    return Scene(tuple(title), tuple(boxes), tuple(canvas.links), frames, legend, _beside(boxes, canvas.links))


def _beside(boxes: list[Box], links: list[Link]) -> tuple[tuple[str, ...], ...]:
    """Put each box without any link (a write into a buffer) beside the one before it; it would float to the top."""
    linked = {end for link in links for end in (link.tail, link.head)}
    return tuple((above.id, box.id) for above, box in pairwise(boxes) if box.id not in linked and above.id in linked)


def _inner_links(canvas: Canvas) -> None:
    drawn: dict[tuple[str, str], Link] = {}
    for group in canvas.groups:
        for name in group.members:
            for source in canvas.wiring.inputs(name):
                above = canvas.owner.get(source)
                if above is None or above.id == group.id:
                    continue
                thick = source in canvas.spine and name in canvas.spine
                link = _stream(canvas, above.id, group) if thick else Link(above.id, group.id)
                key = (above.id, group.id)
                if key not in drawn or thick:
                    drawn[key] = link
    canvas.links.extend(drawn.values())


def _stream(canvas: Canvas, tail: str, head: Group) -> Link:
    """Draw a piece of the residual stream: thick, and past the branch that it goes around."""
    around = len(head.members) == 1 and len(canvas.wiring.inputs(head.members[0])) > 1
    return Link(tail, head.id, SPINE, 3.0, weight=8, side="e" if around else "")


def _inputs(canvas: Canvas) -> None:
    """Mark what comes from outside, each source once."""
    marked: dict[str, Box] = {}
    for group in canvas.groups:
        for name in group.members:
            for source in canvas.wiring.inputs(name):
                if source in canvas.owner:
                    continue
                thick = source in canvas.spine and name in canvas.spine
                if source not in marked:
                    marked[source] = _marker(canvas, source, thick=source in canvas.spine)
                id = marked[source].id
                link = _stream(canvas, id, group) if thick else Link(id, group.id)
                if all((link.tail, link.head) != (other.tail, other.head) for other in canvas.links):
                    canvas.links.append(link)
    canvas.boxes.extend(marked.values())


def _marker(canvas: Canvas, source: str, thick: bool) -> Box:
    wiring = canvas.wiring
    node = wiring.node(source)
    place = layer_prefix(wiring.place[source]) or wiring.place[source]
    text = "residual stream" if thick else labels.source_name(wiring, source)
    lines = [Line(f"in: {text}", "title"), Line(f"from {place}" if thick and place else "", "small")]
    colour = COLOURS["input"]
    if not node.has_val:
        canvas.red, colour = True, NO_VALUE
        lines.append(Line('no meta["val"]', "small"))
    return Box(
        f"in {source}",
        (*lines, Line(labels.shape_line(node))),
        colour.fill,
        colour.line,
        style="filled",
        tooltip=f"{source}\n{node.target}\n{wiring.place[source]}",
    )


def _outputs(canvas: Canvas) -> None:
    """Mark what is used outside, and where."""
    for group in canvas.groups:
        for name in group.members:
            outside = [u for u in canvas.wiring.users[name] if u not in canvas.owner and u in canvas.wiring.shown]
            if not outside:
                continue
            places = dict.fromkeys(_destination(canvas.wiring, user) for user in outside)
            stream = name in canvas.spine
            colour = COLOURS["output"]
            more = f" and {len(places) - 2} more" if len(places) > 2 else ""
            id = f"out {name}"
            lines = (
                Line("out: residual stream" if stream else f"out: {labels.title(canvas.wiring, name)}", "title"),
                Line(f"to {', '.join(list(places)[:2])}{more}", "small"),
            )
            canvas.boxes.append(Box(id, lines, colour.fill, colour.line, style="filled"))
            canvas.links.append(Link(group.id, id, SPINE, 3.0, weight=8) if stream else Link(group.id, id))


def _destination(wiring: Wiring, name: str) -> str:
    if wiring.node(name).op == "output":
        return "the outputs"
    place = wiring.place[name]
    return layer_prefix(place) or place or name


def _split_shared(canvas: Canvas) -> None:
    """Draw sources that feed very many boxes elsewhere (cos, sin, a mask) at each of them.

    Long edges, not many nodes, are what makes a layout slow.
    """
    groups = {group.id: group for group in canvas.groups}
    places = {box.id: index for index, box in enumerate(canvas.boxes)}
    shared: dict[str, list[Link]] = {}
    for link in canvas.links:
        if link.head in groups and _leaves(groups.get(link.tail), groups[link.head]):
            shared.setdefault(link.tail, []).append(link)
    words: dict[str, list[str]] = {}
    split: set[Link] = set()
    for tail, links in shared.items():
        if len(links) <= _SHARED:
            continue
        split.update(links)
        for link in links:
            words.setdefault(link.head, []).extend(_carried(canvas, tail, groups[link.head]))
        box = canvas.boxes[places[tail]]
        note = Line(f"goes to {len(links)} boxes, drawn at each", "small", "#555555")
        canvas.boxes[places[tail]] = dataclasses.replace(box, lines=(*box.lines, note))
    canvas.links = [link for link in canvas.links if link not in split]
    colour = COLOURS["input"]
    for head, names in words.items():
        text = Line(labels.clip(", ".join(dict.fromkeys(names)), 60), "small")
        cluster = canvas.boxes[places[head]].cluster
        canvas.boxes.append(Box(f"{head} takes", (text,), colour.fill, colour.line, cluster=cluster))
        canvas.links.append(Link(f"{head} takes", head))


def _leaves(tail: Group | None, head: Group) -> bool:
    """Whether a link leaves the layer of its tail; what comes from outside the picture does."""
    return tail is None or layer_prefix(tail.path) != layer_prefix(head.path)


def _carried(canvas: Canvas, tail: str, head: Group) -> list[str]:
    """Name the values that go from one box, or from a marked input, to another box."""
    wiring = canvas.wiring
    sources = dict.fromkeys(s for n in head.members for s in wiring.inputs(n))
    carried = [s for s in sources if (canvas.owner[s].id if s in canvas.owner else f"in {s}") == tail]
    return [labels.clip(labels.source_name(wiring, s), 24) for s in carried[:3]]


def _legend(canvas: Canvas) -> tuple[Key, ...]:
    used = {canvas.roles[g.id] for g in canvas.groups}
    keys = [Key(r, c.fill, c.line) for r, c in COLOURS.items() if r in used and r not in ("view", "other", "output")]
    if canvas.red:
        keys.append(Key('no meta["val"]', NO_VALUE.fill, NO_VALUE.line))
    return (*keys, *canvas.overlay.legend)

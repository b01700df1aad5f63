"""A picture before it is DOT: boxes, links and clusters with their looks; nothing here knows of models."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphprobe.errors import RenderError

FONT = "Helvetica"  # one name: engines measure text with the metrics of that very font
_TOOLTIP = 2000  # characters; older engines read no string of 16 KiB and more
_WIDEST = 72  # characters of any line in a picture; names may be of any length
_HEADING, _ROWS = 110, 3  # characters of a row of the heading, and rows of one line of it
_KEYS = 6  # entries in a row of the legend
_SIZES = {"title": 12, "plain": 10, "small": 9}


@dataclass(frozen=True)
class Line:
    """One line of text in a box; `look` is title, plain or small."""

    text: str
    look: str = "plain"
    colour: str = ""


@dataclass(frozen=True)
class Box:
    """One node of the picture; `cluster` is the path of cluster ids from the outside inwards."""

    id: str
    lines: tuple[Line, ...]
    fill: str = "#ffffff"
    border: str = "#666666"
    width: float = 1.0
    shape: str = "box"
    style: str = "rounded,filled"
    tooltip: str = ""
    cluster: tuple[str, ...] = ()
    column: str = ""  # boxes of one column are drawn below one another


@dataclass(frozen=True)
class Link:
    """One arrow; a link without `ranked` does not push its head below its tail."""

    tail: str
    head: str
    colour: str = "#888888"
    width: float = 1.0
    style: str = "solid"
    weight: int = 1
    ranked: bool = True
    arrow: bool = True
    tooltip: str = ""
    side: str = ""  # the side at which it reaches its head: n, e, s or w


@dataclass(frozen=True)
class Frame:
    """The look of a cluster."""

    title: tuple[Line, ...]
    fill: str = "#fafafa"
    border: str = "#bbbbbb"
    width: float = 1.0
    style: str = "rounded,filled"


@dataclass(frozen=True)
class Key:
    """One entry of the legend."""

    text: str
    fill: str
    border: str = "#888888"
    hatched: bool = False


@dataclass(frozen=True)
class Scene:
    """A whole picture; `level` holds sets of boxes that are drawn at one height."""

    title: tuple[Line, ...]
    boxes: tuple[Box, ...]
    links: tuple[Link, ...]
    frames: dict[tuple[str, ...], Frame]
    legend: tuple[Key, ...] = ()
    level: tuple[tuple[str, ...], ...] = ()


def to_dot(scene: Scene) -> str:
    """Return the scene as DOT text. Raises RenderError where the `graphviz` package is missing."""
    try:
        import graphviz
    except ImportError as error:
        raise RenderError(
            "writing DOT needs the Python package graphviz: pip install 'graphprobe[pictures]'"
        ) from error
    dot = graphviz.Digraph("graphprobe")
    dot.attr(
        "graph",
        rankdir="TB",
        newrank="true",
        compound="true",
        fontname=FONT,
        nodesep="0.22",
        ranksep="0.32",
        labelloc="t",
        labeljust="l",
        bgcolor="white",
        label=_heading(scene),
        tooltip=" ",
    )
    dot.attr("node", fontname=FONT, fontsize="10", margin="0.10,0.045", height="0.25", width="0.4")
    dot.attr("edge", fontname=FONT, fontsize="9", arrowsize="0.6")
    _fill(dot, scene, (), _by_cluster(scene.boxes))
    for link in scene.links:
        _link(dot, link)
    for ids in scene.level:
        with dot.subgraph() as same:
            same.attr(rank="same")
            for id in ids:
                same.node(plain(id))
    return str(dot.source)


def stripes(fill: str) -> str:
    """Return the fill of a hatched box; its style must be 'striped', the one hatching that all engines know."""
    return ":".join([fill, "#ffffff"] * 5 + [fill])


def _by_cluster(boxes: Iterable[Box]) -> dict[tuple[str, ...], list[Box]]:
    found: dict[tuple[str, ...], list[Box]] = {}
    for box in boxes:
        found.setdefault(box.cluster, []).append(box)
    return found


def _fill(dot: Any, scene: Scene, path: tuple[str, ...], boxes: dict[tuple[str, ...], list[Box]]) -> None:
    for box in boxes.get(path, ()):
        _box(dot, box)
    below = dict.fromkeys(p[: len(path) + 1] for p in boxes if len(p) > len(path) and p[: len(path)] == path)
    for inner in below:
        frame = scene.frames.get(inner, Frame(()))
        with dot.subgraph(name="cluster_" + plain("/".join(inner))) as cluster:
            cluster.attr(
                label=_label(frame.title) if frame.title else "",
                style=frame.style,
                fillcolor=frame.fill,
                color=frame.border,
                penwidth=f"{frame.width:g}",
                fontname=FONT,
                labeljust="l",
                tooltip=" ",
            )
            _fill(cluster, scene, inner, boxes)


_THICK = 2.0


def _box(dot: Any, box: Box) -> None:
    extra = {"group": box.column} if box.column else {}
    if box.width > _THICK:  # a thick border takes the room of the first line
        extra["margin"] = "0.12,0.09"
    dot.node(
        plain(box.id),
        label=_label(box.lines),
        shape=box.shape,
        style=box.style,
        fillcolor=box.fill,
        color=box.border,
        penwidth=f"{box.width:g}",
        tooltip=plain(box.tooltip)[:_TOOLTIP] or " ",
        **extra,
    )


def _link(dot: Any, link: Link) -> None:
    attributes = {"color": link.colour}
    if link.width != 1.0:
        attributes["penwidth"] = f"{link.width:g}"
    if link.style != "solid":
        attributes["style"] = link.style
    if link.weight != 1:
        attributes["weight"] = str(link.weight)
    if not link.ranked:
        attributes["constraint"] = "false"
    if not link.arrow:
        attributes["dir"] = "none"
    if link.tooltip:
        attributes["tooltip"] = plain(link.tooltip)
    if link.side:
        attributes["headport"] = link.side
    dot.edge(plain(link.tail), plain(link.head), **attributes)


def _label(lines: Sequence[Line]) -> str:
    """Return an HTML-like label; DOT gives no other way to set a title apart from its details."""
    return "<" + '<BR ALIGN="CENTER"/>'.join(_font(line) for line in lines if line.text) + ">" if lines else ""


def _font(line: Line, width: int = _WIDEST) -> str:
    text = html.escape(_shortened(plain(line.text), width), quote=False)
    if line.look == "title":
        text = f"<B>{text}</B>"
    colour = f' COLOR="{line.colour}"' if line.colour else ""
    return f'<FONT POINT-SIZE="{_SIZES[line.look]}"{colour}>{text}</FONT>'


def _shortened(text: str, width: int = _WIDEST) -> str:
    """Shorten a line in its middle: both its beginning and its end tell something."""
    return text if len(text) <= width else f"{text[: width // 2 - 1]}\u2026{text[-(width // 2) :]}"


def _broken(line: Line) -> list[Line]:
    """Break a line of the heading where it is long; what is longer than _ROWS rows is shortened in its middle."""
    text = _shortened(plain(line.text), _HEADING * _ROWS - _HEADING // 2)
    return [replace(line, text=part) for part in textwrap.wrap(text, _HEADING)[:_ROWS]]


def _heading(scene: Scene) -> str:
    lines = [part for line in scene.title if line.text for part in _broken(line)]
    rows = [f'<TR><TD ALIGN="LEFT">{_font(line, _HEADING)}</TD></TR>' for line in lines]
    if scene.legend:
        inner = "".join(_legend_row(scene.legend[i : i + _KEYS]) for i in range(0, len(scene.legend), _KEYS))
        rows.append(f'<TR><TD ALIGN="LEFT"><TABLE BORDER="0" CELLBORDER="0" CELLSPACING="3">{inner}</TABLE></TD></TR>')
    return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="2">{"".join(rows)}</TABLE>>' if rows else ""


def _legend_row(keys: Sequence[Key]) -> str:
    cells = []
    for key in keys:
        mark = '<FONT POINT-SIZE="7">///</FONT>' if key.hatched else ""
        text = html.escape(plain(key.text), quote=False)
        look = f'BGCOLOR="{key.fill}" COLOR="{key.border}" BORDER="1" FIXEDSIZE="TRUE" WIDTH="28" HEIGHT="15"'
        cells.append(f"<TD {look}>{mark}</TD>")
        cells.append(f'<TD ALIGN="LEFT"><FONT POINT-SIZE="9">{text}   </FONT></TD>')
    return f"<TR>{''.join(cells)}</TR>"


def plain(text: str) -> str:
    """Return the text without control characters and backslashes, which DOT would read as its own."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", " ", text).replace("\\", "/")

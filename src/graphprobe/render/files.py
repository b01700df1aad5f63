"""Pictures as files: the suffix says what is written, and a picture too slow to lay out is drawn more coarsely."""

from __future__ import annotations

import os

from graphprobe.records import GraphView, Report
from graphprobe.render.boxes import Overlay
from graphprobe.render.context import LIMIT
from graphprobe.render.divergence import dot_divergence
from graphprobe.render.engine import write_picture
from graphprobe.render.layer_picture import dot_graph, dot_layer


def write_divergence(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the first diverging subgraph as ``.png``, ``.svg`` or ``.dot``. Raises RenderError."""
    simpler = [lambda: dot_divergence(report, limit=LIMIT // 3)]
    write_picture(path, dot_divergence(report), coarser=simpler)


def write_layer(
    graph: GraphView,
    layer: str | int,
    path: str | os.PathLike[str],
    *,
    depth: int | None = None,
    overlay: Overlay | None = None,
    notes: str = "",
) -> None:
    """Write a layer (its number, a module path, a pattern, or an operation and what is around it).

    The suffix says as what: ``.png``, ``.svg`` or ``.dot``. Modules more than `depth` below the layer are folded;
    `notes` is DOT of one's own to lay over it. Raises RenderError, also where there is no such layer.
    """
    simpler = [lambda d=d: dot_layer(graph, layer, limit=60, depth=d, overlay=overlay, notes=notes) for d in (2, 1)]
    write_picture(path, dot_layer(graph, layer, depth=depth, overlay=overlay, notes=notes), coarser=simpler)


def write_graph(
    graph: GraphView,
    path: str | os.PathLike[str],
    *,
    depth: int | None = None,
    overlay: Overlay | None = None,
    notes: str = "",
) -> None:
    """Write a whole graph, its modules folded where it is large, as ``.png``, ``.svg`` or ``.dot``."""
    simpler = [lambda n=n: dot_graph(graph, limit=n, overlay=overlay, notes=notes) for n in (60, 20)]
    write_picture(path, dot_graph(graph, depth=depth, overlay=overlay, notes=notes), coarser=simpler)

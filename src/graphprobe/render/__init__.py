"""Reports and graphs as text, DOT, PNG, SVG and HTML. Needs no torch and no GPU: a saved report is enough."""

from __future__ import annotations

from graphprobe.render.boxes import Overlay
from graphprobe.render.engine import draw
from graphprobe.render.layer_picture import dot_graph, dot_layer
from graphprobe.render.layers import layers_of

__all__ = ["Overlay", "dot_graph", "dot_layer", "draw", "layers_of"]

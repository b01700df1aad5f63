"""Reports and graphs as text, DOT, PNG, SVG and HTML. Needs no torch and no GPU: a saved report is enough."""

from __future__ import annotations

from graphprobe.render.boxes import Overlay
from graphprobe.render.divergence import dot_divergence
from graphprobe.render.engine import draw
from graphprobe.render.files import write_divergence, write_graph, write_layer
from graphprobe.render.headline import headline
from graphprobe.render.layer_picture import dot_graph, dot_layer, part_facts
from graphprobe.render.layers import layers_of
from graphprobe.render.overlays import combine, overlay_report, overlay_taps
from graphprobe.render.page import page, run_comparison, write_html, write_run_html
from graphprobe.render.plots import plot_states
from graphprobe.render.states import compare_states, states_text
from graphprobe.render.trace import overlay_trace
from graphprobe.render.wording import (
    coverage_text,
    exact_text,
    findings_table,
    lint_text,
    regions_table,
    taps_text,
    text,
)

__all__ = [
    "Overlay",
    "combine",
    "compare_states",
    "coverage_text",
    "dot_divergence",
    "dot_graph",
    "dot_layer",
    "draw",
    "exact_text",
    "findings_table",
    "headline",
    "layers_of",
    "lint_text",
    "overlay_report",
    "overlay_taps",
    "overlay_trace",
    "page",
    "part_facts",
    "plot_states",
    "regions_table",
    "run_comparison",
    "states_text",
    "taps_text",
    "text",
    "write_divergence",
    "write_graph",
    "write_html",
    "write_layer",
    "write_run_html",
]

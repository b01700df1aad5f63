"""``graphprobe show``: a picture of one layer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from graphprobe.cli import output
from graphprobe.errors import InputError
from graphprobe.records import Report

if TYPE_CHECKING:
    from graphprobe.render import Overlay

SUMMARY = "draw one layer of a graph as a picture"
DESCRIPTION = """\
Draw the operations of one layer, grouped by module, with their shapes and weights; without --layer the whole graph,
its modules folded where it is large. The suffix of the file says what it becomes: .png, .svg, or .dot for your own
tools. With --report, operations are coloured by the error that `graphprobe diff -o report.json` found in them.
"""
EXAMPLES = """\
  graphprobe show before.fx --layer 3 -o layer3.png
  graphprobe show before.fx --layer model.layers.3.mlp -o mlp.svg
  graphprobe show after.fx --layer 3 --report report.json -o errors.png
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("file", metavar="FILE.fx", help="the graph")
    parser.add_argument("--layer", metavar="N", help="a layer by its number, or a module by its path")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the picture: .png, .svg or .dot (layerN.png, graph.png)"
    )
    parser.add_argument("--depth", type=int, metavar="N", help="fold modules more than N below the layer")
    parser.add_argument("--report", metavar="FILE.json", help="colour by the errors of this report of graphprobe diff")
    parser.add_argument(
        "--side", choices=("before", "after"), default="after", help="which graph of the report this one is (after)"
    )


def run(options: argparse.Namespace) -> int:
    """Load the graph and draw. Raises FxFileError, InputError, RenderError."""
    import graphprobe
    from graphprobe import render

    layer = options.layer
    target = options.output or (f"layer{layer}.png" if layer is not None else "graph.png")
    output.check_target(target, ".png", ".svg", ".dot")
    overlay = _overlay(options.report, options.side) if options.report else None
    graph = graphprobe.view(graphprobe.load(options.file, weights=False))
    if layer is None:
        render.write_graph(graph, target, overlay=overlay)
    else:
        number = int(layer) if layer.isdecimal() else layer
        render.write_layer(graph, number, target, depth=options.depth, overlay=overlay)
    if options.json:
        output.print_json({"file": target, "layer": layer, "bytes": Path(target).stat().st_size})
    else:
        print(target)
    return 0


def _overlay(path: str, side: str) -> Overlay:
    from graphprobe import render

    try:
        report = Report.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} is no report of graphprobe diff -o: {getattr(error, 'strerror', None) or error}"
        ) from error
    return render.overlay_report(report, side)

"""``graphprobe show``: a picture of one layer."""

from __future__ import annotations

import argparse
from pathlib import Path

from graphprobe.cli import output

SUMMARY = "draw one layer of a graph as a picture"
DESCRIPTION = """\
Draw the operations of one layer, grouped by module, with their shapes and weights. The suffix of the file that is
written says what it becomes: .png, .svg, or .dot for your own tools.
"""
EXAMPLES = """\
  graphprobe show before.fx --layer 3 -o layer3.png
  graphprobe show before.fx --layer 3 -o layer3.dot
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("file", metavar="FILE.fx", help="the graph")
    parser.add_argument("--layer", type=int, required=True, metavar="N", help="which layer, counted from 0")
    parser.add_argument("-o", "--output", metavar="FILE", help="the picture: .png, .svg or .dot (layerN.png)")


def run(options: argparse.Namespace) -> int:
    """Load the graph and draw. Raises FxFileError, RenderError."""
    import graphprobe
    from graphprobe import render

    target = options.output or f"layer{options.layer}.png"
    graph = graphprobe.view(graphprobe.load(options.file))
    with output.whole_file(target) as partial:
        render.write_layer(graph, options.layer, partial)
    if options.json:
        output.print_json({"file": target, "layer": options.layer, "bytes": Path(target).stat().st_size})
    else:
        print(target)
    return 0

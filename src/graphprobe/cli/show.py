"""``graphprobe show``: a picture of one layer, of a whole graph, or of what a report found."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprobe.cli import output
from graphprobe.errors import InputError
from graphprobe.records import GraphView, Report, Tap, from_data

if TYPE_CHECKING:
    from graphprobe.cli.graphs import Drawable
    from graphprobe.render import Overlay

SUMMARY = "draw one layer of a graph, or what a report found, as a picture"
DESCRIPTION = """\
Draw the operations of one layer, grouped by module, with their shapes and weights; without --layer the whole graph,
its modules folded where it is large. The suffix of -o says what it becomes: .png, .svg, or .dot for your own tools.

WHAT is one of
  FILE.fx           a captured graph
  pkg.mod:factory   a model, captured first; also a directory of a transformers model
  FILE.txt          a graph dump of AutoDeploy or of graphprobe run; of a directory of dumps, the last one
  report.json       what `graphprobe diff -o` or `run --json` wrote: needs no torch. Without --layer it draws the
                    divergence, with -o FILE.html it writes the whole report

--diff colours by error, --taps writes each value's range, --trace writes the GPU kernels of each operation.
"""
EXAMPLES = """\
  graphprobe show before.fx --layer 3 -o layer3.png
  graphprobe show before.fx --layer 'model.layers.*.mlp' -o mlps.svg
  graphprobe show after.fx --layer 3 --diff report.json --taps -o errors.png
  graphprobe show after.fx --layer scale_1
  graphprobe show ad_dumps --layer 0 --trace profile.sqlite
  graphprobe show report.json -o report.html
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("what", metavar="WHAT", help="a graph: see above")
    parser.add_argument(
        "--layer",
        metavar="N",
        help="a layer's number, a module's path (may hold *), or an operation to be drawn around",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the picture: .png, .svg or .dot (layerN.png, graph.png, culprit.png)"
    )
    parser.add_argument("--depth", type=int, metavar="N", help="fold modules more than N below the layer")
    parser.add_argument("--section", metavar="NAME", help="which graph of a dump that holds several (the largest)")
    over = parser.add_argument_group("what is laid over the picture")
    over.add_argument(
        "--diff", "--report", dest="report", metavar="FILE.json", help="errors, from a report of graphprobe diff -o"
    )
    over.add_argument(
        "--side", choices=("before", "after"), default="after", help="which graph of the report this one is (after)"
    )
    over.add_argument(
        "--taps", nargs="?", const="", metavar="FILE.json", help="statistics, from graphprobe tap -o; without FILE: run"
    )
    over.add_argument(
        "--trace",
        nargs="?",
        const="",
        metavar="FILE",
        help="GPU kernels, from a torch profiler .json or an Nsight Systems .sqlite; without FILE: run on the GPU",
    )
    over.add_argument("--merge", metavar="FILE.dot", help="your own DOT: nodes called like operations mark their boxes")
    over.add_argument("--inputs", metavar="FILE", help="inputs of a run: .json, .safetensors, .npz, .pt or another .fx")


def run(options: argparse.Namespace) -> int:
    """Read the graph and draw. Raises FxFileError, DumpError, InputError, RenderError."""
    from graphprobe import render
    from graphprobe.cli import graphs

    found = graphs.drawable(options.what, side=options.side, section=options.section)
    target = options.output or _default(options.layer, found.report)
    output.check_target(target, ".png", ".svg", ".dot", ".html")
    if found.report is not None and (Path(target).suffix == ".html" or options.layer is None):
        return _whole_report(found, found.report, target, options)
    notes = _read(options.merge) if options.merge else ""
    overlay = render.combine(_overlays(found, options))
    if options.layer is None:
        render.write_graph(found.view, target, depth=options.depth, overlay=overlay, notes=notes)
    else:
        render.write_layer(found.view, options.layer, target, depth=options.depth, overlay=overlay, notes=notes)
    facts = render.part_facts(found.view, options.layer, overlay)
    if options.json:
        output.print_json({"file": target, "layer": options.layer, "bytes": Path(target).stat().st_size, **facts})
    else:
        print(_sentence(target, facts))
    return 0


def _default(layer: str | None, report: Report | None) -> str:
    if layer is None:
        return "culprit.png" if report is not None else "graph.png"
    return f"layer{re.sub(r'[^A-Za-z0-9.-]+', '_', layer)}.png"


def _whole_report(found: Drawable, report: Report, target: str, options: argparse.Namespace) -> int:
    from graphprobe.render import headline, write_html

    if Path(target).suffix == ".html":
        write_html(report, target, run=found.run)
    else:
        report.render(target)
    if options.json:
        output.print_json({"file": target, "layer": None, "bytes": Path(target).stat().st_size})
    else:
        print(f"{target}: {headline(report)}")
    return 0


def _overlays(found: Drawable, options: argparse.Namespace) -> list[Overlay]:
    from graphprobe import render
    from graphprobe.cli import graphs

    report = graphs.read_report(options.report) if options.report else found.report
    overlays = []
    if report is not None:
        overlays.append(_fitting(render.overlay_report(report, options.side), found.view, "the report speaks"))
    if options.taps is not None:
        overlays.append(_fitting(render.overlay_taps(_taps(found, options)), found.view, "the taps speak"))
    if options.trace is not None:
        overlays.append(_trace(found, options))
    return overlays


def _fitting(overlay: Overlay, view: GraphView, what: str) -> Overlay:
    """Raise InputError where an overlay speaks of no operation of the graph: it is another graph's."""
    if overlay.lines and not any(name in view.by_name for name in overlay.lines):
        example = next(iter(overlay.lines))
        raise InputError(f"{what} of another graph: there is no {example} in this one")
    return overlay


def _taps(found: Drawable, options: argparse.Namespace) -> tuple[Tap, ...]:
    if options.taps:
        try:
            rows = json.loads(Path(options.taps).read_text(encoding="utf-8"))
            return tuple(from_data(Tap, row) for row in rows)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{options.taps} is no table of graphprobe tap -o: {error}") from error
    import torch

    import graphprobe

    gm, args, kwargs = found.runnable(options.inputs)
    probe = graphprobe.instrument(gm)
    with torch.no_grad():
        probe(*args, **kwargs)
    return probe.taps


def _trace(found: Drawable, options: argparse.Namespace) -> Overlay:
    from graphprobe import render

    if options.trace:
        return render.overlay_trace(options.trace, found.view)
    from graphprobe.cli import inputs
    from graphprobe.tracing import record_trace

    gm, args, kwargs = found.runnable(options.inputs)
    gm, args, kwargs = inputs.on_device(gm, args, kwargs, "cuda")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "this run")
        record_trace(gm, args, kwargs, path)
        return render.overlay_trace(path, found.view)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _sentence(target: str, facts: dict[str, Any]) -> str:
    missing = facts["without_val"]
    words = f"{target}: {facts['what']}, {facts['operations']:,} operations and {facts['views']:,} views"
    if facts["kernels_us"] is not None:
        words += f", kernels {facts['kernels_us']:.1f} \u00b5s"
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        words += f'; in red, without meta["val"]: {", ".join(missing[:3])}{more}'
    return words

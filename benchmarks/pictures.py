"""What pictures and reports cost on one core: seconds and sizes, against what is promised.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/pictures.py [--report report.json] [--json]

--report takes a report of a real comparison (`graphprobe demo` writes one of SmolLM2); without it a Llama-like graph of
30 layers stands in. The graphs of 10,000 operations are made by hand: one in layers, one without any module. Needs no
torch. Status 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

from graphprobe import render
from graphprobe.records import Report
from graphprobe.render.engine import find_engine
from render_samples import llama, wrong_scale

MEGABYTES = 5.0  # an HTML report of 2,000 operations


@dataclass(frozen=True)
class Row:
    """One measurement and the most that it may be; `megabytes` is the size of what was written."""

    what: str
    seconds: float
    limit: float
    megabytes: float
    largest: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the promise was kept."""
        return self.seconds < self.limit and (self.largest is None or self.megabytes < self.largest)


def measured(what: str, limit: float, path: pathlib.Path, write: Callable[[], None], most: float | None = None) -> Row:
    """Write once and say how long it took; the first time counts, for people draw once."""
    start = time.perf_counter()
    write()
    return Row(what, time.perf_counter() - start, limit, path.stat().st_size / 1e6, most)


def rows(report: Report, folder: pathlib.Path) -> list[Row]:
    """Measure everything."""
    png, html = folder / "picture.png", folder / "report.html"
    layers = render.layers_of(report.before)
    layer = layers[min(17, len(layers) - 1)]
    nodes = len(report.before.nodes)
    found = [
        measured(f"layer {layer} of {nodes} nodes", 2, png, lambda: render.write_layer(report.before, layer, png)),
        measured(f"all {nodes} nodes", 20, png, lambda: render.write_graph(report.before, png)),
        measured("the divergence", 2, png, lambda: render.write_divergence(report, png)),
        measured("HTML report", 5, html, lambda: render.write_html(report, html), MEGABYTES),
    ]
    middle = wrong_scale(layers=50, layer=17)
    large = wrong_scale(layers=250, layer=125)
    flat = llama(250, modules=False)
    found += [
        measured(
            f"HTML report of {len(middle.after.nodes):,} nodes",
            5,
            html,
            lambda: render.write_html(middle, html),
            MEGABYTES,
        ),
        measured(f"HTML report of {len(large.after.nodes):,} nodes", 20, html, lambda: render.write_html(large, html)),
        measured("a layer of these", 20, png, lambda: render.write_layer(large.after, 125, png)),
        measured("all of these", 20, png, lambda: render.write_graph(large.after, png)),
        measured("all of these without modules", 20, png, lambda: render.write_graph(flat, png)),
        measured("their divergence", 20, png, lambda: render.write_divergence(large, png)),
    ]
    return found


def _html(report: Report) -> str:
    return f"HTML report of {len(report.after.nodes):,} nodes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", metavar="FILE.json")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    source = "hand-made, 30 layers"
    report = wrong_scale(layers=30, layer=9)
    start = time.perf_counter()
    if options.report:
        source, report = options.report, Report.from_json(pathlib.Path(options.report).read_text(encoding="utf-8"))
    loaded = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        found = rows(report, pathlib.Path(folder))
    if options.json:
        print(json.dumps([{**vars(row), "ok": row.ok} for row in found], indent=2))
    else:
        print(f"{source}, read in {loaded:.2f} s; engine {find_engine()}")
        for row in found:
            size = f"{row.megabytes:.2f} MB" + (f" (below {row.largest:g})" if row.largest else "")
            print(f"{'ok  ' if row.ok else 'FAIL'} {row.what:44} {row.seconds:6.2f} s (below {row.limit:g})  {size}")
    return 0 if all(row.ok for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())

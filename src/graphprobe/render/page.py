"""A report as one HTML file: no network, no other files, readable from disk years later."""

from __future__ import annotations

import importlib.resources
import os
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

from graphprobe.errors import RenderError
from graphprobe.records import VERDICTS, Finding, GraphView, Report, RunReport, to_data
from graphprobe.render import labels
from graphprobe.render.code import region_code
from graphprobe.render.divergence import dot_divergence
from graphprobe.render.engine import draw, find_engine, write
from graphprobe.render.headline import headline, places
from graphprobe.render.heat import heat
from graphprobe.render.numbers import count, error, made, share
from graphprobe.render.places import layer_prefix
from graphprobe.render.roles import COLOURS, NO_VALUE, role_of, rotary_nodes
from graphprobe.render.runs import matches
from graphprobe.render.wiring import Wiring, wire
from graphprobe.render.wording import coverage_text, worst

_SCRIPTS = ("common.js", "curve.js", "regions.js", "layout.js", "explorer.js")
_PICTURES = 4  # findings that get a picture
_SECONDS = 8.0  # for one picture
#: What an SVG from a layout engine may hold; anything else is left out.
_SVG = {"svg", "g", "title", "polygon", "polyline", "path", "ellipse", "text", "tspan", "a"}
_SVG_ATTRIBUTES = re.compile(
    r"^(id|class|transform|points|d|[xy]|[cr][xy]|r|fill|stroke|viewBox|width|height)$|^(text|font|stroke|fill)-"
)
#: verdict -> the sign that stands beside its word, so that nothing hangs on colour.
SIGNS = {
    "identical": "=",
    "rounding": "\u2248",
    "unknown": "?",
    "quantization": "\u25a4",
    "precision": "\u25bd",
    "semantic": "\u2715",
    "nonfinite": "\u221e",
    "structural": "!",
}


def page(report: Report, *, run: RunReport | None = None) -> str:
    """Return the report as one HTML page. Raises RenderError where jinja2 is missing.

    With `run` every transform of that pipeline is listed with what came of it and its own verdict. The pictures are
    left out, and a sentence says why, where no layout engine is installed.
    """
    try:
        import jinja2
        from jinja2.utils import htmlsafe_json_dumps
        from markupsafe import Markup
    except ImportError as problem:
        raise RenderError("the HTML report needs jinja2: pip install jinja2") from problem
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graphprobe.render", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"error": error, "share": share, "dims": labels.dims, "dtype": labels.dtype}
    template = environment.get_template("report.html")
    return template.render(
        report=report,
        headline=headline(report),
        sign=SIGNS.get(report.verdict, ""),
        signs=SIGNS,
        findings=[_shown(report, finding, n) for n, finding in enumerate(_order(report))],
        whole=None if report.findings or not report.regions else _picture(report, None),
        transforms=_steps(run) if run is not None else _transforms(report),
        pipeline=run.pipeline if run is not None else "",
        coverage=coverage_text(report.coverage, report.min_coverage).splitlines(),
        data=htmlsafe_json_dumps(page_data(report)),
        style=Markup(_part("report.css")),
        scripts=[Markup(_part(name)) for name in _SCRIPTS],
        engine=find_engine() is not None,
    )


def write_html(report: Report, path: str | os.PathLike[str], *, run: RunReport | None = None) -> None:
    """Write the report as one self-contained HTML file, whole or not at all. Raises RenderError."""
    write(path, page(report, run=run).encode())


def write_run_html(run: RunReport, path: str | os.PathLike[str]) -> None:
    """Write a run as one page: its transforms with their verdicts, and its gravest comparison. Raises RenderError."""
    write_html(run_comparison(run), path, run=run)


def run_comparison(run: RunReport) -> Report:
    """Return the comparison of a run that a page is about: of the first transform that failed one, else the total.

    Raises RenderError where the run compared nothing.
    """
    steps = [step.report for step in run.steps if step.report is not None]
    failed = [report for report in steps if not report.ok]
    found = next((report for report in (*failed, run.report, *reversed(steps)) if report is not None), None)
    if found is None:
        raise RenderError("this run compared nothing, so there is no page to write: run it with --check diff")
    return found


def page_data(report: Report) -> dict[str, Any]:
    """Return what the page's curve, table and explorer show, as plain JSON data."""
    before, after = wire(report.before), wire(report.after)
    order = after.order
    rows = sorted(report.regions, key=lambda row: order.get(row.after, len(order)))
    return {
        "verdicts": list(VERDICTS),
        "signs": SIGNS,
        "regions": [
            to_data(
                [
                    row.verdict,
                    row.before,
                    row.after,
                    row.op,
                    row.module_path,
                    layer_prefix(row.module_path),
                    row.introduced,
                    row.total,
                    row.exact,
                    row.floor,
                    row.evidence,
                    row.size_before,
                    row.size_after,
                    heat(made(row.introduced, row.exact)),
                    "; ".join(word for word in (row.rule, row.note) if word),
                ]
            )
            for row in rows
        ],
        "roles": {role: [colour.fill, colour.line] for role, colour in COLOURS.items()},
        "missing": NO_VALUE.fill,
        "culprits": [f.culprit for f in _order(report) if f.culprit],
        "closed": {f.culprit: list(f.outputs) for f in reversed(_order(report)) if f.culprit},
        "sides": {"before": _graph(before), "after": _graph(after)},
        "claims": [[claim.before, claim.after] for claim in report.claims],
    }


def _graph(wiring: Wiring) -> dict[str, Any]:
    graph: GraphView = wiring.graph
    names = list(wiring.shown)
    index = {name: number for number, name in enumerate(names)}
    rotary = rotary_nodes(wiring, names)
    nodes = []
    for name in names:
        node = wiring.node(name)
        weights = "  ".join(labels.weight_lines(wiring, name))
        nodes.append(
            [
                name,
                labels.title(wiring, name),
                labels.shape_line(node),
                weights,
                wiring.place[name],
                "rotary" if name in rotary else role_of(wiring, name),
                [index[source] for source in wiring.inputs(name) if source in index],
                0 if node.has_val else 1,
                f"{node.target}{node.args}",
                node.source,
            ]
        )
    return {"name": graph.name, "nodes": nodes, "kinds": wiring.kinds}


def _order(report: Report) -> list[Finding]:
    """Return the findings, the first of the verdict at the head, then the worst."""
    first = report.first
    rest = [finding for finding in worst(report.findings) if finding is not first]
    return [first, *rest] if first else rest


def _shown(report: Report, finding: Finding, number: int) -> dict[str, Any]:
    picture = _picture(report, finding) if number < _PICTURES else None
    sides = f"{count(len(finding.before), 'operation')} of before, {len(finding.after)} of after"
    code = region_code(report, finding)
    return {"record": finding, "place": places(finding)[0], "region": sides, "picture": picture, "code": code}


def _picture(report: Report, finding: Finding | None) -> Any:
    if find_engine() is None:
        return None
    simpler = [lambda: dot_divergence(report, finding, limit=20, heading=False)]
    try:
        drawn = draw(dot_divergence(report, finding, heading=False), format="svg", seconds=_SECONDS, coarser=simpler)
    except RenderError:
        return None
    return clean_svg(drawn)


def clean_svg(svg: bytes) -> Any:
    """Return an engine's SVG as markup with nothing in it but shapes and text."""
    from markupsafe import Markup

    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    root = ElementTree.fromstring(svg)
    _clean(root)
    # the width in points stays, so that a small picture is not blown up; the height follows from the view box
    root.attrib.pop("height", None)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _clean(element: ElementTree.Element) -> None:
    for name in list(element.attrib):
        if not _SVG_ATTRIBUTES.match(name):
            del element.attrib[name]
    for child in list(element):
        if not isinstance(child.tag, str) or child.tag.rpartition("}")[2] not in _SVG:
            element.remove(child)
        else:
            _clean(child)


def _transforms(report: Report) -> list[tuple[str, str, str]]:
    """Return (transform, its gravest verdict, how many findings) in the order of the findings."""
    found: dict[str, list[str]] = {}
    for finding in report.findings:
        if finding.transform:
            found.setdefault(finding.transform, []).append(finding.kind)
    return [(name, max(kinds, key=VERDICTS.index), count(len(kinds), "finding")) for name, kinds in found.items()]


def _steps(run: RunReport) -> list[tuple[str, str, str]]:
    """Return (transform, verdict, what came of it) for every transform of a run."""
    rows = []
    for step in run.steps:
        what = matches(step) if step.status == "applied" else f"{step.status} {step.reason}".strip()
        defects = f", {count(len(step.lints), 'defect')}" if step.lints else ""
        rows.append((step.transform, step.report.verdict if step.report is not None else "", what + defects))
    return rows


def _part(name: str) -> str:
    return (importlib.resources.files("graphprobe.render") / "templates" / name).read_text(encoding="utf-8")

"""The HTML report: one file that works from disk, shows everything, and lets nothing in a graph become code."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browser import Browser, available
from graphprobe import render
from graphprobe.records import GraphView, Lint, NodeView, OutputRow, Report, RunReport, RunStep
from graphprobe.render.page import clean_svg
from render_samples import llama, wrong_scale

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&\u00fc" + 500 * "x"


class Reader(HTMLParser):
    """Collects tags, attributes, visible text and the embedded data of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.data = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = "data" if dict(attrs).get("id") == "data" else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data += data
        elif self._inside not in ("script", "style"):
            self.words.append(data)


def hostile(report: Report) -> Report:
    """Put markup into every text that a model or a user may name."""
    finding = dataclasses.replace(
        report.findings[0],
        hint=HOSTILE,
        explanation=HOSTILE,
        module_path=HOSTILE,
        op=HOSTILE,
        source=HOSTILE,
        transform=HOSTILE,
    )
    nodes = tuple(
        dataclasses.replace(n, module_path=HOSTILE, target=HOSTILE, source=HOSTILE) for n in report.after.nodes
    )
    regions = tuple(dataclasses.replace(row, module_path=HOSTILE, op=HOSTILE, note=HOSTILE) for row in report.regions)
    return dataclasses.replace(
        report,
        findings=(finding,),
        regions=regions,
        after=GraphView(HOSTILE, nodes),
        notes=(HOSTILE,),
        command=HOSTILE,
        environment={HOSTILE: HOSTILE},
        outputs=(OutputRow(HOSTILE, (1,), HOSTILE, 0.1, 0.1, False),),
    )


def test_the_page_needs_nothing_but_itself() -> None:
    page = render.page(wrong_scale())
    reader = Reader(page)
    for tag, attributes in reader.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "action", "data", "xlink:href"):
            target = attributes.get(name) or ""
            assert target == "" or target.startswith(("#", "data:,")), (tag, name, target)
    assert "default-src 'none'" in page and "@import" not in page
    assert not re.search(r"url\((?!data:)", page) and not re.search(r"\b(fetch|XMLHttpRequest|eval|import)\(", page)


def test_the_page_says_what_the_report_says() -> None:
    report = wrong_scale()
    text = " ".join(" ".join(Reader(render.page(report)).words).split())
    finding = report.findings[0]
    assert finding.explanation in text and finding.hint in text and finding.source in text
    for word in (
        "semantic: layer 1",
        "9.2e-04",
        "1.0e-03",
        "1.7e-03",
        "99.8 %",
        "scale_attention",
        "output logits",
        report.command,
    ):
        assert word in text, word
    assert "157 operations compared" in text and "torch" in text and "compared on the CPU" in text


def test_a_run_lists_its_transforms_with_a_verdict_each() -> None:
    report = wrong_scale()
    steps = (
        RunStep("fuse_qkv", "fuse_qkv{min_heads=2}", "fusion", "applied", ("a", "b"), report=Report("rounding")),
        RunStep(
            "scale", "scale", "fusion", "applied", ("c",), report=report, lints=(Lint("missing-val", "n", "m", "f"),)
        ),
        RunStep("fuse_rope", "fuse_rope", "fusion", "matched nothing", reason="no rotary tables"),
    )
    text = " ".join(
        " ".join(Reader(render.page(report, run=RunReport("fuse_qkv,scale,fuse_rope", steps))).words).split()
    )
    for word in (
        "fuse_qkv{min_heads=2} \u2248 rounding 2 matches",
        "1 match, 1 defect",
        "matched nothing no rotary tables",
    ):
        assert word in text, word


def test_the_data_holds_every_region_and_both_graphs() -> None:
    report = wrong_scale()
    data = json.loads(Reader(render.page(report)).data)
    assert {row[2] for row in data["regions"]} == {row.after for row in report.regions}
    assert [row[2] for row in data["regions"]] == [
        n.name for n in report.after.nodes if n.name in {r.after for r in report.regions}
    ]
    for side in ("before", "after"):
        assert [node[0] for node in data["sides"][side]["nodes"]][:3] == ["tokens", "attention_mask", "embedding"]
    assert len(data["claims"]) == len(report.claims)


def test_markup_in_a_graph_stays_text() -> None:
    page = render.page(hostile(wrong_scale()))
    reader = Reader(page)
    assert not any(tag == "img" or any(name.startswith("on") for name in attributes) for tag, attributes in reader.tags)
    scripts = [attributes for tag, attributes in reader.tags if tag == "script"]
    assert len(scripts) == len([t for t, _ in Reader(render.page(wrong_scale())).tags if t == "script"])
    assert json.loads(reader.data)["regions"][0][4] == HOSTILE
    assert any(HOSTILE in words for words in reader.words)


def test_an_svg_keeps_shapes_and_loses_code() -> None:
    svg = (
        b'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9">'
        b'<script>x</script><g onclick="x"><a xlink:href="javascript:x"><text x="1">ok</text></a>'
        b'<foreignObject><b/></foreignObject><path d="M0 0"/></g></svg>'
    )
    clean = str(clean_svg(svg))
    assert "<text" in clean and "M0 0" in clean and 'viewBox="0 0 9 9"' in clean
    for word in ("script", "onclick", "href", "foreignObject"):
        assert word not in clean


@pytest.mark.parametrize(
    "report",
    [
        Report("identical"),
        Report("unknown", notes=("nothing was compared",)),
        Report("rounding", before=llama(1), after=llama(1)),
        dataclasses.replace(wrong_scale(), verdict="rounding", findings=()),
    ],
)
def test_reports_with_little_in_them_have_a_page(report: Report) -> None:
    assert report.verdict in " ".join(Reader(render.page(report)).words)


def test_a_large_report_stays_small(tmp_path: Path) -> None:
    report = wrong_scale(layers=40, layer=20)
    assert len(report.after.nodes) > 2000
    report.to_html(str(tmp_path / "r.html"))
    assert (tmp_path / "r.html").stat().st_size < 5e6


needs_browser = pytest.mark.skipif(not available(), reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as window:
        yield window


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Browser:
    render.write_html(wrong_scale(layers=12, layer=5), tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    assert browser.log() == []
    return browser


def _column(browser: Browser, number: int) -> list[str]:
    found = browser.run(
        "return [...document.querySelectorAll('#table tbody tr')].map((r) => r.cells[arguments[0]].textContent)", number
    )
    assert isinstance(found, list)
    return found


@needs_browser
def test_in_a_browser_the_table_sorts_and_filters(opened: Browser) -> None:
    assert _column(opened, 2)[0] == "scale_5"  # worst first
    opened.click("th[data-column=after] button")
    names = _column(opened, 2)
    assert (
        names[0] == "arange"
        and opened.run("return document.querySelector('th[data-column=after]').ariaSort") == "ascending"
    )
    opened.click("th[data-column=total] button")
    totals = [float(text) for text in _column(opened, 6)]
    assert totals == sorted(totals, reverse=True)
    opened.keys("#filter", "layers.5 softmax")
    assert _column(opened, 2) == ["softmax_5"]
    opened.run("const s = document.getElementById('kind'); s.value = 'semantic'; s.dispatchEvent(new Event('change'))")
    assert _column(opened, 2) == [] and "0 of" in str(
        opened.run("return document.getElementById('matches').textContent")
    )
    assert opened.log() == []


@needs_browser
def test_in_a_browser_modules_unfold_and_partners_are_marked(opened: Browser) -> None:
    boxes = "return [...document.querySelectorAll('#graph-after .box')].map((b) => b.dataset.id)"
    shown = opened.run(boxes)
    assert "scale_5" in shown and "scale_4" not in shown  # the culprit is in view from the start
    opened.click("#fold")
    assert "scale_5" not in opened.run(boxes) and "model.layers.5" in opened.run(boxes)
    opened.keys("#graph-after .box[data-id='model.layers.4']", "\ue007")  # Enter
    assert "model.layers.4.self_attn" in opened.run(boxes)
    opened.keys("#graph-after .box[data-id='model.layers.4.self_attn']", "\ue007")
    opened.keys("#graph-after .box[data-id='scale_4']", "\ue007")
    assert opened.run("return document.querySelector('#graph-before .mate').dataset.id") == "scale_4"
    assert "Claimed to equal scale_4 of before" in str(
        opened.run("return document.getElementById('detail').textContent")
    )
    opened.keys("#find", "softmax_9\ue007")
    assert "softmax_9" in opened.run(boxes)
    opened.keys("#graph-after .box[data-id='model.layers.9']", "\ue007")
    assert "softmax_9" not in opened.run(boxes)
    assert opened.log() == []


@needs_browser
def test_in_a_browser_the_curve_moves_by_keys_and_opens_an_operation(opened: Browser) -> None:
    words = "return document.getElementById('curve-words').textContent"
    opened.keys("#curve", "\ue011\ue014")  # Home, right arrow
    assert str(opened.run(words)).startswith("arange: identical in model.rotary_emb: introduced 0")
    opened.keys("#curve", "\ue007")
    assert opened.run("return document.querySelector('#table tr.on').dataset.after") == "arange"
    opened.click("input[value=layer]")
    opened.keys("#curve", "\ue010")  # End
    assert str(opened.run(words)).startswith("lm_head: rounding: introduced 1.0e-05")
    opened.click("#series input")
    assert opened.run("return document.querySelectorAll('#curve path').length") == 3
    opened.click(".facts [data-go]")
    assert opened.run("return document.querySelector('#graph-after .on').dataset.id") == "scale_5"
    assert opened.log() == []


@needs_browser
def test_in_a_browser_links_lead_somewhere_and_the_page_turns_dark(opened: Browser) -> None:
    assert opened.run(
        "return [...document.querySelectorAll('a[href^=\"#\"]')].every((a) => document.querySelector(a.hash))"
    )
    before = opened.run("return getComputedStyle(document.body).backgroundColor")
    opened.click("#theme")
    assert opened.run("return getComputedStyle(document.body).backgroundColor") != before


@needs_browser
def test_in_a_browser_hostile_names_run_nothing(browser: Browser, tmp_path: Path) -> None:
    report = hostile(wrong_scale())
    lacking = NodeView("n", "call_function", HOSTILE, module_path=HOSTILE, has_val=False)
    report = dataclasses.replace(report, before=GraphView(HOSTILE, (lacking,)))
    render.write_html(report, tmp_path / "hostile.html")
    browser.open(tmp_path / "hostile.html")
    assert browser.log() == []
    assert "owned" not in str(browser.run("return document.title")).split("'")[0]
    assert browser.run("return document.querySelectorAll('img').length") == 0
    # names of any length break or are cut, and never make the page wider than the window
    assert browser.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@needs_browser
def test_in_a_browser_a_very_large_report_answers(browser: Browser, tmp_path: Path) -> None:
    render.write_html(wrong_scale(layers=200, layer=100), tmp_path / "large.html")
    browser.open(tmp_path / "large.html")
    browser.click("#fold")
    assert browser.run("return document.querySelectorAll('#graph-after .box').length") < 400
    assert browser.log() == []

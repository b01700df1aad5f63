"""Texts: they fit 100 columns whatever they are given, put the worst first, and say in the first line what matters."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprobe import render
from graphprobe.records import VERDICTS, Coverage, Finding, GraphView, Lint, OutputRow, RegionRow, Report, Tap
from render_samples import wrong_scale

WIDTH = 100
_words = st.text(max_size=140) | st.sampled_from(["model.layers.17.self_attn", "aten.mul.Tensor", "x" * 300])
_errors = st.none() | st.floats(min_value=0)
_kinds = st.sampled_from(VERDICTS)
_names = st.lists(_words, max_size=4).map(tuple)
_findings = st.builds(
    Finding,
    kind=_kinds,
    before=_names,
    after=_names,
    module_path=_words,
    op=_words,
    introduced=_errors,
    total=_errors,
    exact=_errors,
    floor=_errors,
    cures=st.none() | st.floats(0, 1),
    located=st.booleans(),
    better=st.sampled_from([None, "before", "after"]),
    hint=_words,
    explanation=_words,
    culprit=_words,
    source=_words,
    outputs=st.tuples(_words, _words),
    frontier=st.lists(st.tuples(_words, _words), max_size=3).map(tuple),
    transform=_words,
    causal=st.booleans(),
    accepted=_words,
)
_regions = st.builds(
    RegionRow,
    before=_words,
    after=_words,
    op=_words,
    module_path=_words,
    verdict=_kinds,
    introduced=_errors,
    total=_errors,
    exact=_errors,
    floor=_errors,
    evidence=_words,
    size_before=st.integers(0, 99),
    size_after=st.integers(0, 99),
)
_counts = st.integers(0, 10**7)
_coverages = st.builds(
    Coverage,
    compared=_counts,
    derived=_counts,
    unmatched_before=_counts,
    fraction=st.floats(0, 1),
    resolution=st.floats(0, 1),
    largest=_words,
    evidence=st.dictionaries(_words, _counts, max_size=4),
    dont_care=_counts,
    unmatched=_names,
)
_outputs = st.builds(
    OutputRow,
    path=_words,
    shape=st.just((1, 5, 99)),
    dtype=_words,
    error=_errors,
    max_abs=_errors,
    identical=st.booleans(),
)
reports = st.builds(
    Report,
    verdict=_kinds,
    findings=st.lists(_findings, max_size=3).map(tuple),
    coverage=_coverages,
    regions=st.lists(_regions, max_size=3).map(tuple),
    outputs=st.lists(_outputs, max_size=10).map(tuple),
    notes=_names,
    environment=st.dictionaries(_words, _words, max_size=3),
    command=_words,
    before=st.just(GraphView()),
)


def widest(text: str) -> int:
    return max(len(line) for line in text.splitlines())


@given(reports)
@settings(max_examples=150, deadline=None)
def test_any_report_fits_and_names_its_verdict_first(report: Report) -> None:
    text = render.text(report, verbose=True)
    assert text.startswith(report.verdict)
    assert widest(text) <= WIDTH
    assert all(line.isprintable() for line in text.split("\n"))


@given(reports)
@settings(max_examples=30, deadline=None)
def test_a_saved_report_reads_the_same(report: Report) -> None:
    assert render.text(Report.from_json(report.to_json())) == render.text(report)


def test_the_first_line_says_what_matters() -> None:
    first = render.text(wrong_scale()).splitlines()[0]
    assert first == "semantic: layer 1, model.layers.1.self_attn, scale_1 (aten.mul.Tensor) computes another function"


def test_a_long_name_shortens_the_first_line_from_its_least_part() -> None:
    report = wrong_scale()
    op = "aten.scaled_dot_product_attention.default"
    finding = dataclasses.replace(report.findings[0], op=op, culprit="scaled_dot_product_attention_1")
    first = render.text(dataclasses.replace(report, findings=(finding,))).splitlines()[0]
    assert first == "semantic: model.layers.1.self_attn, scaled_dot_product_attention_1 computes another function"


def test_every_figure_of_the_finding_is_printed_beside_its_meaning() -> None:
    lines = render.text(wrong_scale()).splitlines()
    for name, value in {"introduced": "9.2e-04", "exact": "1.0e-03", "floor": "1.7e-03", "cures": "99.8 %"}.items():
        assert any(line.split()[:1] == [name] and value in line for line in lines), name
    joined = " ".join(" ".join(lines).split())
    for word in ("modeling.py:12", "scale_attention", "looks like an attention scale", "compared on the CPU"):
        assert word in joined


@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_verdict_without_findings_has_a_sentence(verdict: str) -> None:
    report = Report(verdict, outputs=(OutputRow("y", (2,), "float32", 3e-3, 0.1, False),))
    first = render.text(report).splitlines()[0]
    assert first.startswith(f"{verdict}: ") and len(first.split()) > 4


def test_unknown_says_how_much_was_judged_and_how_much_was_asked_for() -> None:
    text = render.text(Report("unknown", coverage=Coverage(compared=9, resolution=0.41), min_coverage=0.9))
    assert "41.0 %" in text.splitlines()[0] and "90.0 %" in text.splitlines()[0]
    assert "below the 90.0 %" in text


def test_tables_put_the_worst_first() -> None:
    report = wrong_scale()
    small = dataclasses.replace(report.findings[0], kind="precision", introduced=0.5, culprit="softmax_2")
    large = dataclasses.replace(report.findings[0], introduced=0.2, culprit="scale_2")
    nan = dataclasses.replace(report.findings[0], introduced=float("nan"), culprit="scale_3")
    accepted = dataclasses.replace(report.findings[0], introduced=0.9, culprit="scale_0", accepted="scale_0:semantic:1")
    report = dataclasses.replace(report, findings=(small, accepted, *report.findings, large, nan))
    rows = re.findall(r"(?:scale|softmax)_\d", render.findings_table(report))
    assert rows == ["scale_3", "scale_2", "scale_1", "softmax_2", "scale_0"]
    assert render.regions_table(report, limit=5).splitlines()[2].split()[1] == "scale_1"


def test_regions_beyond_the_limit_are_counted() -> None:
    report = wrong_scale()
    assert render.regions_table(report, limit=5).splitlines()[-1] == f"{len(report.regions) - 5} more regions"
    assert "more region" not in render.regions_table(report, limit=None)


def test_taps_list_views_as_derived_and_say_where_nan_begins() -> None:
    long = "model.layers.3.mlp.down_proj/" + "x" * 80
    taps = (
        Tap("a", "aten.mm.default", "", (2, 3), "bfloat16", -1.25e-12, 3.5e11, 0.1, 1.0),
        Tap("v", "aten.view.default", "", (6,), "bfloat16", derived=True, of="a"),
        Tap(long, "aten.linear.default", "m", (1, 5, 49152), "bfloat16", None, None, None, None, nan=7, inf=1, zeros=9),
    )
    text = render.taps_text(taps)
    assert widest(text) <= WIDTH
    head = " ".join(text.split("\n\n")[0].split("name")[0].split())
    assert head.startswith("2 values measured, 1 view; the first with NaN or infinity is model.layers.3")
    assert "view of a" in text and "7 nan, 1 inf, 9 zero" in text
    assert "all finite" in render.taps_text(taps[:2])


@given(
    st.lists(
        st.builds(Lint, rule=_words, node=_words, message=_words, fix=_words, target=_words, source=_words), max_size=4
    )
)
@settings(max_examples=60, deadline=None)
def test_lint_text_fits(issues: list[Lint]) -> None:
    assert widest(render.lint_text(issues)) <= WIDTH


def test_lint_text_says_place_and_cure() -> None:
    issue = Lint(
        "missing-val",
        "fused_3",
        "meta['val'] is missing",
        "set node.meta['val']",
        "my.op",
        "fuse.py:8",
        "m.0",
        "fuse_qkv",
    )
    text = render.lint_text([issue, issue])
    assert text.splitlines()[0] == "2 defects: 2 missing-val"
    for word in ("fused_3 (my.op)", "m.0, fuse.py:8", "transform fuse_qkv", "mend: set node.meta['val']"):
        assert word in text
    assert render.lint_text([]) == "no defects found"

"""The picture of the first divergence: both sides, the region, the claims, what was passed on, and never too much."""

from __future__ import annotations

import dataclasses
import math

import pytest

from graphprobe import render
from graphprobe.records import ClaimRecord, Finding, GraphView, NodeView, RegionRow, Report
from graphprobe.render.heat import AGREED, heat
from graphprobe.render.roles import NO_VALUE
from render_reading import Picture
from render_samples import calls, llama, wrong_scale


def _side(picture: Picture, side: str) -> set[str]:
    return {n for box in picture.boxes if picture.clusters[box][0].startswith(side) for n in picture.members(box)}


def _region(picture: Picture, side: str) -> set[str]:
    boxes = [box for box, path in picture.clusters.items() if path[0].startswith(side) and len(path) == 2]
    assert all(picture.clusters[box][1].startswith("region") for box in boxes)
    return {n for box in boxes for n in picture.members(box)}


def test_both_sides_show_the_region_with_two_levels_above_and_one_below() -> None:
    picture = Picture(render.dot_divergence(wrong_scale()))
    for side in ("before", "after"):
        assert _region(picture, side) == {"scale_1"}
        assert _side(picture, side) == {"q_add_1", "k_add_1", "scores_1", "scale_1", "masked_1"}


def test_views_are_no_level_of_context() -> None:
    report = wrong_scale()
    finding = dataclasses.replace(report.findings[0], before=("mixed_1",), after=("mixed_1",), outputs=("mixed_1",) * 2)
    picture = Picture(render.dot_divergence(report, finding))
    below = _side(picture, "after")
    # through one view downwards; upwards past view and transpose to the projection and to what feeds it
    assert {"joined_1", "self_attn_o_proj_1", "v_view_1", "v_t_1", "self_attn_v_proj_1"} <= below
    assert "attended_1" not in below


def test_what_serves_all_layers_draws_no_other_layer_in() -> None:
    report = wrong_scale(layers=12)
    names = ("mask", "scores_1", "scale_1", "masked_1")
    finding = dataclasses.replace(report.findings[0], before=names, after=names, outputs=("masked_1",) * 2)
    picture = Picture(render.dot_divergence(report, finding))
    assert "softmax_1" in _side(picture, "after") and "mask" in _region(picture, "after")
    assert not any(name.startswith("masked_") and name != "masked_1" for name in _side(picture, "after"))


def test_claims_join_the_sides_and_the_differing_pair_stands_out() -> None:
    picture = Picture(render.dot_divergence(wrong_scale()))
    claims = {pair: link for pair, link in picture.links.items() if link.get("style") == "dashed"}
    assert set(claims) == {(f"before {n}", f"after {n}") for n in _side(picture, "before")}
    widths = {pair: float(link.get("penwidth", "1")) for pair, link in claims.items()}
    assert max(widths, key=lambda pair: widths[pair]) == ("before scale_1", "after scale_1")


def test_colours_tell_the_culprit_the_agreed_and_what_was_passed_on() -> None:
    picture = Picture(render.dot_divergence(wrong_scale()))
    assert picture.boxes["after scale_1"]["fillcolor"] == heat(1.0e-3) != AGREED
    assert "the first operation that differs" in picture.text("after scale_1")
    assert "the first operation that differs" not in picture.text("before scale_1")
    assert picture.boxes["after scores_1"]["fillcolor"] == AGREED
    assert picture.boxes["after masked_1"]["style"] == "striped" and "passed on" in picture.text("after masked_1")
    assert not any(picture.boxes[b]["style"] == "striped" for b in picture.boxes if b != "after masked_1")


def test_error_from_above_is_hatched_only_below_a_finding() -> None:
    report = wrong_scale()
    harmless = dataclasses.replace(report, verdict="rounding", findings=())
    assert "striped" not in {box["style"] for box in Picture(render.dot_divergence(harmless)).boxes.values()}


def test_heat_grows_with_the_error() -> None:
    fills = [heat(error) for error in (1e-9, 1e-5, 1e-3, 5e-2, 0.5, 2.0)]
    assert len(set(fills)) == len(fills)
    assert heat(math.nan) == heat(math.inf) == fills[-1] and heat(None) not in fills


def test_the_title_and_boxes_carry_figures_shapes_and_places() -> None:
    picture = Picture(render.dot_divergence(wrong_scale()))
    for word in (
        "semantic: layer 1",
        "exact 1.0e-03",
        "floor 1.7e-03",
        "cures 99.8 %",
        "modeling.py:12",
        "scale_attention",
    ):
        assert word in picture.title
    assert "mul 0.25025" in picture.text("after scale_1") and "mul 0.25\n" in picture.text("before scale_1")
    for word in ("scale_1", "[1×4×5×5] bf16", "introduced 9.2e-04", "modeling.py:12 in forward"):  # noqa: RUF001
        assert word in picture.text("after scale_1"), word


def test_a_node_without_a_value_is_red() -> None:
    report = wrong_scale()
    nodes = tuple(dataclasses.replace(n, has_val=n.name != "masked_1") for n in report.after.nodes)
    picture = Picture(render.dot_divergence(dataclasses.replace(report, after=GraphView("after", nodes))))
    assert picture.with_fill(NO_VALUE.fill) == ["after masked_1"]


@pytest.mark.parametrize("limit", [20, 60])
def test_a_huge_region_is_folded_around_its_culprit_and_its_ends(limit: int) -> None:
    graph = llama(30)
    names = tuple(node.name for node in calls(graph))
    whole = Finding(
        "semantic", names, names, "model", "aten.mul.Tensor", 0.5, 0.5, 0.5, 1e-3, located=False, culprit="scale_7"
    )
    whole = dataclasses.replace(whole, outputs=("logits", "logits"), frontier=(("tokens", "tokens"),))
    claims = tuple(ClaimRecord(name, name, "id") for name in names)
    report = Report("semantic", (whole,), before=graph, after=graph, claims=claims)
    picture = Picture(render.dot_divergence(report, limit=limit))
    assert len(picture.boxes) <= limit
    assert {"after scale_7", "after logits", "before logits", "after tokens"} <= set(picture.boxes)
    assert render.draw(render.dot_divergence(report, limit=limit)).startswith(b"\x89PNG")


def test_sides_of_different_length_and_order_keep_their_claims_level() -> None:
    def chain(*steps: str) -> GraphView:
        nodes = [NodeView("x", "placeholder", "x", shape=(2,), dtype="float32")]
        for name in steps:
            nodes.append(NodeView(name, "call_function", f"aten.{name}.default", (nodes[-1].name,), shape=(2,)))
        return GraphView("chain", (*nodes, NodeView("output", "output", "output", (nodes[-1].name,))))

    before, after = chain("sin", "pow", "mean", "rsqrt", "cos"), chain("cos", "rms_norm", "sin")
    pairs = (("sin", "sin"), ("cos", "cos"), ("rsqrt", "rms_norm"))
    finding = Finding("semantic", ("pow", "mean", "rsqrt"), ("rms_norm",), "", "aten.rms_norm", 1.0, 1.0, 1.0, 0.0)
    finding = dataclasses.replace(finding, outputs=("rsqrt", "rms_norm"), culprit="rms_norm")
    claims = tuple(ClaimRecord(x, y, "values", certain=False) for x, y in pairs)
    dot = render.dot_divergence(Report("semantic", (finding,), before=before, after=after, claims=claims))
    picture = Picture(dot)
    assert {(f"before {x}", f"after {y}") for x, y in pairs} <= set(picture.links)
    assert render.draw(dot).startswith(b"\x89PNG")


def test_a_report_without_findings_shows_the_largest_error() -> None:
    graph = llama(2)
    rows = [
        RegionRow(n.name, n.name, n.target, n.module_path, "rounding", 1e-4, 1e-3, 0.0, 1e-4, "id", 1, 1)
        for n in calls(graph)
    ]
    rows[40] = dataclasses.replace(rows[40], introduced=0.02)
    picture = Picture(render.dot_divergence(Report("rounding", regions=tuple(rows), before=graph, after=graph)))
    assert "nothing diverges" in picture.title and "2.0e-02" in picture.title
    assert _region(picture, "after") == {rows[40].after}


@pytest.mark.parametrize(
    "report",
    [
        Report("identical"),
        Report("unknown", before=llama(1), after=llama(1)),
        Report("structural", (Finding("structural", (), ("gone",), "", "", None, None, None, None, culprit="gone"),)),
        Report("semantic", (Finding("semantic", (), ("scale_0",), "", "", 1.0, 1.0, 1.0, 0.0),), after=llama(1)),
    ],
)
def test_reports_with_little_in_them_are_drawn_all_the_same(report: Report) -> None:
    dot = render.dot_divergence(report)
    assert report.verdict in Picture(dot).title
    assert render.draw(dot, format="svg")


def test_a_saved_report_is_drawn_the_same() -> None:
    report = wrong_scale()
    assert render.dot_divergence(Report.from_json(report.to_json())) == render.dot_divergence(report)

"""Profiler traces laid upon graphs: exact where ranges name the operations, else a guess that says so."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from graphprobe import render
from graphprobe.errors import RenderError
from graphprobe.records import GraphView
from graphprobe.render.trace import kernels_by_node, read_trace, short_kernel
from render_reading import Picture
from render_samples import llama
from render_traces import GEMM, chrome, nsys


@pytest.fixture(params=["json", "json.gz", "sqlite"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    def write(graph: GraphView, ranges: bool) -> Path:
        path = tmp_path / f"trace.{request.param}"
        if request.param == "sqlite":
            nsys(graph, path, ranges)
        else:
            data = json.dumps(chrome(graph, ranges)).encode()
            path.write_bytes(gzip.compress(data) if request.param == "json.gz" else data)
        return path

    return write


@pytest.mark.parametrize("ranges", [True, False])
def test_each_operation_gets_the_kernels_of_its_last_run(written: Any, ranges: bool) -> None:
    graph = llama()
    found, exact = kernels_by_node(read_trace(written(graph, ranges)), graph)
    assert exact is ranges
    assert set(found) == {node.name for node in graph.nodes if node.op == "call_function" and not node.is_view}
    assert {kernel.micros for kernels in found.values() for kernel in kernels} == {3.0}


@pytest.mark.parametrize("ranges", [True, False])
def test_the_picture_names_kernels_their_times_and_the_sum_of_the_layer(written: Any, ranges: bool) -> None:
    graph = llama()
    overlay = render.overlay_trace(written(graph, ranges), graph)
    picture = Picture(render.dot_layer(graph, 1, overlay=overlay))
    text = picture.text("scale_1")
    assert "Kernel2 3.0 \u00b5s" in text and ("guess" in text) is not ranges
    assert "kernels of 38 operations take 114.0 \u00b5s together" in picture.title
    assert ("a guess" in picture.title) is not ranges


def test_a_guess_goes_on_past_operations_that_only_one_side_knows(tmp_path: Path) -> None:
    graph = llama()
    kept = [event for event in chrome(graph)["traceEvents"] if event.get("name") != "aten::softmax"]
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": kept}))
    found, exact = kernels_by_node(read_trace(tmp_path / "t.json"), graph)
    assert not exact and {"scores_0", "mixed_1", "logits", "embedding"} <= set(found) and "softmax_1" not in found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "cannot read the trace"),
        (b"{}", "no traceEvents"),
        (b'{"traceEvents": []}', "0 kernel launches"),
        (b"\x1f\x8bnonsense", "cannot read the trace"),
        (b"SQLite format 3\x00nonsense", "cannot read the trace"),
    ],
)
def test_files_that_are_no_trace_get_a_clear_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(RenderError, match=said):
        render.overlay_trace(path, llama())
    with pytest.raises(RenderError, match="cannot read the trace"):
        render.overlay_trace(tmp_path / "missing", llama())


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (GEMM, "Kernel2"),
        ("void at::native::(anonymous namespace)::softmax_warp<float, 4>(float*)", "softmax_warp"),
        ("triton_poi_fused_add_0", "triton_poi_fused_add_0"),
        ("nvjet_sm90_tst_64x8_h_bz_TNT", "nvjet_sm90_tst_64x8_h_bz_TNT"),
        ("void f<a::operator()<int>, (x)3>(int)", "f"),
        ("", ""),
    ],
)
def test_kernels_are_called_by_their_bare_names(name: str, short: str) -> None:
    assert short_kernel(name) == short

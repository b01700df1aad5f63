"""Profiler traces laid upon graphs: exact where ranges name the operations, else a guess that says so."""

from __future__ import annotations

import gzip
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from graphprobe import render
from graphprobe.errors import RenderError
from graphprobe.records import GraphView
from graphprobe.render.trace import kernels_by_node, read_trace, short_kernel
from render_reading import Picture
from render_samples import llama

GEMM = "void cutlass::Kernel2<cutlass::gemm<128, 64>>(cutlass::Params)"


def host_calls(graph: GraphView, ranges: bool = False) -> list[tuple[str, str, float, float]]:
    """Return (range or '', aten operation, start, kernel microseconds) for two runs of a graph; views launch none."""
    found, now = [], 0.0
    for run in range(2):
        for node in graph.nodes:
            if node.op == "call_function":
                name = f"graphprobe:{node.name}" if ranges else ""
                aten = "::".join(node.target.split(".")[:2])
                found.append((name, aten, now, 0.0 if node.is_view else 2.0 + run))
                now += 10.0
    return found


def chrome(graph: GraphView, ranges: bool = False) -> dict[str, Any]:
    """Return a trace as torch's profiler writes it: the inner operation of a linear is there, too."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name"}, {"ph": "i", "ts": 3, "name": "mark"}]
    for number, (name, aten, start, micros) in enumerate(host_calls(graph, ranges=ranges)):
        here = {"ph": "X", "pid": 1, "tid": 7}
        if name:
            events.append({**here, "cat": "user_annotation", "name": name, "ts": start, "dur": 9})
        events.append({**here, "cat": "cpu_op", "name": aten, "ts": start + 1, "dur": 7})
        events.append({**here, "cat": "cpu_op", "name": "aten::inner", "ts": start + 2, "dur": 4})
        if micros:
            call = {"correlation": number}
            events.append(
                {**here, "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": start + 3, "dur": 1, "args": call}
            )
            kernel = {"ph": "X", "pid": 0, "tid": 9, "cat": "kernel", "name": GEMM, "ts": start + 500, "dur": micros}
            events.append({**kernel, "args": {"correlation": number, "stream": 9}})
    return {"traceEvents": events}


def nsys(graph: GraphView, path: Path, ranges: bool) -> None:
    """Write a trace as `nsys export --type sqlite` does; operations are NVTX ranges as emit_nvtx makes them."""
    with closing(sqlite3.connect(path)) as base:
        base.execute("CREATE TABLE StringIds (id INTEGER, value TEXT)")
        base.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INT, end INT, globalTid INT, correlationId INT)")
        columns = "start INT, end INT, demangledName INT, shortName INT, correlationId INT"
        base.execute(f"CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL ({columns})")
        base.execute("CREATE TABLE NVTX_EVENTS (start INT, end INT, text TEXT, textId INT, globalTid INT)")
        base.execute("INSERT INTO StringIds VALUES (5, ?)", (GEMM,))
        for number, (name, aten, start, micros) in enumerate(host_calls(graph, ranges=ranges)):
            at = int(start * 1000)
            if name:
                base.execute("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, NULL, 7)", (at, at + 9000, name))
            base.execute(
                "INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, NULL, 7)", (at + 1000, at + 8000, f"{aten}, seq = 3")
            )
            if micros:
                base.execute(
                    "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, 7, ?)", (at + 3000, at + 4000, number)
                )
                late = at + 500_000
                row = (late, late + int(micros * 1000), 5, 5, number)
                base.execute("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?, ?)", row)
        base.commit()


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

"""Profiler traces made by hand, as torch's profiler and Nsight Systems write them."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from graphprobe.records import GraphView

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


#: operator -> what a kernel of it is called on a recent GPU.
NAMES = {
    "aten.linear.default": "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT",
    "aten.matmul.default": "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_64x64>(Params)",
    "aten.softmax.int": "void at::native::(anonymous namespace)::softmax_warp_forward<float, 5>(float*)",
    "aten.embedding.default": "void at::native::(anonymous namespace)::vectorized_gather_kernel<16, long>(char*)",
    "aten.mean.dim": "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>(ReduceOp)",
    "aten.silu.default": "void at::native::vectorized_elementwise_kernel<4, silu_kernel(at::TensorIterator&)>(int)",
    "aten.cat.default": "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 4>(float*)",
}
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float>>(int)"


def recorded(graph: GraphView, replays: int = 2) -> list[tuple[str, float, float, int]]:
    """Return (kernel, start, microseconds, launch) of a CUDA graph that is replayed; the last replay counts 100 up."""
    found = []
    for replay in range(replays):
        wanted = [n for n in graph.nodes if n.op == "call_function" and not n.is_view]
        for number, node in enumerate(wanted):
            micros = (100.0 if replay == replays - 1 else 0.0) + number
            found.append((NAMES.get(node.target, ELEMENTWISE), 1e6 * replay + 100.0 * number, micros, 70 + replay))
        found.append(("void sampling_kernel(int)", 1e6 * replay + 9e5, 1.0, 90 + replay))  # launched on its own
    return found


def write_recorded(graph: GraphView, path: Path) -> None:
    """Write such a trace as JSON, or as sqlite where the name ends so; the host knows of nothing but launches."""
    if path.suffix != ".sqlite":
        call = [
            {"ph": "X", "pid": 1, "tid": 7, "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 10.0 + launch,
             "dur": 1, "args": {"correlation": launch}}
            for launch in sorted({launch for *_, launch in recorded(graph)})
        ]  # fmt: skip
        kernels = [
            {"ph": "X", "pid": 0, "tid": 9, "cat": "kernel", "name": name, "ts": start, "dur": micros,
             "args": {"correlation": launch, "stream": 9}}
            for name, start, micros, launch in recorded(graph)
        ]  # fmt: skip
        path.write_text(json.dumps({"traceEvents": [*call, *kernels]}))
        return
    with closing(sqlite3.connect(path)) as base:
        base.execute("CREATE TABLE StringIds (id INTEGER, value TEXT)")
        columns = "start INT, end INT, demangledName INT, shortName INT, correlationId INT, graphNodeId INT"
        base.execute(f"CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL ({columns})")
        ids = {name: number for number, name in enumerate({row[0] for row in recorded(graph)}, 1)}
        base.executemany("INSERT INTO StringIds VALUES (?, ?)", [(number, name) for name, number in ids.items()])
        for place, (name, start, micros, launch) in enumerate(recorded(graph)):
            row = (int(start * 1e3), int((start + micros) * 1e3), ids[name], ids[name], launch, place)
            base.execute("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?, ?, ?)", row)
        base.commit()

"""Profiler traces made by hand, as torch's profiler and Nsight Systems write them."""

from __future__ import annotations

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

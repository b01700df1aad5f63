"""GPU kernels of a profiler's trace, laid upon the operations of a graph that launched them.

Reads the JSON of torch's profiler (plain or gzip) and the sqlite that `nsys export --type sqlite` makes. A range called
``graphprobe:NODE`` around an operation makes the mapping exact; without such ranges operations are paired with the
trace's own (``aten::linear``) by order and name, without those (a CUDA graph) with the kernels themselves, and every
line says that it is a guess.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphprobe.errors import RenderError
from graphprobe.records import GraphView, NodeView
from graphprobe.render.boxes import Overlay
from graphprobe.render.kernels import pair_by_name
from graphprobe.render.labels import clip
from graphprobe.render.numbers import count
from graphprobe.render.pairing import pair_from_the_end
from graphprobe.render.wiring import CALLS

PREFIX = "graphprobe:"
_LISTED = 3  # kernels written on a box
_WRAPPER = re.compile(r"(?:\w+_)?(elementwise|reduce|index)_kernel")
#: What torch's wrappers do to each element: 'MulFunctor<float>' in 'BinaryFunctor<...>', 'neg_kernel_cuda', 'MeanOps'.
_INNER = re.compile(
    r"\b(?!Binary|Unary|AUnary|BUnary|gpu_)(?:CUDA)?(\w*?)(?:Functor(?:OnSelf|OnOther)?(_\w+)?|Ops|_kernel(?:_cuda|_impl)?)\b"
)
_SQLITE = b"SQLite format 3\x00"


@dataclass(frozen=True)
class Launch:
    """One kernel and the host code that launched it."""

    kernel: str
    micros: float
    start: float
    ranges: tuple[tuple[str, float], ...]  # (name, start) of every host range around the launch, outermost first
    call: Any = None  # the host's call: one launches all kernels of a CUDA graph


@dataclass(frozen=True)
class Trace:
    """All launches, and all outermost operations of the host (`aten::linear`), each in time order."""

    launches: tuple[Launch, ...]
    operations: tuple[tuple[str, float], ...]  # (name, start)


@dataclass(frozen=True)
class _Range:
    name: str
    start: float
    end: float
    thread: Any


def overlay_trace(path: str | os.PathLike[str], graph: GraphView) -> Overlay:
    """Return the kernels of a trace as an overlay for pictures of `graph`. Raises RenderError."""
    trace = read_trace(path)
    found, exact = kernels_by_node(trace, graph)
    if not found:
        held = count(len(trace.launches), "kernel launch", "kernel launches")
        raise RenderError(
            f"{path} holds {held}, but none that an operation of this graph made: record the graph itself, on a GPU, "
            "with CUDA activity"
        )
    mark = "" if exact else "guess: "
    lines = {}
    for name, kernels in found.items():
        shown = set(sorted(range(len(kernels)), key=lambda i: -kernels[i].micros)[:_LISTED])
        words = [
            f"{mark}{clip(short_kernel(k.kernel), 26)} {k.micros:.1f} \u00b5s"
            for i, k in enumerate(kernels)
            if i in shown
        ]
        rest = [k for i, k in enumerate(kernels) if i not in shown]
        lines[name] = [*words, f"and {len(rest)} more, {_sum(rest):.1f} \u00b5s"] if rest else words
    placed = sum(len(kernels) for kernels in found.values())
    how = "by the ranges around the operations" if exact else f"of {len(trace.launches):,}: a guess, by order and name"
    title = f"GPU kernels of {Path(path).name}: {count(placed, 'launch', 'launches')} of its last run, {how}"
    return Overlay(lines, title=title, micros={name: _sum(kernels) for name, kernels in found.items()})


def kernels_by_node(trace: Trace, graph: GraphView) -> tuple[dict[str, list[Launch]], bool]:
    """Return the kernels of each operation's last run, and whether that is known (True) or guessed (False)."""
    exact: dict[str, dict[float, list[Launch]]] = {}
    for launch in trace.launches:
        named = [(name.removeprefix(PREFIX), start) for name, start in launch.ranges if name.startswith(PREFIX)]
        if named and named[-1][0] in graph.by_name:
            exact.setdefault(named[-1][0], {}).setdefault(named[-1][1], []).append(launch)
    if exact:
        return {name: runs[max(runs)] for name, runs in exact.items()}, True
    return _guess(trace, graph) or _by_name(trace, graph), False


def _by_name(trace: Trace, graph: GraphView) -> dict[str, list[Launch]]:
    """Pair operations with kernels of a run in which no host operation tells: one that was a CUDA graph."""
    launches = trace.launches
    replays = Counter(launch.call for launch in launches if launch.call is not None)
    if replays and max(replays.values()) > 1:
        # a replay launches many kernels at once; of the graphs the largest is the model, of its replays the last one
        last = max(replays, key=lambda call: (replays[call], _start(launches, call)))
        launches = tuple(launch for launch in launches if launch.call == last)
    paired = pair_by_name([launch.kernel for launch in launches], graph)
    return {name: [launches[place] for place in places] for name, places in paired.items()}


def _start(launches: Iterable[Launch], call: Any) -> float:
    return next(launch.start for launch in launches if launch.call == call)


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace file; times become microseconds. Raises RenderError."""
    file = Path(path)
    try:
        with file.open("rb") as opened:
            head = opened.read(16)
        if head == _SQLITE:
            return _from_sqlite(file)
        data = gzip.decompress(file.read_bytes()) if head[:2] == b"\x1f\x8b" else file.read_bytes()
        events = json.loads(data)
    except (OSError, ValueError, EOFError, sqlite3.Error) as error:
        raise RenderError(f"cannot read the trace {path}: {error}") from error
    events = events.get("traceEvents") if isinstance(events, dict) else events
    if not isinstance(events, list):
        raise RenderError(
            f"{path} is no profiler trace: it has no traceEvents; write one with profiler.export_chrome_trace"
        )
    return _from_events(events)


def short_kernel(name: str) -> str:
    """Return a kernel's bare name: 'softmax_warp' for 'void at::native::softmax_warp<float, 5>(float*)'.

    Many of torch's kernels are one wrapper around what is done to each element: 'elementwise mul'.
    """
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    text, depth = "", 0
    for char in name:
        depth -= char == ">"
        if depth == 0 and char != ">":
            text += char if char != "<" else ""
        depth += char == "<"
    bare = (text.split("(")[0].strip().split(" ")[-1].split("::")[-1]) or name
    wrapper = _WRAPPER.fullmatch(bare)
    inner = _INNER.search(name, name.index("<")) if wrapper and "<" in name else None
    return f"{wrapper[1]} {(inner[1] + (inner[2] or '')).strip('_').lower()}" if wrapper and inner else bare


def _from_events(events: list[Any]) -> Trace:
    spans = [e for e in events if isinstance(e, dict) and e.get("ph") == "X" and "ts" in e]
    ranges, calls = [], {}
    for event in spans:
        kind = str(event.get("cat", "")).lower()
        thread = (event.get("pid"), event.get("tid"))
        start = float(event["ts"])
        if kind in ("cpu_op", "user_annotation", "python_function"):
            ranges.append(_Range(str(event.get("name")), start, start + float(event.get("dur", 0)), thread))
        elif kind in ("cuda_runtime", "cuda_driver", "runtime", "driver"):
            calls[event.get("args", {}).get("correlation")] = (start, thread)
    kernels = [e for e in spans if str(e.get("cat", "")).lower() in ("kernel", "gpu_memcpy", "gpu_memset")]
    found = [
        Launch(str(event.get("name")), float(event.get("dur", 0)), float(event["ts"]), around, _correlation(event))
        for event, around in _around(kernels, calls, ranges, _correlation)
    ]
    return _trace(found, ranges)


def _correlation(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("correlation")


def _from_sqlite(file: Path) -> Trace:
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as base:
        words = dict(base.execute("SELECT id, value FROM StringIds"))
        tables = {name for (name,) in base.execute("SELECT name FROM sqlite_master")}
        calls = {}
        if "CUPTI_ACTIVITY_KIND_RUNTIME" in tables:
            rows = base.execute("SELECT correlationId, start, globalTid FROM CUPTI_ACTIVITY_KIND_RUNTIME")
            calls = {correlation: (start / 1e3, thread) for correlation, start, thread in rows}
        ranges = []
        if "NVTX_EVENTS" in tables:
            rows = base.execute("SELECT text, textId, start, end, globalTid FROM NVTX_EVENTS WHERE end IS NOT NULL")
            for text, key, start, end, thread in rows:
                # emit_nvtx writes 'aten::linear, seq = 3, op_id = 9'
                name = str(text if text is not None else words.get(key, "")).split(", ")[0]
                ranges.append(_Range(name, start / 1e3, end / 1e3, thread))
        query = "SELECT correlationId, demangledName, start, end FROM CUPTI_ACTIVITY_KIND_KERNEL"
        launched = base.execute(query).fetchall()
        for what in ("Memcpy", "Memset"):
            if f"CUPTI_ACTIVITY_KIND_{what.upper()}" in tables:
                query = f"SELECT correlationId, '{what}', start, end FROM CUPTI_ACTIVITY_KIND_{what.upper()}"
                launched += base.execute(query).fetchall()
        found = [
            Launch(str(words.get(row[1], row[1])), (row[3] - row[2]) / 1e3, row[2] / 1e3, around, row[0])
            for row, around in _around(launched, calls, ranges, lambda r: r[0])
        ]
    return _trace(found, ranges)


def _trace(launches: list[Launch], ranges: list[_Range]) -> Trace:
    operations, busy = [], dict[Any, float]()
    for span in sorted(ranges, key=lambda r: (r.start, -r.end)):
        if "::" in span.name and span.start >= busy.get(span.thread, -1.0):
            busy[span.thread] = span.end
            operations.append((span.name, span.start))
    return Trace(tuple(sorted(launches, key=lambda launch: launch.start)), tuple(operations))


def _around(
    kernels: Iterable[Any], calls: dict[Any, tuple[float, Any]], ranges: list[_Range], key: Any
) -> Iterator[tuple[Any, tuple[tuple[str, float], ...]]]:
    """Find the host ranges around each kernel's launch: one sweep over time for each thread."""
    wanted: dict[Any, list[tuple[float, Any]]] = {}
    for kernel in kernels:
        if key(kernel) in calls:
            when, thread = calls[key(kernel)]
            wanted.setdefault(thread, []).append((when, kernel))
        else:
            yield kernel, ()
    by_thread: dict[Any, list[_Range]] = {}
    for span in sorted(ranges, key=lambda r: (r.start, -r.end)):
        by_thread.setdefault(span.thread, []).append(span)
    for thread, launches in wanted.items():
        waiting = iter(by_thread.get(thread, ()))
        following = next(waiting, None)
        stack: list[_Range] = []
        for when, kernel in sorted(launches, key=lambda pair: pair[0]):
            while following is not None and following.start <= when:
                stack = [span for span in stack if span.end >= following.start]
                stack.append(following)
                following = next(waiting, None)
            stack = [span for span in stack if span.end >= when]
            yield kernel, tuple((span.name, span.start) for span in stack)


def _guess(trace: Trace, graph: GraphView) -> dict[str, list[Launch]]:
    """Pair operations with those of the trace, aligned from the end: what ran last is the last run."""
    calls: dict[tuple[str, float], list[Launch]] = {}
    for launch in trace.launches:
        outer = next((span for span in launch.ranges if "::" in span[0]), None)
        if outer is not None:
            calls.setdefault(outer, []).append(launch)
    wanted = [n for n in graph.nodes if n.op in CALLS]
    names = [name for name, _ in trace.operations]
    pairs = pair_from_the_end([_host_name(n) for n in wanted], names) if calls else []
    paired = [(wanted[at].name, trace.operations[place]) for at, place in pairs]
    return {name: calls[operation] for name, operation in paired if operation in calls}


def _host_name(node: NodeView) -> str:
    parts = node.target.split(".")
    return "::".join(parts[:2]) if len(parts) > 1 else node.target


def _sum(kernels: Iterable[Launch]) -> float:
    return sum(kernel.micros for kernel in kernels)

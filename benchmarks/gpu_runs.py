"""What taps, lanes and a whole `diff` cost at one length of the prompt; parts of ``gpu.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import Row, attempt, attempt_in_turns, best, extra_memory, product_rate

import graphprobe
from graphprobe import devices
from graphprobe.lanes import timing


def measure_taps(row: Row, model: torch.nn.Module, before: torch.fx.GraphModule, kwargs: Row) -> None:
    """Graphs with and without taps, each in turns with the others; recorded, and as Python launches them."""
    probe = graphprobe.instrument(before)
    checked = graphprobe.instrument(before, checksum=True)
    eager: dict[str, Callable[[], object]] = {
        "eager": lambda: model(**kwargs),
        "graph": lambda: before(**kwargs),
        "taps": lambda: probe(**kwargs),
        "checksums": lambda: checked(**kwargs),
        "read_taps": lambda: (probe.graph(**kwargs), probe.taps),
    }
    attempt_in_turns(row, eager)
    recorded: dict[str, Callable[[], object]] = {
        "graph_recorded": devices.recorded(lambda: before(**kwargs)),
        "taps_recorded": devices.recorded(lambda: probe.graph(**kwargs)),
        "checksums_recorded": devices.recorded(lambda: checked.graph(**kwargs)),
    }
    attempt_in_turns(row, recorded)
    row["tap_count"] = sum(not tap.derived for tap in probe.taps)
    row["tap_gb"] = round(sum(_bytes(tap) for tap in probe.taps if not tap.derived) / 1e9, 3)


def _bytes(tap: graphprobe.Tap) -> int:
    count = 1
    for size in tap.shape:
        count *= size
    return count * getattr(torch, tap.dtype).itemsize


def measure_lanes(row: Row, before: torch.fx.GraphModule, kwargs: Row, modes: list[str]) -> None:
    """Lanes of a graph against itself.

    "lockstep" is both graphs, compared at every cut, "details" in every detail; "native" has the forced lane, too, as
    where every region of the two differs; "auto" is what `diff` runs; "always" all five lanes everywhere. A device that
    has been at work for a while is slower: the rate of float64 products is measured again right after these.
    """
    settings: dict[str, Row] = {
        "lockstep": {"exact": "never"},
        "details": {"exact": "never", "detailed": True},
        "native": {"exact": "never", "forced": "always"},
        "auto": {"exact": "auto"},
    }
    for mode in modes:
        measure_mode(row, before, before, kwargs, mode, settings.get(mode, {"exact": mode, "forced": "always"}))
        if mode == "always":
            attempt(row, "float64_tflop_per_s_right_after", lambda: product_rate(torch.float64))


def measure_mode(
    row: Row, before: torch.fx.GraphModule, after: torch.fx.GraphModule, kwargs: Row, mode: str, options: Row
) -> None:
    lanes = timing.lanes(before, after, (), kwargs, **options)
    attempt(row, f"lanes_{mode}", lambda: best(lanes))
    attempt(row, f"lanes_{mode}_extra_gb", lambda: extra_memory(lanes))
    if row["tokens"] < 2048 or mode in ("lockstep", "details", "native"):
        recorded = timing.lanes(before, after, (), kwargs, **options, recorded=True)
        attempt(row, f"lanes_{mode}_recorded", lambda: best(recorded))


def measure_changed(row: Row, model: Any, before: torch.fx.GraphModule, kwargs: Row) -> None:
    """What `diff` runs where the attention of one layer has another scale."""
    attention = model.model.layers[len(model.model.layers) // 2].self_attn
    kept = attention.scaling
    attention.scaling *= 1.01
    try:
        after = graphprobe.capture(model, (), kwargs)
    finally:
        attention.scaling = kept
    lanes = timing.lanes(before, after, (), kwargs)
    attempt(row, "lanes_changed", lambda: best(lanes))


def measure_diff(row: Row, before: torch.fx.GraphModule, kwargs: Row) -> None:
    def run() -> str:
        start = time.perf_counter()
        report = graphprobe.diff(before, before, (), kwargs)
        row["diff_s"] = round(time.perf_counter() - start, 2)
        return report.verdict

    attempt(row, "diff_verdict", run)


def profile(row: Row, before: torch.fx.GraphModule, kwargs: Row) -> None:
    """Note where the time of the lanes goes: milliseconds and launches of the kernels that take most of it."""
    from torch.profiler import ProfilerActivity

    for mode in ("never", "always"):
        lanes = timing.lanes(before, before, (), kwargs, exact=mode, forced="always")
        lanes()
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
            lanes()
            torch.cuda.synchronize()
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:40]
        row[f"kernels_{mode}"] = {
            event.key[:110]: [round(event.self_device_time_total / 1e3, 2), event.count] for event in events
        }
        print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=28, max_name_column_width=90))

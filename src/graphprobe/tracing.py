"""Run a graph under torch's profiler with a range around every operation, so that each kernel is known to its node."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from graphprobe import placing
from graphprobe.capturing import quiet
from graphprobe.errors import InputError
from graphprobe.render.trace import PREFIX


def _enter(name: str) -> Any:
    opened = torch.profiler.record_function(name)
    opened.__enter__()  # type: ignore[no-untyped-call]
    return opened


def _leave(opened: Any) -> None:
    opened.__exit__(None, None, None)


def with_ranges(gm: GraphModule) -> GraphModule:
    """Return a copy of the graph, with the same weights, that runs each operation in a profiler range of its name."""
    with quiet():
        graph = copy.deepcopy(gm.graph)
    for node in list(graph.nodes):
        if not node.op.startswith("call_"):
            continue
        with graph.inserting_before(node):
            opened = graph.call_function(_enter, (PREFIX + node.name,))
        with graph.inserting_after(node):
            graph.call_function(_leave, (opened,))
    ranged = GraphModule(gm, graph)
    ranged.train(gm.training)
    return ranged


def record_trace(
    gm: GraphModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    warm_up: int = 2,
) -> None:
    """Run a graph on its GPU and write torch's profiler trace of the last run as JSON.

    Each operation lies in a range ``graphprobe:NODE``; under ``torch.autograd.profiler.emit_nvtx`` Nsight Systems sees
    the same ranges. `warm_up` runs go before, for kernels are loaded and tuned at their first launch. Raises InputError
    where there is no GPU: a CPU launches no kernels.
    """
    if not torch.cuda.is_available():
        raise InputError("there is no GPU here, so no kernels to record: give a trace that was made where one is")
    ranged = with_ranges(gm)
    with torch.no_grad():
        for _ in range(warm_up):
            ranged(*args, **kwargs)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            ranged(*args, **kwargs)
            torch.cuda.synchronize()
    target = Path(path)
    written = placing.beside(target)  # its suffix is the target's: .gz is compressed
    try:
        profiler.export_chrome_trace(str(written))
        placing.put(written, target)
    finally:
        written.unlink(missing_ok=True)

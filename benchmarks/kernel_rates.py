"""How near to the memory's speed the fused kernels run, for several ways to cut the work. Prints TB/s of bytes read.

    python benchmarks/kernel_rates.py

Launches are recorded in a CUDA graph and go over eight sets of tensors in turn, which the cache does not hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from graphprobe import launches
from graphprobe.lanes import measure
from graphprobe.lanes.fused import launching
from graphprobe.taps import columns, triton_stats

SETS = 8


def rate(run: Callable[[int], object], gigabytes: float) -> float:
    """Return TB/s of one launch."""
    for index in range(SETS):
        run(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(SETS):
            run(index)
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / SETS)
    return round(gigabytes / min(times), 2)


def gigabytes(*tensors: torch.Tensor) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 1e9


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def compare_cuts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Print the rates of one kind of value."""
    device = torch.device("cuda")
    partials = launching.new_partials(device)
    native = [[drawn(shape, dtype) for _ in range(3)] for _ in range(SETS)]
    exact = [[b, r, b.double(), r.double()] for b, _, r in native]
    bounds = measure.sentinel_bounds(dtype, dtype)
    three, four = gigabytes(*native[0]), gigabytes(*exact[0])

    def one_tap(stats: torch.Tensor) -> float:
        return rate(lambda i: triton_stats.write_row(native[i][0], stats, i), three / 3)

    for rows, warps, programs in itertools.product((256, 512, 1024), (4, 8), (264, 528)):
        triton_stats._ROWS, triton_stats._WARPS = rows, warps
        launching._ROWS, launching._WARPS, launching._PROGRAMS = rows, warps, programs
        triton_stats._LAUNCHES, launching._LAUNCHES = launches.Launches(), launches.Launches()
        tap = one_tap(torch.zeros(SETS, programs, columns.COLUMNS, dtype=torch.float64, device=device))
        pairs = rate(lambda i: launching.compare_native(partials, i, *native[i], None, bounds), three)
        print(f"  rows {rows} warps {warps} programs {programs}: statistics {tap}, native {pairs}", flush=True)
    for tile, height, programs in itertools.product((256, 512, 1024), (2, 4, 8), (264, 528, 1024)):
        launching._LAUNCHES = launches.Launches()
        launching._TILE, launching._HEIGHT, launching._EXACT_PROGRAMS = tile, height, programs
        found = rate(lambda i: launching.compare_exact(partials, i, *exact[i], None, bounds), four)
        print(f"  tile {tile} height {height} programs {programs}: exact {found}", flush=True)


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    for shape, dtype in (
        ((2048, 4096), torch.bfloat16),
        ((2048, 4096), torch.float32),
        ((2048, 14336), torch.bfloat16),
    ):
        print(shape, dtype, flush=True)
        compare_cuts(shape, dtype)


if __name__ == "__main__":
    main()

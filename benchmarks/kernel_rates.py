"""How near to the memory's speed the fused kernels run, for several ways to cut the work. Prints TB/s of bytes read.

    python benchmarks/kernel_rates.py [--native] [--rows 256,512] [--warps 4,8] [--stages 1,2] ...

First it prints whether taps on a stream of their own hide behind matrix products. Launches are recorded in a CUDA graph
and go over eight sets of tensors in turn, which the cache does not hold.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch

from graphprobe import launches
from graphprobe.lanes import elements
from graphprobe.lanes.fused import detailing, launching
from graphprobe.taps import columns, triton_stats

SETS = 8


def rate(run: Callable[[int], object], gigabytes: float) -> float:
    """Return TB/s of one launch."""
    return round(gigabytes / duration(run), 2)


def duration(run: Callable[[int], object]) -> float:
    """Return ms of one launch."""
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
    return min(times)


def gigabytes(*tensors: torch.Tensor) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 1e9


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def compare_cuts(shape: tuple[int, ...], dtype: torch.dtype, options: argparse.Namespace) -> None:
    """Print the rates of one kind of value."""
    device = torch.device("cuda")
    partials = launching.new_partials(device)
    native = [[drawn(shape, dtype) for _ in range(3)] for _ in range(SETS)]
    exact = [[b, r, b.double(), r.double()] for b, _, r in native]
    bounds = elements.sentinel_bounds(dtype, dtype)
    three, four = gigabytes(*native[0]), gigabytes(*exact[0])

    def one_tap(stats: torch.Tensor) -> float:
        return rate(lambda i: triton_stats.write_row(native[i][0], stats, i), three / 3)

    for rows, warps, stages, programs in itertools.product(
        options.rows, options.warps, options.stages, options.programs
    ):
        launching._STAGES = stages
        triton_stats._ROWS, triton_stats._WARPS = rows, warps
        launching._ROWS, launching._WARPS, launching._PROGRAMS = rows, warps, programs
        triton_stats._LAUNCHES, launching._LAUNCHES = launches.Launches(), launches.Launches()
        tap = one_tap(torch.zeros(SETS, programs, columns.COLUMNS, dtype=torch.float64, device=device))
        found = rate(lambda i: launching.compare_native(partials, i, *native[i], None, bounds), three)
        pair = rate(lambda i: launching.compare_native(partials, i, *native[i][:2], None, None, bounds), three * 2 / 3)
        cut = f"rows {rows} warps {warps} stages {stages} programs {programs}"
        print(f"  {cut}: statistics {tap}, three tensors {found}, two {pair}", flush=True)
    if options.native:
        return
    for warps, tile, height, stages, programs in itertools.product(
        (1, 2, 4), (256, 512), (1, 2, 4), options.stages, (528, 1024)
    ):
        launching._EXACT_STAGES, launching._EXACT_WARPS = stages, warps
        launching._LAUNCHES = launches.Launches()
        launching._TILE, launching._HEIGHT, launching._EXACT_PROGRAMS = tile, height, programs
        found = rate(lambda i: launching.compare_exact(partials, i, *exact[i], None, bounds), four)
        cut = f"warps {warps} tile {tile} height {height} stages {stages} programs {programs}"
        print(f"  {cut}: exact {found}", flush=True)
    partials = detailing.new_partials(device)
    for warps, tile, height, programs in itertools.product((1, 2, 4), (256, 512), (2, 4), (528, 1000)):
        detailing._LAUNCHES = launches.Launches()
        detailing._WARPS, detailing._TILE, detailing._HEIGHT, detailing._PROGRAMS = warps, tile, height, programs
        found = rate(lambda i: detailing.compare(partials, i, *native[i][:2], None, bounds), three * 2 / 3)
        print(f"  warps {warps} tile {tile} height {height} programs {programs}: details {found}", flush=True)


def overlap() -> None:
    """Print ms of sixteen products, each followed by a tap: without taps, on one stream, and on two."""
    device, count = torch.device("cuda"), 16
    x, w = drawn((2048, 4096), torch.bfloat16), drawn((14336, 4096), torch.bfloat16)
    stats = torch.zeros(count, 264, columns.COLUMNS, dtype=torch.float64, device=device)
    outs = [torch.empty(2048, 14336, dtype=torch.bfloat16, device=device) for _ in range(2)]
    side = torch.cuda.Stream()

    def products(how: str) -> None:
        main, read = torch.cuda.current_stream(), [None, None]
        for index in range(count):
            y, turn = outs[index % 2], index % 2
            if read[turn] is not None:  # nobody may write what is still being read
                main.wait_event(read[turn])
            torch.mm(x, w.t(), out=y)
            if how == "one stream":
                triton_stats.write_row(y, stats, index)
            elif how == "two streams":
                made = main.record_event()
                with torch.cuda.stream(side):
                    side.wait_event(made)
                    triton_stats.write_row(y, stats, index)
                    read[turn] = side.record_event()
        if how == "two streams":
            main.wait_stream(side)

    for how in ("no taps", "one stream", "two streams"):
        print(f"  {how}: {duration(lambda _: products(how)):.3f} ms", flush=True)  # noqa: B023


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", action="store_true", help="leave the comparisons of exact lanes and in detail out")
    parser.add_argument("--rows", type=numbers, default=[256, 512, 1024])
    parser.add_argument("--warps", type=numbers, default=[4, 8])
    parser.add_argument("--stages", type=numbers, default=[1, 2, 3])
    parser.add_argument("--programs", type=numbers, default=[264, 528])
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    overlap()
    for shape, dtype in (
        ((2048, 4096), torch.bfloat16),
        ((2048, 4096), torch.float32),
        ((2048, 14336), torch.bfloat16),
    ):
        print(shape, dtype, flush=True)
        compare_cuts(shape, dtype, options)


if __name__ == "__main__":
    main()

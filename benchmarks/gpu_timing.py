"""What the parts of ``gpu.py`` measure with: the model, times, memory, and what the device and the host can do."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from graphprobe.lanes import exact

Row = dict[str, Any]


def model_of(layers: int, hidden: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers, use_cache=False,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 512, vocab_size=128256,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def best(run: Callable[[], object], repeat: int = 5) -> float:
    """Return the least time in ms; the garbage collector rests, as in `timeit`."""
    return in_turns({"": run}, 1, repeat)[""]


def in_turns(runs: dict[str, Callable[[], object]], rounds: int = 4, repeat: int = 3) -> dict[str, float]:
    """Return the least time of each in ms. In every round each runs often enough to be in its own steady state.

    What disturbs the machine then disturbs all of them; and none profits from a device that the one before it left
    cool, for a GPU at its power limit is faster after a rest.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in runs.items():
                run()
                for _ in range(repeat):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    run()
                    torch.cuda.synchronize()
                    times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return {name: round(min(found) * 1e3, 3) for name, found in times.items()}


def extra_memory(run: Callable[[], object]) -> float:
    """Return the peak in GB over what is allocated now."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - base) / 1e9, 3)


def attempt(row: Row, name: str, run: Callable[[], object]) -> None:
    """Note a figure, or why there is none; one failure must not cost the others."""
    try:
        row[name] = run()
    except Exception as error:
        row[name] = f"failed: {type(error).__name__}: {str(error)[:200]}"
        traceback.print_exc()
    gc.collect()
    torch.cuda.empty_cache()
    print(f"  {name}: {row[name]}", flush=True)


def attempt_in_turns(row: Row, runs: dict[str, Callable[[], object]]) -> None:
    """Note figures that are set against each other, or why there are none."""
    found: Row = {}
    attempt(found, ", ".join(runs), lambda: in_turns(runs))
    figures = next(iter(found.values()))
    for name in runs:
        row[name] = figures[name] if isinstance(figures, dict) else figures


def copy_rate() -> float:
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return round(2 * source.numel() / best(lambda: target.copy_(source)) / 1e9, 3)


def product_rate(dtype: torch.dtype, rows: int = 2048) -> float:
    """Return TFLOP/s of a matrix product of the shape that the model has most of."""
    x = torch.randn(rows, 4096, dtype=torch.float32, device="cuda").to(dtype)
    w = torch.randn(14336, 4096, dtype=torch.float32, device="cuda").to(dtype)
    return round(2 * rows * 4096 * 14336 / best(lambda: torch.nn.functional.linear(x, w)) / 1e9, 1)


def rates() -> Row:
    """Measure what the device can do: copies (bytes read and written), and float64 and bf16 matrix products."""
    row: Row = {"copy_tb_per_s": copy_rate(), "float64_tflop_per_s": product_rate(torch.float64)}
    row["bfloat16_tflop_per_s"] = product_rate(torch.bfloat16, 8192)
    print(row, flush=True)
    return row


def host_costs() -> Row:
    """Measure what the host pays for one launch, in microseconds: values are so small that the device never waits."""
    from graphprobe.lanes import elements
    from graphprobe.lanes import measure as lanes_measure
    from graphprobe.taps import columns, operators

    device = torch.device("cuda")
    x, y, z = (torch.randn(16, 64, device=device).to(torch.bfloat16) for _ in range(3))
    stats, (slots, partials) = columns.new_stats(64, device), lanes_measure.buffers(64, device)
    bounds = elements.sentinel_bounds(x.dtype, y.dtype)
    runs: dict[str, Callable[[], object]] = {
        "operation": lambda: torch.add(x, y),
        "tap": lambda: operators.TAP(x, stats, 3),
        "tap_of_32": lambda: operators.TAP_SEVERAL([x] * 32, stats, list(range(32))),
        "comparison": lambda: lanes_measure.native(slots, partials, 3, x, y, z, None, bounds),
        "lift": lambda: exact.lift(x),
    }
    row = {}
    for name, run in runs.items():
        row[f"host_us_{name}"] = round(best(lambda: [run() for _ in range(300)]) * 1e3 / 300, 2)  # noqa: B023
    print(row, flush=True)
    return row

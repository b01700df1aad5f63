"""Everything that graphprobe promises about speed on a GPU, side by side in one run. Prints ratios, writes JSON.

    python benchmarks/gpu.py [--layers 32] [--tokens 16,512,2048] [--out FILE]
                             [--parts taps,lanes,peers,diff,backend,large]

A Llama-8B-shaped model with random bf16 weights. Times are the least of several, synchronised, in milliseconds; memory
is the peak of the allocator over what was allocated before the run, in GB. "recorded" is a replay of a CUDA graph.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import pathlib
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import gpu_large
import torch

import graphprobe
from graphprobe import backend, devices
from graphprobe.lanes import exact, timing

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
    """Return the least time in ms."""
    run()
    times = []
    for _ in range(repeat):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return round(min(times) * 1e3, 3)


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


def copy_rate() -> float:
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return round(2 * source.numel() / best(lambda: target.copy_(source)) / 1e9, 3)


def rates() -> Row:
    """Measure what the device can do: copies (bytes read and written), and float64 and bf16 matrix products."""
    row: Row = {"copy_tb_per_s": copy_rate()}
    for name, dtype, rows in (("float64", torch.float64, 2048), ("bfloat16", torch.bfloat16, 8192)):
        x = torch.randn(rows, 4096, dtype=torch.float32, device="cuda").to(dtype)
        w = torch.randn(14336, 4096, dtype=torch.float32, device="cuda").to(dtype)
        time_ms = best(lambda: torch.nn.functional.linear(x, w))  # noqa: B023
        row[f"{name}_tflop_per_s"] = round(2 * rows * 4096 * 14336 / time_ms / 1e9, 1)
    print(row, flush=True)
    return row


def host_costs() -> Row:
    """Measure what the host pays for one launch, in microseconds: values are so small that the device never waits."""
    from graphprobe.lanes import measure as lanes_measure
    from graphprobe.taps import columns, operators

    device = torch.device("cuda")
    x, y, z = (torch.randn(16, 64, device=device).to(torch.bfloat16) for _ in range(3))
    stats, (slots, partials) = columns.new_stats(64, device), lanes_measure.buffers(64, device)
    bounds = lanes_measure.sentinel_bounds(x.dtype, y.dtype)
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


def measure_taps(row: Row, model: torch.nn.Module, before: torch.fx.GraphModule, kwargs: Row) -> None:
    attempt(row, "eager", lambda: best(lambda: model(**kwargs)))
    attempt(row, "graph", lambda: best(lambda: before(**kwargs)))
    attempt(row, "graph_recorded", lambda: best(devices.recorded(lambda: before(**kwargs))))
    probe = graphprobe.instrument(before)
    attempt(row, "taps", lambda: best(lambda: probe(**kwargs)))
    attempt(row, "taps_recorded", lambda: best(devices.recorded(lambda: probe.graph(**kwargs))))
    attempt(row, "read_taps", lambda: best(lambda: probe.graph(**kwargs) is probe.taps))
    checked = graphprobe.instrument(before, checksum=True)
    attempt(row, "checksums", lambda: best(lambda: checked(**kwargs)))
    attempt(row, "checksums_recorded", lambda: best(devices.recorded(lambda: checked.graph(**kwargs))))
    row["tap_count"] = sum(not tap.derived for tap in probe.taps)
    row["tap_gb"] = round(sum(_bytes(tap) for tap in probe.taps if not tap.derived) / 1e9, 3)


def _bytes(tap: graphprobe.Tap) -> int:
    count = 1
    for size in tap.shape:
        count *= size
    return count * getattr(torch, tap.dtype).itemsize


def measure_lanes(row: Row, before: torch.fx.GraphModule, kwargs: Row, modes: list[str]) -> None:
    """Lanes of a graph against itself.

    "lockstep" is both graphs, compared at every cut; "native" has the forced lane, too, as where every region of the
    two differs; "auto" is what `diff` runs; "always" all five lanes everywhere.
    """
    settings = {"lockstep": ("never", "auto"), "native": ("never", "always"), "auto": ("auto", "auto")}
    for mode in modes:
        exact, forced = settings.get(mode, (mode, "always"))
        measure_mode(row, timing.lanes(before, before, (), kwargs, exact=exact, forced=forced), mode)


def measure_mode(row: Row, lanes: Callable[[], torch.Tensor], mode: str) -> None:
    attempt(row, f"lanes_{mode}", lambda: best(lanes))
    attempt(row, f"lanes_{mode}_extra_gb", lambda: extra_memory(lanes))
    if row["tokens"] < 2048 or mode in ("lockstep", "native"):
        attempt(row, f"lanes_{mode}_recorded", lambda: best(devices.recorded(lanes)))


class FiveReductions:
    """What people do by hand: forward hooks that read each module's output with five torch reductions."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.found: list[torch.Tensor] = []
        self.handles = [module.register_forward_hook(self.observe) for module in model.modules()]

    def observe(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            x = output.float()
            self.found.append(torch.stack([x.min(), x.max(), x.mean(), x.norm(), (~x.isfinite()).sum().float()]))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class Dumping(torch.fx.Interpreter):
    """Copies every value to the host."""

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, torch.Tensor):
            value.cpu()
        return value


def measure_peers(row: Row, model: torch.nn.Module, before: torch.fx.GraphModule, kwargs: Row) -> None:
    def hooks() -> float:
        observer = FiveReductions(model)
        try:
            return best(lambda: (observer.found.clear(), model(**kwargs)), 3)
        finally:
            observer.remove()

    def debug_mode() -> float:
        from torch.utils._debug_mode import DebugMode

        def run() -> None:
            with DebugMode() as mode, DebugMode.log_tensor_hashes():
                model(**kwargs)
            del mode

        return best(run, 2)

    attempt(row, "peer_hooks_on_modules", hooks)
    attempt(row, "peer_debug_mode_hashes", debug_mode)
    flat = [kwargs["input_ids"], kwargs["attention_mask"], False]
    attempt(row, "peer_interpreter_to_host", lambda: best(lambda: Dumping(before).run(*flat), 1))


def measure_backend(result: Row, hidden: int) -> None:
    """Generate words with and without taps on what Dynamo captures; a model of four layers."""
    model = model_of(4, hidden)
    ids = torch.randint(0, 1000, (1, 32), device="cuda")
    options: Row = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False, "use_cache": True}
    row: Row = {"layers": 4, "new_tokens": 16}
    result["backend"] = row
    forward = model.forward
    attempt(row, "generate", lambda: best(lambda: model.generate(ids, **options), 3))
    model.forward = torch.compile(forward, backend="eager")  # traced, a model may mask otherwise, and round otherwise
    attempt(row, "generate_traced", lambda: best(lambda: model.generate(ids, **options), 3))
    wanted = model.generate(ids, **options)
    torch.compiler.reset()
    recorder = backend.Recorder()
    model.forward = torch.compile(forward, backend=recorder)
    attempt(row, "generate_tapped", lambda: best(lambda: model.generate(ids, **options), 3))
    attempt(row, "same_words", lambda: bool(torch.equal(wanted, model.generate(ids, **options))))
    row["graphs"], row["taps"] = len(recorder.graphs), sum(not tap.derived for tap in recorder.taps)
    row["nonfinite"] = sum(tap.nan + tap.inf for tap in recorder.taps)
    model.forward = torch.compile(forward, backend="graphprobe")
    torch.compiler.reset()
    attempt(row, "same_words_by_name", lambda: bool(torch.equal(wanted, model.generate(ids, **options))))
    row["taps_by_name"] = sum(not tap.derived for tap in backend.default.taps)
    print(row, flush=True)


def measure_diff(row: Row, before: torch.fx.GraphModule, kwargs: Row) -> None:
    def run() -> str:
        start = time.perf_counter()
        report = graphprobe.diff(before, before, (), kwargs)
        row["diff_s"] = round(time.perf_counter() - start, 2)
        return report.verdict

    attempt(row, "diff_verdict", run)


def ratios(row: Row) -> Row:
    """Set the figures against what they are promised to be near to."""
    base = row.get("graph_recorded")
    pairs = {
        "taps_recorded / graph_recorded": ("taps_recorded", base),
        "taps / graph": ("taps", row.get("graph")),
        "checksums_recorded / graph_recorded": ("checksums_recorded", base),
        "checksums / graph": ("checksums", row.get("graph")),
        "lanes_lockstep_recorded / 2 graph_recorded": ("lanes_lockstep_recorded", _times(2, base)),
        "lanes_lockstep / 2 graph": ("lanes_lockstep", _times(2, row.get("graph"))),
        "lanes_native_recorded / 3 graph_recorded": ("lanes_native_recorded", _times(3, base)),
        "lanes_native / 3 graph": ("lanes_native", _times(3, row.get("graph"))),
        "lanes_auto / graph": ("lanes_auto", row.get("graph")),
        "lanes_always / (3 graph_recorded + float64 products)": ("lanes_always", _floor(row, base)),
        "lanes_always / (the same without attention's products)": ("lanes_always", _floor(row, base, attention=False)),
    }
    return {
        name: round(row[figure] / bottom, 3)
        for name, (figure, bottom) in pairs.items()
        if isinstance(row.get(figure), float) and isinstance(bottom, float)
    }


def _times(factor: int, figure: Any) -> Any:
    return factor * figure if isinstance(figure, float) else None


def _floor(row: Row, base: Any, attention: bool = True) -> Any:
    if not isinstance(base, float):
        return None
    flop = row["linear_flop"] + attention * row["attention_flop"]
    products = round(2 * flop / row["float64_tflop_per_s"] / 1e9, 1)
    row["float64_products" if attention else "float64_products_of_linears"] = products
    return 3 * base + products


def measure(model: torch.nn.Module, tokens: int, parts: list[str], modes: list[str], device: Row) -> Row:
    ids = torch.randint(0, 1000, (1, tokens), device="cuda")
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    before = graphprobe.capture(model, (), kwargs)
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in n)
    config: Any = model.config
    attention = 4 * tokens**2 * config.hidden_size * config.num_hidden_layers  # scores and their products with values
    row: Row = {"tokens": tokens, "linear_flop": 2 * weights * tokens, "attention_flop": attention, **device}
    row["operations"] = sum(n.op == "call_function" for n in before.graph.nodes)
    if "taps" in parts:
        measure_taps(row, model, before, kwargs)
    if "lanes" in parts:
        measure_lanes(row, before, kwargs, modes)
    if "peers" in parts:
        measure_peers(row, model, before, kwargs)
    if "diff" in parts:
        measure_diff(row, before, kwargs)
    if "profile" in parts:
        profile(row, before, kwargs)
    row["ratios"] = ratios(row)
    print(json.dumps(row["ratios"], indent=1), flush=True)
    return row


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


def measure_large(result: Row, options: argparse.Namespace) -> None:
    """Measure the model that no GPU holds, or that a small one holds; figures are saved as they come."""
    for name in options.large.split(","):
        row: Row = {}
        result[f"large_{name}"] = row

        def run() -> str:
            gpu_large.measure(row, 2048, name, options.files, options.changed, lambda: save(result, options.out))  # noqa: B023
            return "done"

        attempt(result, f"large_{name}_state", run)
        save(result, options.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tokens", default="16,512,2048")
    parser.add_argument("--parts", default="taps,lanes,peers,diff,backend")
    parser.add_argument("--exact", default="lockstep,native,auto,always")
    parser.add_argument("--large", default="70B", help="shapes of the part large: 70B, and 7B within 24 GB")
    parser.add_argument("--files", type=int, default=4, help="layers of the large model that have files of their own")
    parser.add_argument("--changed", action="store_true", help="compare the large model with one changed layer, too")
    parser.add_argument("--out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    result: Row = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version(),
        "cuda": torch.version.cuda, "layers": options.layers, "hidden": options.hidden,
        "date": datetime.date.today().isoformat(), "script": "benchmarks/gpu.py",
    }  # fmt: skip
    print(result, flush=True)
    parts = options.parts.split(",")
    if "large" in parts:
        measure_large(result, options)
    if parts == ["large"]:
        return 0
    with torch.no_grad():
        device = {**rates(), **host_costs()}
        model = model_of(options.layers, options.hidden)
        rows = result["rows"] = []
        for tokens in map(int, options.tokens.split(",")):
            print(f"{tokens} tokens", flush=True)
            rows.append(measure(model, tokens, parts, options.exact.split(","), device))
            save(result, options.out)
        del model
        if "backend" in parts:
            gc.collect()
            torch.cuda.empty_cache()
            measure_backend(result, options.hidden)
            save(result, options.out)
    return 0


def save(result: Row, path: str | None) -> None:
    if path:
        pathlib.Path(path).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

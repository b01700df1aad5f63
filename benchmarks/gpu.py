"""Everything that graphprobe promises about speed on a GPU, side by side in one run. Prints ratios, writes JSON.

    python benchmarks/gpu.py [--layers 32] [--tokens 16,512,2048] [--out FILE]

A Llama-8B-shaped model with random bf16 weights. Times are the least of several, synchronised; memory is the peak of
the allocator over what the weights hold.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import pathlib
import sys
import time
import traceback
import warnings
from collections.abc import Callable

import torch

import graphprobe


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
    return min(times) * 1e3


def extra_gb(run: Callable[[], object]) -> float:
    """Return the peak in GB over what is allocated now."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - base) / 1e9, 2)


def captured_replay(run: Callable[[], object]) -> Callable[[], None]:
    """Capture a callable into a CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def attempt(row: dict[str, object], name: str, run: Callable[[], object]) -> None:
    """Note a figure, or why there is none; one failure must not cost the others."""
    try:
        row[name] = run()
    except Exception as error:
        row[name] = f"failed: {type(error).__name__}: {str(error)[:200]}"
        traceback.print_exc()
    gc.collect()
    torch.cuda.empty_cache()
    print(f"  {name}: {row[name]}", flush=True)


def measure(model: torch.nn.Module, tokens: int) -> dict[str, object]:
    from graphprobe.lanes import timing

    row: dict[str, object] = {"tokens": tokens}
    ids = torch.randint(0, 1000, (1, tokens), device="cuda")
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    before = graphprobe.capture(model, (), kwargs)
    row["operations"] = sum(n.op == "call_function" for n in before.graph.nodes)
    attempt(row, "eager_ms", lambda: best(lambda: model(**kwargs)))
    attempt(row, "graph_ms", lambda: best(lambda: before(**kwargs)))
    attempt(row, "graph_cudagraph_ms", lambda: best(captured_replay(lambda: before(**kwargs))))
    probe = graphprobe.instrument(before)
    attempt(row, "taps_ms", lambda: best(lambda: probe(**kwargs)))
    attempt(row, "taps_cudagraph_ms", lambda: best(captured_replay(lambda: probe.graph(**kwargs))))
    attempt(row, "taps", lambda: sum(not tap.derived for tap in probe.taps))
    for exact in ("never", "auto", "always"):
        attempt(row, f"lanes_{exact}_ms", lambda e=exact: best(timing.lanes(before, before, (), kwargs, exact=e), 3))
        attempt(
            row, f"lanes_{exact}_extra_gb", lambda e=exact: extra_gb(timing.lanes(before, before, (), kwargs, exact=e))
        )
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tokens", default="16,512,2048")
    parser.add_argument("--out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "layers": options.layers,
        "hidden": options.hidden, "date": datetime.date.today().isoformat(), "script": "benchmarks/gpu.py",
    }  # fmt: skip
    print(result, flush=True)
    with torch.no_grad():
        model = model_of(options.layers, options.hidden)
        rows = []
        for tokens in map(int, options.tokens.split(",")):
            print(f"{tokens} tokens", flush=True)
            rows.append(measure(model, tokens))
    result["rows"] = rows
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What do taps cost? Runs a model with and without them in turns, and prints the ratios measured in the same minutes.

    python benchmarks/taps.py [--model DIR] [--dtype float32] [--tokens 128] [--device cuda] [--json]

Without --model a random SmolLM2-135M-shaped model is used. Every variant runs once per round; of all rounds the fastest
counts, and the lower quartile stands beside it. "graph" is the captured graph; "taps" the same with all taps; "noop"
with taps that read nothing, which is the price of calling them; "probe" adds what `Probe` does around a run;
"checksums" has one in every row; "five reductions" is the obvious way, an interpreter that takes min, max, mean, norm
and a count of odd values one by one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Interpreter, Node

import graphprobe
from graphprobe.taps import instrument_graph, operators


def load(options: argparse.Namespace) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    dtype = getattr(torch, options.dtype)
    if options.model:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = LlamaConfig(**sizes, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval().to(dtype)


class FiveReductions(Interpreter):
    """Reads every floating value with one torch reduction per number."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point():
            norm = torch.linalg.vector_norm(value)
            for number in (value.min(), value.max(), value.mean(), norm, (~value.isfinite()).sum()):
                number.item()
        return value


def in_turns(variants: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Run all variants once per round; returns their sorted times in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: sorted(found) for name, found in times.items()}


def without_reading(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return an instrumented graph whose taps are called and read nothing."""
    out = torch.fx.GraphModule(graph, graph.graph)
    for node in list(out.graph.nodes):
        if node.target is operators.TAP:
            node.target = torch.ops.graphprobe_benchmarks.nothing.default
    out.recompile()
    return out


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model = load(options).to(options.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 49152, (1, options.tokens), generator=generator).to(options.device)
    kwargs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    captured = graphprobe.capture(model, (), kwargs)
    probe = graphprobe.instrument(model)
    probe(**kwargs)
    flat = [tokens, kwargs["attention_mask"], False]
    variants: dict[str, Callable[[], Any]] = {
        "eager": lambda: model(**kwargs),
        "graph": lambda: captured(**kwargs),
        "noop": lambda: untapped(**kwargs),
        "taps": lambda: probe.graph(**kwargs),
        "probe": lambda: probe(**kwargs),
        "checksums": lambda: checked(**kwargs),
        "five reductions": lambda: FiveReductions(captured).run(*flat),
    }
    checked = instrument_graph(captured, checksum=True)
    untapped = without_reading(instrument_graph(captured))
    with torch.no_grad():
        times = in_turns(variants, options.rounds, options.device)
    start = time.perf_counter()
    taps = probe.taps
    reading = (time.perf_counter() - start) * 1e3
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "dtype": options.dtype,
        "tokens": options.tokens,
        "taps": sum(not tap.derived for tap in taps),
        "megabytes_read": round(bytes_read(taps) / 1e6, 1),
        "milliseconds_to_read_out": round(reading, 2),
        "milliseconds": {name: round(found[0], 2) for name, found in times.items()},
        "lower_quartile": {name: round(found[len(found) // 4], 2) for name, found in times.items()},
    }


def bytes_read(taps: tuple[graphprobe.Tap, ...]) -> int:
    total = 0
    for tap in taps:
        if not tap.derived:
            count = 1
            for size in tap.shape:
                count *= size
            total += count * getattr(torch, tap.dtype).itemsize
    return total


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory of transformers weights")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    library = torch.library.Library("graphprobe_benchmarks", "DEF")
    library.define("nothing(Tensor value, Tensor(a!) stats, int row) -> ()")
    library.impl("nothing", lambda value, stats, row: None, "CompositeExplicitAutograd")
    found = measure(options)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    print("torch {torch}, {threads} threads, {device}, {dtype}, {tokens} tokens".format(**found))
    print("{taps} taps that read {megabytes_read} MB; {milliseconds_to_read_out} ms to read them out".format(**found))
    base, quartile = found["milliseconds"]["graph"], found["lower_quartile"]["graph"]
    for name, best in found["milliseconds"].items():
        typical = found["lower_quartile"][name]
        ratios = f"{best / base:5.2f}x    lower quartile {typical:8.1f} ms  {typical / quartile:5.2f}x"
        print(f"{name:16} {best:8.1f} ms  {ratios}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

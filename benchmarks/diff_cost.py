"""What does a diff cost, in forwards of the model? Prints ratios measured side by side in one run.

    python benchmarks/diff_cost.py [--model DIR] [--tokens 128] [--dtype bfloat16]

Without --model a random SmolLM2-135M-shaped model is used. The floor is what the lanes alone must run: before and after
as they are, and, where everything is judged exactly, after on before's values and both in float64. Peak memory is the
growth of the process's resident set during the diff, sampled every 5 ms, over what the loaded models and graphs hold
already.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import warnings

import torch

import graphprobe


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The largest resident set while the block runs."""

    def __enter__(self) -> Peak:
        self.start = self.peak = resident()
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, resident())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()

    @property
    def megabytes(self) -> float:
        return (self.peak - self.start) / 1e6


def load(options: argparse.Namespace) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    dtype = getattr(torch, options.dtype)
    if options.model:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    torch.manual_seed(0)
    sizes = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
    config = LlamaConfig(**sizes, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval().to(dtype)


def best(function, repeat: int = 3) -> tuple[float, float]:
    """Return the smallest wall time and the smallest processor time of several runs, in seconds."""
    walls, busy = [], []
    for _ in range(repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        walls.append(time.perf_counter() - wall)
        busy.append(time.process_time() - cpu)
    return min(walls), min(busy)


def megabytes(tensors) -> float:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values()) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--exact", default="auto,always", help="which settings of exact= are measured")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = load(options)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (1, options.tokens), generator=generator)
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.no_grad():
        before = graphprobe.capture(model, (), kwargs)
        layer = model.model.layers[17].self_attn
        layer.scaling *= 1.001
        one_scale = graphprobe.capture(model, (), kwargs)
        layer.scaling /= 1.001
        model.set_attn_implementation("eager")
        eager = graphprobe.capture(model, (), kwargs)
        native, native_cpu = best(lambda: before(**kwargs))
        full = model.float()
        full.set_attn_implementation("sdpa")
        fp32, fp32_cpu = best(lambda: full(**kwargs))
        full.double()
        float64, float64_cpu = best(lambda: full(**kwargs))
        model.to(getattr(torch, options.dtype))
    cores = torch.get_num_threads()
    print(f"torch {torch.__version__}, {cores} threads, {options.tokens} tokens, {options.dtype}")
    print(
        f"one forward: fp32 eager {fp32 * 1e3:.0f} ms, captured graph in {options.dtype} {native * 1e3:.0f} ms, "
        f"float64 {float64 * 1e3:.0f} ms"
    )
    floors = {
        "auto": (2 * native, 2 * native_cpu),
        "always": (3 * native + 2 * float64, 3 * native_cpu + 2 * float64_cpu),
    }
    weights = megabytes(model.parameters())
    lifted = max(megabytes([p]) for p in model.parameters()) * 8 / next(model.parameters()).element_size()
    print(f"weights {weights:.0f} MB; the float64 copy of the largest one {lifted:.0f} MB")
    for name, after in (("the same graph", before), ("one scale off by 0.1 %", one_scale), ("eager attention", eager)):
        for exact in options.exact.split(","):
            graphprobe.diff(before, after, (), kwargs, exact=exact)
            with Peak() as peak:
                wall, busy = time.perf_counter(), time.process_time()
                report = graphprobe.diff(before, after, (), kwargs, exact=exact)
                took, cpu = time.perf_counter() - wall, time.process_time() - busy
            beside = ""
            if exact in floors:
                beside = f", {took / floors[exact][0]:.1f} times the floor ({cpu / floors[exact][1]:.1f})"
            print(
                f"diff, {name}, exact={exact}: {report.verdict}, {took:.2f} s = {took / fp32:.1f} fp32 forwards "
                f"({cpu / fp32_cpu:.1f} in processor time), {took / native:.1f} captured forwards "
                f"({cpu / native_cpu:.1f}){beside}; peak + {peak.megabytes:.0f} MB"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What does watching a pipeline cost? 85 transforms over a graph of about 2,000 nodes, with all lints and all dumps.

Prints the time of the transforms themselves, of the checks and dumps around them, and of the whole, on one core; and
the seconds that the core was busy with it, which do not depend on what else the machine does:

    OMP_NUM_THREADS=1 python benchmarks/pipeline.py
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from torch.fx import GraphModule

import graphprobe
from graphprobe.pipeline import Pipeline

LAYERS = 24
FUSIONS = ("fuse_rmsnorm", "fuse_rotary", "fuse_qkv")  # one layer at a time: 72 transforms
WHOLE = (
    "remove_noops", "merge_common", "fold_constants", "eager_attention_to_sdpa", "eliminate_repeat_kv", "fuse_gate_up",
    "fuse_swiglu", "fuse_add_rmsnorm", "quantize_int8", "fuse_quantized_linear", "fold_conv_bn", "shard_linears",
    "lower_dtype",
)  # fmt: skip


def captured(layers: int) -> tuple[GraphModule, dict[str, object]]:
    """Capture a llama of random weights with attention written out."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 256, (1, 16))
    kwargs: dict[str, object] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    return graphprobe.capture(model, (), kwargs), kwargs


def plan(layers: int) -> str:
    """Return the text of the pipeline."""
    each = [f'{name}{{where="*.layers.{layer}.*"}}' for layer in range(layers) for name in FUSIONS]
    return ",".join((*WHOLE[:3], *each, *WHOLE[3:]))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"layers of the model ({LAYERS})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gm, kwargs = captured(options.layers)
    text = plan(options.layers)

    start, busy = time.perf_counter(), time.process_time()
    Pipeline.parse(text).run(gm)
    alone, busy_alone = time.perf_counter() - start, time.process_time() - busy

    with tempfile.TemporaryDirectory() as folder:
        start, busy = time.perf_counter(), time.process_time()
        report = graphprobe.run(gm, (), kwargs, pipeline=text, dump_dir=folder)
        whole, busy_whole = time.perf_counter() - start, time.process_time() - busy
    own, around = sum(s.seconds for s in report.steps), sum(s.overhead for s in report.steps)
    applied = sum(s.status == "applied" for s in report.steps)
    print(f"{len(report.steps)} transforms ({applied} applied), {len(gm.graph.nodes)} nodes, one thread")
    print(f"transforms alone           {alone:6.1f} s, the core busy for {busy_alone:.1f} s")
    print(f"with lints and dumps       {whole:6.1f} s, the core busy for {busy_whole:.1f} s")
    print(f"  times as long            {busy_whole / busy_alone:6.1f}")
    print(f"  the transforms           {own:6.1f} s")
    print(f"  lints and dumps          {around:6.1f} s, {1e3 * around / len(report.steps):.0f} ms a transform")
    print(f"  defects found            {sum(len(s.lints) for s in report.steps):6d}")


if __name__ == "__main__":
    main()

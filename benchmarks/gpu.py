"""Everything that graphprobe promises about speed on a GPU, side by side in one run. Prints ratios, writes JSON.

    python benchmarks/gpu.py [--layers 32] [--tokens 16,512,2048] [--out FILE]
                             [--parts taps,lanes,changed,peers,diff,backend,large]

A Llama-8B-shaped model with random bf16 weights. Times are the least of several, synchronised, in milliseconds; memory
is the peak of the allocator over what was allocated before the run, in GB. "recorded" is a replay of a CUDA graph.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import platform
import sys
import warnings
from typing import Any

import gpu_large
import gpu_peers
import gpu_runs
import torch
from gpu_backend import measure_backend
from gpu_timing import Row, attempt, host_costs, model_of, rates

import graphprobe


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
        "lanes_details_recorded / 2 graph_recorded": ("lanes_details_recorded", _times(2, base)),
        "lanes_details / 2 graph": ("lanes_details", _times(2, row.get("graph"))),
        "lanes_auto / graph": ("lanes_auto", row.get("graph")),
        "lanes_changed / graph": ("lanes_changed", row.get("graph")),
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


def inputs(tokens: int) -> Row:
    ids = torch.randint(0, 1000, (1, tokens), device="cuda")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def measure(model: torch.nn.Module, tokens: int, parts: list[str], modes: list[str], device: Row) -> Row:
    kwargs = inputs(tokens)
    before = graphprobe.capture(model, (), kwargs)
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in n)
    config: Any = model.config
    attention = 4 * tokens**2 * config.hidden_size * config.num_hidden_layers  # scores and their products with values
    row: Row = {"tokens": tokens, "linear_flop": 2 * weights * tokens, "attention_flop": attention, **device}
    row["operations"] = sum(n.op == "call_function" for n in before.graph.nodes)
    if "taps" in parts:
        gpu_runs.measure_taps(row, model, before, kwargs)
    if "lanes" in parts:
        gpu_runs.measure_lanes(row, before, kwargs, modes)
    if "changed" in parts:
        gpu_runs.measure_changed(row, model, before, kwargs)
    if "peers" in parts:
        gpu_peers.measure_peers(row, model, before, kwargs)
    if "diff" in parts:
        gpu_runs.measure_diff(row, before, kwargs)
    if "profile" in parts:
        gpu_runs.profile(row, before, kwargs)
    row["ratios"] = ratios(row)
    print(json.dumps(row["ratios"], indent=1), flush=True)
    return row


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
    parser.add_argument("--parts", default="taps,lanes,changed,peers,diff,backend")
    parser.add_argument("--exact", default="lockstep,details,native,auto,always")
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
        if "backend" in parts:
            measure_backend(result, options.hidden)
            save(result, options.out)
        for row in rows if "peers" in parts else ():
            gpu_peers.measure_torchlens(row, model, inputs(row["tokens"]))
            save(result, options.out)
    return 0


def save(result: Row, path: str | None) -> None:
    if path:
        pathlib.Path(path).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

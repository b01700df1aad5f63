"""A model that no GPU holds: 80 layers of the 70B shape, tapped and compared with weights that stay in files.

`measure` is a part of ``gpu.py`` ("large"). A few layers are written to files that all layers share in turn; as many
bytes are brought to the device as if each had its own. The rate is set against that of plain copies from page-locked
memory, measured beside it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file

import graphprobe
from graphprobe import carrying
from graphprobe.fxfile import mapping
from graphprobe.fxfile.archive import buffer

Row = dict[str, Any]

#: name -> (layers, shape, GB of GPU memory that may be used; 0: all there is)
SHAPES: dict[str, tuple[int, Row, int]] = {
    "70B": (
        80,
        {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
        0,
    ),
    "7B": (
        32,
        {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
        24,
    ),
}


def drawn(shape: torch.Size) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.02).cpu()


def written(folder: str, model: torch.nn.Module, files: int) -> list[str]:
    """Write the weights that are not a layer's, then `files` layers; the model may be without values."""
    sizes = {name: p.shape for name, p in model.named_parameters()}
    layer = {n.removeprefix("model.layers.0."): s for n, s in sizes.items() if n.startswith("model.layers.0.")}
    rest = {n: s for n, s in sizes.items() if ".layers." not in n}
    paths = []
    for index, shapes in enumerate([rest, *[layer] * files]):
        paths.append(os.path.join(folder, f"{index}.safetensors"))
        values = {n: torch.ones(s, dtype=torch.bfloat16) if len(s) == 1 else drawn(s) for n, s in shapes.items()}
        save_file(values, paths[-1])
    return paths


def mapped_model(folder: str, layers: int, files: int, shape: Row) -> torch.nn.Module:
    """Return a Llama whose weights lie in files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=128256, use_cache=False, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is computed, not stored
    paths = written(folder, model, files)
    state = mapping.tensors(paths[0])
    for layer in range(layers):
        own = mapping.tensors(paths[1 + layer % files])
        state |= {f"model.layers.{layer}.{name}": value for name, value in own.items()}
    model.load_state_dict(state, assign=True)
    return model


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    found = run()
    torch.cuda.synchronize()
    return round(time.perf_counter() - start, 3), found


def copy_rate() -> float:
    """Return GB/s of copies from page-locked memory to the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    return round(max(source.numel() / timed(lambda: target.copy_(source))[0] / 1e9 for _ in range(4)), 1)


def read_rate(paths: list[str]) -> float:
    """Return GB/s of reading the files into page-locked memory: what comes from them cannot come faster."""
    carrier, stage = carrying.Carrier(torch.device("cpu")), torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    weights = [w for path in paths for w in mapping.tensors(path).values() if w.numel() * 2 >= stage.numel()]

    def read() -> int:
        done = 0
        for weight in weights:
            for start in range(0, weight.numel() * 2 - stage.numel() + 1, stage.numel()):
                carrier._read(weight, start, buffer(stage))
                done += stage.numel()
        return done

    seconds, count = timed(read)
    return round(count / seconds / 1e9, 1)


def peak_of(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return (seconds, peak in GB of all that is allocated, result)."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds, found = timed(run)
    return seconds, round(torch.cuda.max_memory_allocated() / 1e9, 2), found


def measure(row: Row, tokens: int, name: str, files: int, changed: bool, save: Callable[[], None]) -> None:
    """Note the figures in `row`, and save them as they come; with `changed`, also those of one changed layer."""
    layers, shape, budget = SHAPES[name]
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        row |= {"tokens": tokens, "layers": layers, "files": files, "host_to_device_gb_per_s": copy_rate()}
        if budget:  # what is more raises
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(budget * 1e9 / whole)
            row["budget_gb"] = budget
        row["write_s"], model = timed(lambda: mapped_model(place, layers, files, shape))
        row["read_gb_per_s"] = read_rate([os.path.join(place, f"{index}.safetensors") for index in range(1, 1 + files)])
        row["weights_gb"] = round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9, 1)
        ids = torch.randint(0, 1000, (1, tokens))
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        row["capture_s"], gm = timed(lambda: graphprobe.capture(model, (), kwargs))
        print(row, flush=True)
        measure_taps(row, gm, kwargs)
        save()
        row["diff_s"], row["diff_peak_gb"], report = peak_of(lambda: compared(gm, gm, kwargs))
        row["diff_verdict"] = report.verdict
        print(row, flush=True)
        save()
        if not changed:
            return
        model.model.layers[layers // 2].self_attn.scaling *= 1.01
        row["capture_changed_s"], after = timed(lambda: graphprobe.capture(model, (), kwargs))
        row["diff_changed_s"], row["diff_changed_peak_gb"], report = peak_of(lambda: compared(gm, after, kwargs))
        row["diff_changed_verdict"] = report.verdict
        row["diff_changed_found"] = report.first.module_path if report.first else ""
        print(row, flush=True)


def measure_taps(row: Row, gm: torch.fx.GraphModule, kwargs: Row) -> None:
    probe = graphprobe.instrument(gm, memory="stream", device="cuda")
    row["taps_first_s"], _ = timed(lambda: probe(**kwargs))
    carried = probe.stream.bytes
    row["taps_s"], row["taps_peak_gb"], _ = peak_of(lambda: probe(**kwargs))
    row["streamed_gb"] = round((probe.stream.bytes - carried) / 1e9, 1)
    row["streamed_gb_per_s"] = round(row["streamed_gb"] / row["taps_s"], 1)
    row["streamed / copied"] = round(row["streamed_gb_per_s"] / row["host_to_device_gb_per_s"], 3)
    row["tap_count"] = sum(not tap.derived for tap in probe.taps)
    print(row, flush=True)


def compared(before: torch.fx.GraphModule, after: torch.fx.GraphModule, kwargs: Row) -> graphprobe.Report:
    return graphprobe.diff(before, after, (), kwargs, device="cuda", memory="stream")

"""What taps cost on the graphs that Dynamo captures while words are generated; a part of ``gpu.py``."""

from __future__ import annotations

import torch
from gpu_timing import Row, attempt, best, model_of

from graphprobe import backend


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
    torch.compiler.reset()

    def by_name() -> bool:  # which torch knows only where graphprobe is installed
        model.forward = torch.compile(forward, backend="graphprobe")
        return bool(torch.equal(wanted, model.generate(ids, **options)))

    attempt(row, "same_words_by_name", by_name)
    row["taps_by_name"] = sum(not tap.derived for tap in backend.default.taps)
    print(row, flush=True)

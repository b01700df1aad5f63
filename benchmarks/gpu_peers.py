"""What others do who want to see inside a model, on the same inputs; a part of ``gpu.py``."""

from __future__ import annotations

import gc
from typing import Any

import torch
from gpu_timing import Row, attempt, best


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


def measure_torchlens(row: Row, model: torch.nn.Module, kwargs: Row) -> None:
    """Log all activations with torchlens, where it is installed; call it last: it wraps torch's functions for good."""

    def run() -> float:
        import torchlens

        def trace() -> None:
            log = torchlens.trace(model, [], kwargs)
            row["peer_torchlens_operations"] = len(log)
            del log
            gc.collect()  # what it keeps refers to itself

        return best(trace, 2)

    attempt(row, "peer_torchlens", run)

"""Determinism and the observer effect: what differs from itself is no finding; a compiled side is also run untapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphprobe
from judge_tools import module, randn

GRAVE = ("precision", "semantic", "nonfinite", "structural")


def _defined() -> None:
    """Define an operator that adds noise of its own, another one at every call, as atomics do (only larger)."""
    if hasattr(torch.ops.graphprobe_steady, "unsteady"):
        return
    drawn = torch.Generator().manual_seed(1)

    @torch.library.custom_op("graphprobe_steady::unsteady", mutates_args=())
    def unsteady(x: torch.Tensor, size: float) -> torch.Tensor:
        return x + size * torch.randn(x.shape, generator=drawn).to(x.dtype)

    @unsteady.register_fake
    def _(x: torch.Tensor, size: float) -> torch.Tensor:
        return torch.empty_like(x)


def shaken(size: float = 1e-4, scale: float = 1.0, later: float = 1.0) -> nn.Module:
    _defined()

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.graphprobe_steady.unsteady(x @ m.w * scale, size)
        return torch.tanh(y * 0.5) * later

    return module(forward, w=randn(16, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_operation_that_differs_from_itself_is_marked_and_is_no_finding(dtype: torch.dtype) -> None:
    size = 1e-4 if dtype == torch.float32 else 0.004
    report = graphprobe.diff(shaken(size).to(dtype), shaken(size).to(dtype), (randn(8, 16, seed=1, dtype=dtype),))
    assert not [f for f in report.findings if f.kind in GRAVE], report.findings
    assert report.verdict == "rounding"
    assert any("nondeterministic" in note and "unsteady" in note for note in report.notes), report.notes


def test_an_operation_that_makes_up_numbers_is_unknown_and_never_excused() -> None:
    report = graphprobe.diff(shaken(), shaken(0.5), (randn(8, 16, seed=1),))
    assert report.verdict == "unknown" and report.exit_code == 2
    assert any(r.verdict == "unknown" and "nondeterministic" in r.note for r in report.regions)


def test_a_bug_beside_an_unsteady_operation_is_found() -> None:
    report = graphprobe.diff(shaken(), shaken(later=1.01), (randn(8, 16, seed=1),))
    assert report.verdict == "semantic"
    assert [f.op for f in report.findings if f.kind == "semantic"] == ["aten.mul.Tensor"]
    report = graphprobe.diff(shaken(), shaken(scale=1.5), (randn(8, 16, seed=1),))
    assert report.verdict == "semantic"


def test_steady_models_are_not_marked() -> None:
    before, after = (module(lambda m, x, s=s: (x * s).softmax(-1)) for s in (1.0, 1.1))
    report = graphprobe.diff(before, after, (randn(4, 8),))
    assert report.verdict == "semantic" and not any("nondeterministic" in note for note in report.notes)


def compiled(backend: Any) -> nn.Module:
    torch._dynamo.reset()
    wrapped: nn.Module = torch.compile(plain(), backend=backend)  # type: ignore[assignment]
    return wrapped


def plain() -> nn.Module:
    return module(lambda m, x: torch.tanh(x @ m.w) * 2, w=randn(16, 16))


def _backend(factor: float) -> Callable[..., Any]:
    def backend(gm: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        return lambda *args: torch.utils._pytree.tree_map(lambda t: t * factor, gm(*args))

    return backend


@pytest.mark.parametrize(
    ("backend", "says"),
    [("eager", "bitwise"), (_backend(1 + 1e-6), "within rounding"), (_backend(1.001), "more than rounding")],
    ids=["same", "rounding", "other"],
)
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_compiled_side_is_also_run_untapped(backend: Any, says: str, side: str) -> None:
    sides = (compiled(backend), plain()) if side == "before" else (plain(), compiled(backend))
    report = graphprobe.diff(*sides, (randn(4, 16, seed=1),))
    assert report.verdict == "identical"  # the graphs are the same; what the compiler made of one is said
    notes = [note for note in report.notes if "compiled" in note]
    assert len(notes) == 1 and notes[0].startswith(side) and says in notes[0], report.notes


def test_a_compiled_model_that_raises_is_told() -> None:
    def broken(gm: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        def raises(*args: torch.Tensor) -> Any:
            raise RuntimeError("illegal memory access")

        return raises

    report = graphprobe.diff(plain(), compiled(broken), (randn(4, 16, seed=1),))
    assert any("raises" in note and "illegal memory access" in note for note in report.notes), report.notes


def test_another_memory_layout_is_not_called_nondeterministic() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.conv2d(x, m.kernel, padding=1)
        return torch.tanh(torch.nn.functional.group_norm(y, 4))

    def channels_last(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return forward(m, x.contiguous(memory_format=torch.channels_last))

    sides = [module(f, kernel=randn(16, 3, 3, 3)) for f in (forward, channels_last)]
    report = graphprobe.diff(*sides, (randn(2, 3, 16, 16, seed=1),))
    assert report.verdict in ("identical", "rounding")
    assert "nondeterministic" not in str(report)

"""A frontier that holds a value and what was computed from it: two ways to write one function are the same function,
and every defect in either way is still found."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import graphprobe
from corpus import mutations
from corpus.mutations import scoring

Form = Callable[[torch.Tensor], torch.Tensor]
EPS = 1e-5


def mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(-1, keepdim=True)


def two_passes(x: torch.Tensor) -> torch.Tensor:
    m = mean(x)
    centred = x - m
    return centred * torch.rsqrt(mean(centred * centred) + EPS)


def one_pass(x: torch.Tensor) -> torch.Tensor:
    m = mean(x)
    return (x - m) * torch.rsqrt(mean(x * x) - m * m + EPS)


def by_norm(x: torch.Tensor) -> torch.Tensor:
    m = mean(x)
    root = torch.rsqrt((x - m).norm(dim=-1, keepdim=True) ** 2 / x.shape[-1] + EPS)
    return x * root - m * root


def from_residual(x: torch.Tensor) -> torch.Tensor:
    m = mean(x)
    return (x - m) * torch.rsqrt(mean(x * (x - m)) + EPS)


def softmax_by_maximum(x: torch.Tensor) -> torch.Tensor:
    top = x.amax(-1, keepdim=True)
    raised = torch.exp(x - top)
    return raised / raised.sum(-1, keepdim=True)


def softmax_by_logarithm(x: torch.Tensor) -> torch.Tensor:
    top = x.amax(-1, keepdim=True)
    total = top + torch.exp(x - top).sum(-1, keepdim=True).log()
    return torch.exp(x - total)


def softmax_plain(x: torch.Tensor) -> torch.Tensor:
    raised = torch.exp(x)
    return raised / raised.sum(-1, keepdim=True)


def gate_by_tanh(x: torch.Tensor) -> torch.Tensor:
    half = x * 0.5
    return half * torch.tanh(half) + half


def gate_by_sigmoid(x: torch.Tensor) -> torch.Tensor:
    half = x * 0.5
    return torch.sigmoid(half * 2.0) * x


def squared_distance(x: torch.Tensor) -> torch.Tensor:
    y = torch.roll(x, 1, -1) * 0.5
    return (x - y) * (x - y) + mean(x - y)


def squared_distance_expanded(x: torch.Tensor) -> torch.Tensor:
    y = torch.roll(x, 1, -1) * 0.5
    return x * x - 2.0 * x * y + y * y + (mean(x) - mean(y))


FAMILIES: dict[str, tuple[Form, ...]] = {
    "norm": (two_passes, one_pass, by_norm, from_residual),
    "softmax": (softmax_by_maximum, softmax_by_logarithm, softmax_plain),
    "gate": (gate_by_tanh, gate_by_sigmoid),
    "distance": (squared_distance, squared_distance_expanded),
}
PAIRS = [(f, g) for family in FAMILIES.values() for f in family for g in family if f is not g]
DTYPES = (torch.float32, torch.bfloat16)


class Block(nn.Module):
    """Linear, the function written in one way, linear, and a residual."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.first, self.last, self.form = nn.Linear(32, 32), nn.Linear(32, 32), form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return h + self.last(self.form(h))


def block(form: Form, dtype: torch.dtype, seed: int) -> tuple[nn.Module, tuple[torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Block(form).to(dtype).eval(), (torch.randn(16, 32).to(dtype) + 0.5,)


def name(value: Any) -> str:
    return getattr(value, "__name__", str(value).removeprefix("torch."))


@pytest.mark.parametrize(
    ("before", "after", "dtype"), [(*pair, DTYPES[i % 2]) for i, pair in enumerate(PAIRS)], ids=name
)
def test_two_ways_to_write_one_function_are_the_same(before: Form, after: Form, dtype: torch.dtype) -> None:
    left, args = block(before, dtype, 0)
    right, _ = block(after, dtype, 0)
    report = graphprobe.diff(left, right, args)
    assert report.verdict in ("identical", "rounding"), report.to_json()


def mutant(after: Form, dtype: torch.dtype, seed: int) -> tuple[GraphModule, mutations.Mutant, tuple[torch.Tensor]]:
    """Make one operation of a way to write the function wrong."""
    model, args = block(after, dtype, seed)
    honest = graphprobe.capture(model, args)
    rng = random.Random(f"{after.__name__} {dtype} {seed}")
    made = None
    while made is None or made.change in scoring.COARSE:
        made = mutations.draw(honest, rng, benign=False)
    return honest, made, args


def found(before: Form, after: Form, dtype: torch.dtype, seed: int) -> str:
    """Compare one way with a wrong form of another; return "found", "no effect" or what was said instead."""
    honest, made, args = mutant(after, dtype, seed)
    left, _ = block(before, dtype, seed)
    report = graphprobe.diff(left, mutations.strip(made.gm, "values"), args)
    if any(f.kind in ("semantic", "structural", "nonfinite") for f in report.findings):
        return "found"
    if not scoring.has_effect(honest, made, (args, {})):
        return "no effect"
    return f"{made.change} at {made.nodes}: {report.verdict}"


@pytest.mark.parametrize(
    ("dtype", "seed"),
    [
        (torch.float32, 1),
        (torch.bfloat16, 2),
        *(pytest.param(d, s, marks=pytest.mark.slow) for d in DTYPES for s in (30, 40)),
    ],
    ids=name,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_defect_in_another_way_to_write_it_is_found(family: str, dtype: torch.dtype, seed: int) -> None:
    forms = FAMILIES[family]
    said = [found(forms[i], forms[i - 1], dtype, seed + i) for i in range(len(forms))]
    assert not {*said} - {"found", "no effect"}

"""Operators that nobody here knows by name: what their kernel is written in is what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprobe
import graphprobe_transforms.ops  # noqa: F401  registers the operators
from graphprobe.align.matching import Matching
from graphprobe.program import program

ours = torch.ops.graphprobe_transforms


@torch.library.custom_op("align_tests::gated_norm", mutates_args=())
def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.float() * nn.functional.silu(gate.float())
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


@torch.library.custom_op("align_tests::halves", mutates_args=())
def halves(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    left, right = (x * scale).chunk(2, -1)
    return left.clone(), torch.tanh(right)


@torch.library.custom_op("align_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() * 2)


@torch.library.custom_op("align_tests::undecided", mutates_args=())
def undecided(x: Tensor) -> Tensor:
    return x * 2 if float(x.sum()) > 0 else x * 3


gated_norm.register_fake(lambda x, gate, weight, eps=1e-6: torch.empty_like(x))
halves.register_fake(lambda x, scale: tuple(x.new_empty(*x.shape[:-1], x.shape[-1] // 2) for _ in range(2)))
opaque.register_fake(torch.empty_like)
undecided.register_fake(torch.empty_like)

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
COS, SIN = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).unbind()


class Calls(nn.Module):
    """Calls a function of x and one weight."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(8, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def turned(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * COS + torch.cat([-right, left], -1) * SIN


#: An operator and the same written out; where there is a third, another function that must not pass for it.
CASES: dict[str, tuple[Callable[..., Any], ...]] = {
    "rotary": (
        lambda x, w: ours.rotary(x, COS, SIN),
        lambda x, w: turned(x),
        lambda x, w: x * COS - torch.cat([-x[..., 4:], x[..., :4]], -1) * SIN,
    ),
    "silu_mul": (
        lambda x, w: ours.silu_mul(x, x + w),
        lambda x, w: torch.sigmoid(x) * x * (x + w),
        lambda x, w: torch.sigmoid(x) * (x + w),
    ),
    "add_rms_norm, the norm": (
        lambda x, w: ours.add_rms_norm(x, x * 2, w, 1e-5)[0],
        lambda x, w: norm(x + x * 2, w, 1e-5),
        lambda x, w: norm(x + x * 2, w, 1e-6),
    ),
    "add_rms_norm, the sum": (
        lambda x, w: ours.add_rms_norm(x, x * 2, w, 1e-5)[1],
        lambda x, w: x + x * 2,
        lambda x, w: norm(x + x * 2, w, 1e-5),
    ),
    "someone's norm": (
        lambda x, w: gated_norm(x, x * 2, w),
        lambda x, w: norm(x * nn.functional.silu(x * 2), w, 1e-6),
        lambda x, w: norm(x * nn.functional.silu(x * 2), w, 1e-5),
    ),
    "the second of two results": (
        lambda x, w: halves(x * w, 3.0)[1],
        lambda x, w: torch.tanh((x * w * 3.0)[..., 4:]),
        lambda x, w: torch.tanh((x * w * 3.0)[..., :4]),
    ),
    "a result that is handed on": (
        lambda x, w: torch.exp(halves(x * w, 3.0)[0]),
        lambda x, w: torch.exp((x * w * 3.0)[..., :4]),
        lambda x, w: torch.exp((x * w * 3.001)[..., :4]),
    ),
}


def same(left: Callable[..., Any], right: Callable[..., Any]) -> bool:
    """Whether two ways to compute something have one number, with nothing run."""
    one, two = (program(graphprobe.capture(Calls(f), (X,)), (X,), {}) for f in (left, right))
    matching = Matching(one, two)
    x, y = (next(iter(p.outputs.values())) for p in (one, two))
    return matching.numbers_before()[x] == matching.numbers_after()[y]


@pytest.mark.parametrize("case", CASES)
def test_an_operator_is_what_its_kernel_is_written_in(case: str) -> None:
    operator, written, *others = CASES[case]
    assert same(operator, written) and same(written, operator)
    assert not any(same(operator, other) for other in others)


@pytest.mark.parametrize("operator", [opaque, undecided], ids=["opaque", "undecided"])
def test_a_kernel_that_cannot_be_read_is_an_operator_like_any(operator: Callable[[Tensor], Tensor]) -> None:
    assert same(lambda x, w: operator(x) + w, lambda x, w: w + operator(x))
    assert not same(lambda x, w: operator(x) + w, lambda x, w: x * 2 + w)
    report = graphprobe.diff(
        Calls(lambda x, w: operator(x * w)).eval(), Calls(lambda x, w: operator(w * x)).eval(), (X,)
    )
    assert report.verdict in ("identical", "rounding") and report.coverage.resolution == 1.0

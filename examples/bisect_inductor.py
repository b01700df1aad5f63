"""torch.compile made a model wrong: is it a bug or rounding, and which part of the compiler is it?

Run it with ``python examples/bisect_inductor.py [NAME ...]``; it needs a C++ compiler. Each case is a report from
PyTorch's public tracker that was seen with torch 2.13.0 on a CPU. Some are bugs; in others eager and compiled differ as
visibly, but both are within what rounding explains. Another torch may have mended the bugs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import graphprobe

INF = float("inf")
Inputs = tuple[torch.Tensor, ...]


class PermutedKeys(nn.Module):
    """Attention whose keys are permuted to [batch, heads, size, tokens] at once, without a transpose."""

    def __init__(self, size: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(size, size) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        h = self.heads
        q = self.q(x).view(b, t, h, d // h).permute(0, 2, 1, 3)
        k = self.k(x).view(b, t, h, d // h).permute(0, 2, 3, 1)
        v = self.v(x).view(b, t, h, d // h).permute(0, 2, 1, 3)
        return torch.softmax(torch.matmul(q, k) * (d // h) ** -0.5, -1).matmul(v)


class Remainder(nn.Module):
    """a % b with divisors that are infinite and quotients that are huge."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.remainder(a, b)


class PooledNormalised(nn.Module):
    """A mean that is zero but for rounding, divided by its own size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pool = nn.InstanceNorm2d(2), nn.AdaptiveAvgPool2d((1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(F.hardswish(F.normalize(self.pool(self.norm(x)), dim=0) * x), dim=0)


class NormOfOnes(nn.Module):
    """A group norm of equal values: zero variance but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.batch, self.group = nn.BatchNorm1d(10), nn.GroupNorm(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(torch.clamp(self.group(F.elu(self.batch(x))), min=1e-6))


class ConditionNumber(nn.Module):
    """The condition number of a singular matrix: infinite, or whatever rounding makes of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.cond(torch.arctan(x))


@dataclass(frozen=True)
class Case:
    """A report of the tracker; `verdict` and `stage` are what torch 2.13.0 gives on a CPU."""

    issue: int
    make: Callable[[], tuple[nn.Module, Inputs]]
    verdict: str
    stage: str | None


CASES = {
    "permuted_keys": Case(195320, lambda: (PermutedKeys(), (torch.randn(2, 4, 64),)), "semantic", "joint"),
    "remainder": Case(
        198057,
        lambda: (Remainder(), (torch.tensor([5.5, -5.5, 0.0, 1e20, 7.0, 1.0, 3.0, 2.0]),
                               torch.tensor([INF, -INF, INF, 3.0, 0.7, 0.1, 2.0, 5.0]))),
        "nonfinite",
        "codegen",
    ),
    "pooled_normalised": Case(181693, lambda: (PooledNormalised(), (torch.randn(8, 2, 14, 16),)), "rounding", None),
    "norm_of_ones": Case(181696, lambda: (NormOfOnes(), (torch.ones(6, 10, 12),)), "rounding", None),
    "condition_number": Case(150114, lambda: (ConditionNumber(), (torch.ones(2, 2),)), "rounding", None),
}  # fmt: skip


def bisect(name: str) -> graphprobe.Bisection:
    """Bisect one case."""
    torch.manual_seed(0)
    model, args = CASES[name].make()
    return graphprobe.bisect(model.eval(), args, pipeline="inductor")


def main(names: list[str]) -> None:
    """Bisect the named cases, or all of them, and print what was found."""
    for name in names or CASES:
        print(f"=== {name}: https://github.com/pytorch/pytorch/issues/{CASES[name].issue}\n\n{bisect(name)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])

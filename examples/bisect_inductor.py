"""torch.compile made a model wrong: is it a bug or rounding, and which part of the compiler is it?

Run it with ``python examples/bisect_inductor.py [NAME ...]``; it needs a C++ compiler. Each case is a report from
PyTorch's public tracker that was seen with torch 2.13.0 on a CPU. Some are bugs; in others eager and compiled differ as
visibly, but both are within what rounding explains. Another torch may have mended the bugs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch._inductor.config as inductor
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


class MatmulPlusBias(nn.Module):
    """Pointwise convolutions, GELU, then mm + bias and bias + mm, which Inductor makes addmm of."""

    def __init__(self, sizes: tuple[int, ...] = (1024, 256, 128, 10)) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 1), nn.Conv2d(64, 16, 1))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution in self.convolutions:
            x = convolution(x)
            x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        x = x.flatten(1)
        for i, layer in enumerate(self.layers):
            product = torch.mm(torch.relu(x), layer.weight.t())
            x = product + layer.bias if i % 2 else layer.bias + product
        return x


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


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def copy_then_add(to: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Copy a slice that is all of a tensor, then change that tensor: the copy must keep the old values."""
    to[0:, :] = source[0:, :]
    source.add_(1)
    return source


def add_then_stride(x: torch.Tensor) -> torch.Tensor:
    """Read memory by strides after x, every second element of it, was written in place."""
    x.add_(1)
    return torch.as_strided_copy(x, (3,), (2,))


def twice_subtracted(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> Inputs:
    """Two subtractions of twice something, which an optional pass of Inductor makes one of."""
    return torch.sub(a, b, alpha=2), torch.sub(c, d, alpha=2)


def narrowed(x: torch.Tensor) -> Inputs:
    """Round to 16 bits and back, which the compiler may leave out: eager is the one farther from exact arithmetic."""
    y = x.to(torch.float16).to(torch.float32)
    return y, y.sum(1)


def overflown(x: torch.Tensor) -> torch.Tensor:
    """Square in 16 bits, where 5000 squared is infinite, unless the compiler keeps 32."""
    y = x.to(torch.float16)
    return (y * y).to(torch.float32)


@dataclass(frozen=True)
class Case:
    """A report of the tracker; `verdict`, `stage` and `match` are what torch 2.13.0 gives on a CPU."""

    issue: int
    make: Callable[[], tuple[nn.Module, Inputs]]
    verdict: str
    stage: str | None = None
    match: str = ""  # part of it
    config: dict[str, Any] = field(default_factory=dict)  # switches of torch._inductor.config


def of(function: Callable[..., Any], *args: torch.Tensor) -> Callable[[], tuple[nn.Module, Inputs]]:
    """Return what makes a case of a function and its inputs."""
    return lambda: (Function(function), tuple(args))


BYTES = torch.tensor([5, 1, 100, 3, 7, 8, 9, 13, 100, 120, 127, 2, 6, 4, 11, 12, 90, 80] * 4, dtype=torch.uint8)
DIVIDENDS, DIVISORS = torch.tensor([1.0, 0.5, 6.0, 1.0] * 4), torch.tensor([0.1, 0.1, 0.2, 1 / 3] * 4)
WITH_INFINITE = (
    torch.tensor([5.5, -5.5, 0.0, 1e20, 7.0, 1.0, 3.0, 2.0]),
    torch.tensor([INF, -INF, INF, 3.0, 0.7, 0.1, 2.0, 5.0]),
)
BATCHED = {"post_grad_fusion_options": {"batch_aten_sub": {"min_fuse_set_size": 2}}}
FOUR = tuple(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4))

CASES = {
    # bugs, by stage
    "size_as_data": Case(196467, of(lambda x: torch.Tensor(x.size()), torch.randn(1, 4)), "structural", "dynamo"),
    "nearest": Case(
        198201,
        of(lambda x: F.interpolate(x, scale_factor=(1.3, 1.5), mode="nearest"), torch.arange(12.0).view(1, 1, 3, 4)),
        "semantic", "aot", "upsample_nearest2d",
    ),
    "strides": Case(133512, of(add_then_stride, torch.arange(10)[::2]), "semantic", "aot"),
    "unchecked": Case(
        193757, of(lambda t: F.binary_cross_entropy(torch.ones_like(t), t), 1.5 * torch.ones(4, 4)), "structural", "aot"
    ),
    "permuted_keys": Case(
        195320, lambda: (PermutedKeys(), (torch.randn(2, 4, 64),)), "semantic", "joint", "_sfdp_pattern_"
    ),
    "copied": Case(
        198131, of(copy_then_add, torch.zeros(3, 4), torch.arange(12.0).view(3, 4)), "semantic", "joint", "copy"
    ),
    "batched": Case(195442, of(twice_subtracted, *FOUR), "semantic", "post_grad", "batch_aten_sub", BATCHED),
    "remainder": Case(198057, of(torch.remainder, *WITH_INFINITE), "nonfinite", "codegen", "at remainder"),
    "floor_division": Case(197895, of(lambda a, b: a // b, DIVIDENDS, DIVISORS), "semantic", "codegen", "at div"),
    "smallest_byte": Case(191499, of(lambda x: x.amin(), BYTES), "semantic", "codegen", "at amin"),
    "any_byte": Case(198081, of(lambda x: torch.any(x) * 200 + 100, BYTES), "structural", "codegen", "at any"),
    # rounding, however large it looks
    "mm_plus_bias": Case(179567, lambda: (MatmulPlusBias(), (torch.randn(2, 3, 8, 8),)), "rounding"),
    "pooled_normalised": Case(181693, lambda: (PooledNormalised(), (torch.randn(8, 2, 14, 16),)), "rounding"),
    "norm_of_ones": Case(181696, lambda: (NormOfOnes(), (torch.ones(6, 10, 12),)), "rounding"),
    "narrowed": Case(185337, of(narrowed, torch.arange(20.0).reshape(5, 4).t() / 7), "rounding"),
    "overflown": Case(183607, of(overflown, torch.tensor([5000.0, 3.0, 2.0])), "rounding"),
    "condition_number": Case(150114, of(lambda x: torch.linalg.cond(torch.arctan(x)), torch.ones(2, 2)), "rounding"),
}  # fmt: skip


def bisect(name: str) -> graphprobe.Bisection:
    """Bisect one case."""
    torch.manual_seed(0)
    case = CASES[name]
    model, args = case.make()
    with inductor.patch(case.config):
        return graphprobe.bisect(model.eval(), args, pipeline="inductor")


def main(names: list[str]) -> None:
    """Bisect the named cases, or all of them, and print what was found."""
    for name in names or CASES:
        print(f"=== {name}: https://github.com/pytorch/pytorch/issues/{CASES[name].issue}\n\n{bisect(name)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])

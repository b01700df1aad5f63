"""What the tests of the judge share: modules made of one function, and pairs of them with the verdict they must get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import graphprobe

Tensors = tuple[torch.Tensor, ...]


class Function(nn.Module):
    """A module whose forward is a function of itself and the inputs; keyword tensors are its buffers."""

    def __init__(self, forward: Callable[..., Any], **tensors: torch.Tensor) -> None:
        super().__init__()
        self.function = forward
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def module(forward: Callable[..., Any], **tensors: torch.Tensor) -> nn.Module:
    """Make a module of a function ``(module, *inputs)``."""
    return Function(forward, **tensors).eval()


@dataclass(frozen=True)
class Pair:
    """Two versions, their inputs, and what the judge must say of them."""

    before: nn.Module
    after: nn.Module
    args: Tensors
    verdict: str | tuple[str, ...]
    rule: str = ""  # the rule that must have decided on some finding
    says: str = ""  # what some finding's hint or explanation must contain

    def check(self) -> graphprobe.Report:
        """Compare, and assert the verdict, the rule, and that everything was judged."""
        report = graphprobe.diff(self.before, self.after, self.args)
        allowed = (self.verdict,) if isinstance(self.verdict, str) else self.verdict
        told = [(f.kind, f.op, f.rule, f.hint, f.spread, f.exact) for f in report.findings]
        assert report.verdict in allowed, told
        assert report.coverage.unknown == 0 and report.coverage.unmatched == (), report.coverage
        if self.rule:
            assert any(f.rule.startswith(self.rule) for f in report.findings), told
        if self.says:
            assert any(self.says in f"{f.hint} {f.explanation}" for f in report.findings), told
        return report


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draw standard normal numbers, the same ones every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

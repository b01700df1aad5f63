"""Experts one by one against experts stacked: what one side computes for each, the other computes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphprobe

EXPERTS, WIDTH, INNER, BEST = 4, 16, 24, 2


def weights() -> list[torch.Tensor]:
    """Return the router and the experts' gates, ups and downs."""
    draw = torch.Generator().manual_seed(3)
    sizes = [(EXPERTS, WIDTH), *[(EXPERTS, INNER, WIDTH)] * 2, (EXPERTS, WIDTH, INNER)]
    return [torch.randn(size, generator=draw) * size[-1] ** -0.5 for size in sizes]


class Mixture(nn.Module):
    """A residual mixture of experts over normalised tokens; `bug` makes something about one expert wrong."""

    def __init__(self, bug: str = "") -> None:
        super().__init__()
        self.bug = bug
        self.router, gate, up, down = (nn.Parameter(w) for w in weights())
        self.keep(gate.data, up.data, down.data)

    def keep(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        raise NotImplementedError

    def routed(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.layer_norm(x, (WIDTH,))
        scores = torch.softmax(rows @ self.router.T, -1)
        best, chosen = scores.topk(BEST, -1)
        share = torch.zeros_like(scores).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
        return x + self.routed(rows, share)


class OneByOne(Mixture):
    """A list of experts, each with weights of its own."""

    def keep(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        self.gates, self.ups, self.downs = (nn.ParameterList(w.clone().unbind()) for w in (gate, up, down))

    def routed(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for i in range(EXPERTS):
            gate, up = x @ self.gates[i].T, x @ self.ups[i].T
            if self.bug == "swapped" and i == 2:
                gate, up = up, gate
            inner = nn.functional.silu(gate) * up
            if self.bug == "scale" and i == 2:
                inner = inner * 1.001
            down = self.downs[3 if self.bug == "expert" and i == 2 else i]
            if not (self.bug == "skipped" and i == 2):
                out = out + (inner @ down.T) * share[:, i, None]
        return out


class Stacked(Mixture):
    """One product for all experts, gate and up joined."""

    def keep(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        self.first, self.second = nn.Parameter(torch.cat([gate, up], 1)), nn.Parameter(down.clone())

    def routed(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        gate, up = torch.bmm(x.expand(EXPERTS, *x.shape), self.first.transpose(1, 2)).chunk(2, -1)
        if self.bug == "swapped":
            gate, up = up, gate
        inner = nn.functional.silu(gate) * up
        if self.bug == "scale":
            inner = inner * 1.001
        second, share = (self.second.roll(1, 0), share) if self.bug == "expert" else (self.second, share)
        said = torch.bmm(inner, second.transpose(1, 2)) * share.T[..., None]
        return (said[1:] if self.bug == "skipped" else said).sum(0)


class ByEinsum(Stacked):
    """The same with the experts behind the tokens."""

    def routed(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("td,efd->tef", x, self.first).chunk(2, -1)
        said = torch.einsum("tef,edf->ted", nn.functional.silu(gate) * up, self.second)
        return (said * share[..., None]).sum(1)


def compared(before: Mixture, after: Mixture) -> Any:
    x = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(1))
    return graphprobe.diff(before.eval(), after.eval(), (x,))


PAIRS = [(OneByOne, Stacked), (Stacked, OneByOne), (OneByOne, ByEinsum), (ByEinsum, OneByOne)]


@pytest.mark.parametrize(("left", "right"), PAIRS, ids=lambda kind: kind.__name__)
def test_each_expert_is_a_part_of_what_is_stacked(left: Callable[..., Any], right: Callable[..., Any]) -> None:
    report = compared(left(), right())
    assert report.verdict in ("identical", "rounding") and report.coverage.resolution == 1.0, report.findings
    assert report.coverage.evidence["slice"] >= 5 * EXPERTS
    assert {f"dimension {int(ByEinsum in (left, right))}: {i} of {EXPERTS}" for i in range(EXPERTS)} <= {
        claim.view for claim in report.claims
    }


@pytest.mark.parametrize("bug", ["swapped", "scale", "expert", "skipped"])
@pytest.mark.parametrize(("left", "right"), PAIRS[:2], ids=lambda kind: kind.__name__)
def test_what_is_wrong_with_an_expert_is_one_finding(
    left: Callable[..., Any], right: Callable[..., Any], bug: str
) -> None:
    report = compared(left(), right(bug))
    assert report.verdict == "semantic" and report.coverage.resolution >= 0.9, report.coverage
    found = [f for f in report.findings if f.kind == "semantic"]
    # where every expert is wrong, it is all of the mixture
    assert len(found) == 1 and found[0].located == ((left, bug) != (OneByOne, "swapped")), found
    assert found[0].op not in ("aten.cat.default", "aten.squeeze.dim", "aten.index_select.default"), found[0].op

"""One finding for one place, and one for each of two: what belongs together is told by what can be measured."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprobe
from corpus import rewrites
from graphprobe.records import Finding
from judge_tools import Pair, module, randn

WIDTH, TOKENS = 16, 5
GRAVE = ("semantic", "precision", "nonfinite", "structural")


@dataclass(frozen=True)
class Ways:
    """How a block computes; each field is one thing that can be done wrongly."""

    swapped_gate: bool = False  # silu(up) * gate
    swapped_weights: bool = False  # each of the two was loaded into the other
    swapped_keys: bool = False  # keys and values take each other's place
    swapped_queries: bool = False  # queries and keys take each other's place
    turned_first: bool = False  # the norm of the queries behind their rotation
    shift: int = 0  # the convolution sees the next token
    rolled: int = 0  # tokens are rolled before the scan
    step: float = 0.5  # used twice
    gate_scale: float = 1.0
    up_scale: float = 1.0
    out_scale: float = 1.0


class Block(nn.Module):
    """Attention with normed queries, a gated layer, a convolution and a scan over its tokens."""

    def __init__(self, ways: Ways) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ways = ways
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        if ways.swapped_weights:
            self.gate.weight, self.up.weight = self.up.weight, self.gate.weight
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.norm.weight.data = 1 + randn(WIDTH, seed=5) / 2
        self.register_buffer("angles", randn(TOKENS, WIDTH // 2, seed=6))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = self.angles.cos().repeat(1, 2), self.angles.sin().repeat(1, 2)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ways = self.ways
        q = self.norm(self.turned(self.q(x))) if ways.turned_first else self.turned(self.norm(self.q(x)))
        k = self.k(x).tanh()
        q, k = (k, q) if ways.swapped_queries else (q, k)
        v = self.v(x)
        k, v = (v, k) if ways.swapped_keys else (k, v)
        x = x + torch.softmax(q @ k.mT / 4, -1) @ v
        gate, up = self.gate(x) * ways.gate_scale, self.up(x) * ways.up_scale
        x = x + self.out(F.silu(up) * gate if ways.swapped_gate else F.silu(gate) * up) * ways.out_scale
        held = self.conv(x.mT)[..., ways.shift : ways.shift + TOKENS].mT
        held = held.roll(ways.rolled, 1) if ways.rolled else held
        h, seen = torch.zeros_like(held[:, 0]), []
        for t in range(TOKENS):
            h = torch.tanh(held[:, t]) * h + torch.exp(-held[:, t].abs()) * x[:, t]
            seen.append((h * torch.sigmoid(held[:, t])).cumsum(-1))
        y = torch.stack(seen, 1)
        near = torch.clamp(y, -ways.step, ways.step)
        return y + near * torch.cos(y.clamp(-ways.step, ways.step))


def graves(ways: Ways, level: str) -> list[Finding]:
    """Compare a block with what it should be; the graphs share ids, modules, or nothing but values."""
    x = randn(2, TOKENS, WIDTH, seed=3)
    before, after = (graphprobe.capture(nn.Sequential(Block(w)).eval(), (x,)) for w in (Ways(), ways))
    report = graphprobe.diff(before, rewrites.stripped(after, level) if level else after, (x,))
    return [f for f in report.findings if f.kind in GRAVE]


ONE = {
    "gate and up": Ways(swapped_gate=True),
    "weights of gate and up": Ways(swapped_weights=True),
    "keys and values": Ways(swapped_keys=True),
    "queries and keys": Ways(swapped_queries=True),
    "norm and rotation": Ways(turned_first=True),
    "a token too late": Ways(shift=1),
    "tokens rolled": Ways(rolled=1),
    "one number twice": Ways(step=0.25),
    "a scale": Ways(up_scale=1.001),
}
TWO = {
    "both branches of one product": Ways(gate_scale=1.01, up_scale=0.98),
    "a product and what follows": Ways(swapped_gate=True, out_scale=1.1),
    "a scale and a shift": Ways(out_scale=1.001, shift=1),
    "a swap and a number": Ways(swapped_queries=True, step=0.25),
    "two swaps": Ways(swapped_queries=True, swapped_gate=True),
    "swapped weights and operands": Ways(swapped_keys=True, swapped_weights=True),
}
LONG = ("a scale and a shift", "two swaps", "swapped weights and operands")


def one_by_one(name: str, level: str) -> object:
    slow = not level and name in ("a token too late", "tokens rolled")  # all of the scan fails at first
    return pytest.param(name, level, marks=pytest.mark.slow) if slow else (name, level)


# without names nothing says that two numbers belong to one module
@pytest.mark.parametrize(
    ("name", "level"),
    [one_by_one(n, level) for n in ONE for level in ("", "values") if (n, level) != ("one number twice", "values")],
)
def test_one_mistake_is_one_finding(name: str, level: str) -> None:
    found = graves(ONE[name], level)
    assert len(found) == 1, [(f.op, f.after, f.outputs, f.hint) for f in found]
    assert found[0].located and found[0].cures is not None and found[0].cures > 0.99


@pytest.mark.parametrize("level", ["", "values"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in TWO])
def test_two_mistakes_are_two_findings(name: str, level: str) -> None:
    found = graves(TWO[name], level)
    assert len(found) == 2, [(f.op, f.after, f.outputs, f.hint) for f in found]


WEIGHT, OTHER = randn(WIDTH, WIDTH, seed=8), randn(WIDTH, WIDTH, seed=8)
OTHER[3] *= 1.01


@pytest.mark.parametrize(
    ("before", "after", "op"),
    [
        (lambda m, x: F.linear(x.mT, m.w), lambda m, x: F.linear(x.permute(0, 2, 1), m.w), "aten.linear.default"),
        (lambda m, x: x.mT * 2.0, lambda m, x: x.permute(0, 2, 1) * 2.1, "aten.mul.Tensor"),
        (lambda m, x: x[:, :4].exp() * 2.0, lambda m, x: x[:, 1:5].exp() * 2.0, "aten.slice.Tensor"),
    ],
    ids=["weight", "number", "the view itself"],
)
def test_a_view_is_to_blame_only_where_no_weight_or_number_is_another(before: object, after: object, op: str) -> None:
    x = randn(2, WIDTH, WIDTH, seed=9)
    one = Pair(module(before, w=WEIGHT), module(after, w=OTHER), (x,), "semantic").check()  # type: ignore[arg-type]
    assert [f.op for f in one.findings] == [op]


def test_what_agrees_exactly_between_a_defect_and_what_hides_it_is_no_finding() -> None:
    def decided(by: float) -> nn.Module:
        return module(lambda m, x: (((x * by).tanh() * 2).exp() > 1.1).float() * x)

    x = randn(4, WIDTH, seed=2).abs() + 0.1
    report = Pair(decided(1.0), decided(1.01), (x,), "semantic", says="masked on this input").check()
    assert [f.op for f in report.findings] == ["aten.mul.Tensor"] and report.findings[0].exact


class Gated(nn.Module):
    """A gated layer; `by_hand` writes its activation out, and then `swapped` takes gate for up and up for gate."""

    def __init__(self, by_hand: bool, swapped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.by_hand, self.swapped = by_hand, swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate(x), self.up(x)
        gate, up = (up, gate) if self.swapped else (gate, up)
        return self.out((gate * torch.sigmoid(gate) if self.by_hand else F.silu(gate)) * up)


@pytest.mark.parametrize("swapped", [False, True])
def test_an_exchange_is_one_finding_where_the_sides_are_written_otherwise(swapped: bool) -> None:
    after = nn.Sequential(Gated(True, swapped), Gated(True))
    report = graphprobe.diff(nn.Sequential(Gated(False), Gated(False)), after, (randn(2, TOKENS, WIDTH, seed=3),))
    found = [f for f in report.findings if f.kind in GRAVE]
    assert len(found) == swapped, found
    assert not swapped or (found[0].module_path == "0" and found[0].cures is not None and found[0].cures > 0.99), found

"""A layer too many, too few or in another place is one mistake, however deep the model is."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphprobe
from graphprobe.align.moved import moved
from graphprobe.align.weights import Leaves
from graphprobe.lanes.replay import Replay


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.before_attention(x)
        q, k, v = (p(y).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.before_mlp(x))))


class Deep(nn.Module):
    def __init__(self, depth: int, trained: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        self.blocks = nn.ModuleList(Block(16) for _ in range(depth))
        self.norm = nn.LayerNorm(16)
        for p in self.parameters() if trained else ():  # norms are no longer all alike
            nn.init.normal_(p, mean=0.1, std=0.3)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def other_block(blocks: list[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    made = copy.deepcopy(blocks[0])
    for p in made.parameters():
        nn.init.normal_(p, mean=0.1, std=0.3)
    return made


Change = Callable[[list[nn.Module], int], None]
#: What is done to the blocks, and what is said of it: the numbers of layers missing in before and too many in after.
CHANGES: dict[str, tuple[Change, Callable[[int, int], list[str]]]] = {
    "left out": (lambda b, at: b.pop(at), lambda at, depth: [f"missing layer: without blocks.{at} "]),
    "two left out": (
        lambda b, at: b.__delitem__(slice(at, at + 2)),
        lambda at, depth: [f"missing layer: without blocks.{at} to blocks.{at + 1} "],
    ),
    "put in": (lambda b, at: b.insert(at, other_block(b)), lambda at, depth: [f"too many: without blocks.{at} "]),
    "copied": (
        lambda b, at: b.insert(at + 1, copy.deepcopy(b[at])),
        lambda at, depth: [f"too many: without blocks.{at + 1} "],
    ),
    "first to last": (
        lambda b, at: b.append(b.pop(0)),
        lambda at, depth: ["missing layer: without blocks.0 ", f"too many: without blocks.{depth - 1} "],
    ),
}


def compared(change: str, at: int, depth: int, trained: bool, dtype: torch.dtype = torch.float32):
    before, after = Deep(depth, trained).eval(), Deep(depth, trained).eval()
    blocks = list(after.blocks)
    CHANGES[change][0](blocks, at)
    after.blocks = nn.ModuleList(blocks)
    ids = torch.randint(0, 40, (1, 9), generator=torch.Generator().manual_seed(0))
    return graphprobe.diff(before.to(dtype), after.to(dtype), (ids,))


@pytest.mark.parametrize(
    ("change", "trained"),
    [
        pytest.param(change, trained, marks=() if trained == (change != "left out") else pytest.mark.slow)
        for change in CHANGES
        for trained in (False, True)
    ],
)
def test_a_layer_in_the_wrong_place_is_named(change: str, trained: bool) -> None:
    depth, at = 5, random.Random(f"{change}{trained}").randrange(1, 3)
    report = compared(change, at, depth, trained)
    said = CHANGES[change][1](at, depth)
    assert report.verdict == "semantic" and len(report.findings) == len(said), [f.hint for f in report.findings]
    for finding, words in zip(report.findings, said, strict=True):
        assert words in finding.hint, finding.hint
        assert finding.module_path == words.split()[-1], finding.module_path
    assert report.coverage.unknown == 0


def test_work_beyond_the_lanes_does_not_grow_with_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    evaluate = Replay._exact_node

    def counting(self, *args):
        counts[-1] += 1
        return evaluate(self, *args)

    monkeypatch.setattr(Replay, "_exact_node", counting)
    for depth in (4, 10):
        counts.append(0)
        compared("left out", 2, depth, trained=False)
    assert 0 < counts[1] <= 1.1 * counts[0], counts


def leaves(order: list[int], holder: str = "layers") -> Leaves:
    """The weights of layers that hold, in this order, what the numbered contents say."""
    names = {f"{holder}.{i}.weight": (("content", (2,), str(k)), False) for i, k in enumerate(order)}
    return Leaves(names)


@pytest.mark.parametrize("seed", range(20))
def test_layers_that_are_left_out_or_put_in_move_the_others(seed: int) -> None:
    rng = random.Random(seed)
    before = list(range(8))
    after = [k for k in before if rng.random() < 0.8]
    for new in range(rng.randrange(3)):
        after.insert(rng.randrange(len(after) + 1), 100 + new)
    found = moved(leaves(before), leaves(after))
    kept = [i for i, k in enumerate(after) if k < 100]
    assert all(found.path(f"layers.{i}.norm") == f"layers.{after[i]}.norm" for i in kept)
    if found.numbers:
        stand = [found.path(f"layers.{i}") for i in range(len(after))]
        numbers = [int(p.split(".")[1]) for p in stand if p is not None]
        assert numbers == sorted(set(numbers))
        for j in set(before) - set(numbers):
            assert found.apart(f"layers.{j}.mlp", "norm") and not found.apart("norm", "norm")


@pytest.mark.parametrize("seed", range(5))
def test_experts_in_any_order_are_no_layers_that_moved(seed: int) -> None:
    order = list(range(8))
    random.Random(seed).shuffle(order)
    found = moved(leaves(list(range(8)), "mlp.experts"), leaves(order, "mlp.experts"))
    assert not found.numbers and found.path("mlp.experts.3") == "mlp.experts.3"

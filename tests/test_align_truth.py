"""Claims against known truth: rewritten graphs with less and less evidence, with and without a bug."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import graphprobe
from corpus import growing, mutations, rewrites
from corpus.truth import Score, score, truth
from graphprobe import align, inputs, nodes
from graphprobe.execute import run_program
from graphprobe.program import copied, program

LAYERS = 4
BOUND = {"x": torch.randn(growing.TOKENS, growing.WIDTH, generator=torch.Generator().manual_seed(1))}


def aligned(before: torch.fx.GraphModule, after: torch.fx.GraphModule, run: bool) -> Any:
    left, right = program(before, (), {}), copied(program(after, (), {}))
    return left, right, align.align(left, right, (), BOUND if run else None)


@pytest.mark.parametrize("level", rewrites.LEVELS)
def test_a_reordered_and_renamed_copy_is_aligned_node_by_node(level: str) -> None:
    before = growing.stack(LAYERS)
    plain = rewrites.shuffled(before)
    after = rewrites.stripped(plain, level)
    names = dict(zip((n.name for n in after.graph.nodes), (n.name for n in plain.graph.nodes), strict=True))
    _, right, found = aligned(before, after, run=level == "values")
    assert all(names[c.after.name] == c.before.name for c in found.claims)
    assert len(found.claims) == sum(nodes.makes_values(n) for n in right.live)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("run", [True, False], ids=["values", "structure"])
def test_a_bug_moves_no_claim_of_what_is_not_the_bug(run: bool, seed: int) -> None:
    before = growing.stack(LAYERS)
    mutant = rewrites.planted(rewrites.shuffled(before), seed)
    assert mutant is not None
    after = rewrites.stripped(mutant.gm, "values")
    names = dict(zip((n.name for n in after.graph.nodes), (n.name for n in mutant.gm.graph.nodes), strict=True))
    left, right, found = aligned(before, after, run)
    known = {n.name for n in left.live} - set(mutant.nodes)
    pairs = [(c.before.name, names[right.label(c.after)], c.evidence) for c in found.claims if c.evidence != "output"]
    asked = [pair for pair in pairs if pair[1] in known]
    assert not [pair for pair in asked if pair[0] != pair[1]]
    assert len(asked) >= 0.95 * sum(nodes.makes_values(n) and names.get(n.name) in known for n in right.live)


def test_another_way_to_write_a_model_is_aligned_by_values() -> None:
    before, after = growing.stack(LAYERS), rewrites.stripped(growing.stack(LAYERS, other=True), "values")
    left, right, found = aligned(before, after, run=True)
    held = {}
    for one in (left, right):
        held |= run_program(one, BOUND, one.live)
    for claim in found.claims:
        torch.testing.assert_close(held[claim.before], held[claim.after], rtol=1e-3, atol=1e-4)
    # a root there and an inverse root here have no partner; what both compute must be met, unless it is a few numbers
    making = [y for y in right.live if nodes.makes_values(y) and held[y].numel() >= 8]
    both = [y for y in making if any(_equal(held[x], held[y]) for x in left.live)]
    assert len(both) > 0.5 * len(making)
    assert sum(bool(found.of_after.get(y)) for y in both) >= 0.95 * len(both)


def _equal(x: Any, y: torch.Tensor) -> bool:
    return isinstance(x, torch.Tensor) and x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-5)


def measured(name: str, kind: str, level: str, bug: int | None) -> Score:
    draws = [rewrites.REWRITES[kind](name, seed, torch.float32) for seed in (0, 1)]
    true, pair = truth(draws), draws[0]
    mutant = rewrites.planted(pair.after, bug) if bug is not None else None
    plain = mutant.gm if mutant else pair.after
    bare = rewrites.stripped(plain, level)
    renamed = dict(zip((n.name for n in bare.graph.nodes), (n.name for n in plain.graph.nodes), strict=True))
    left, right = program(pair.before, pair.args, pair.kwargs), copied(program(bare, pair.args, pair.kwargs))
    bound = inputs.bind(pair.before, pair.args, pair.kwargs, "before")
    found = align.align(left, right, pair.events if level == "events" else (), bound if level == "values" else None)
    return score(true, left, right, found, mutant, renamed)


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, 3], ids=["no bug", "bug"])
@pytest.mark.parametrize("level", ["events", "modules", "values", "structure"])
@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "fused"), ("bert", "core aten"), ("qwen3", "fused more"), ("conv", "cleaned")]
)
def test_claims_are_right_and_little_is_missed(name: str, kind: str, level: str, bug: int | None) -> None:
    one = measured(name, kind, level, bug)
    assert one.wrong == 0, one.said
    assert one.claims and one.recall >= (0.98 if bug is None else 0.9), one.missed


def test_the_truth_itself_tells_right_from_wrong() -> None:
    """A score must be able to fail: claims of a graph with two nodes exchanged are found to be wrong."""
    before = growing.stack(2)
    pair = rewrites.Pair(before, mutations.fork(before), (), (), BOUND)
    other = growing.stack(2, seed=1)
    true = truth([pair, rewrites.Pair(other, mutations.fork(other), (), (), BOUND)])
    left, right = program(before, (), {}), copied(program(pair.after, (), {}))
    found = align.align(left, right)
    assert score(true, left, right, found).wrong == 0
    linear = [c for c in found.claims if "linear" in c.after.name and nodes.shape(c.after)[-1] == growing.WIDTH]
    one, two = random.Random(0).sample(linear, 2)
    wrong = align.Alignment()
    for c in found.claims:
        partner = {one: two.before, two: one.before}.get(c, c.before)
        wrong.add(align.Claim(partner, c.after, c.evidence))
    assert score(true, left, right, wrong).wrong == 2


class Slight(torch.nn.Module):
    """Residual layers that change their stream by a few ten-thousandths, as layers of trained models do."""

    def __init__(self, defect: bool, other: bool) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        sizes = [size for _ in range(3) for size in ((32, 16), (16, 32))]
        self.weights = torch.nn.ParameterList([torch.randn(s, generator=draw) * 0.02 for s in sizes])
        self.defect, self.other = defect, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(3):
            square = x * x
            mean = square.sum(-1, keepdim=True) if self.defect and i == 1 else square.mean(-1, keepdim=True)
            inner = (x * torch.rsqrt(mean + 1e-5)) @ self.weights[2 * i].T
            # the middle of a layer has no partner on the other side, so that only values tell what lies below it
            inner = inner.sigmoid() - 0.5 if self.other else (inner / 2).tanh() / 2
            x = x + inner @ self.weights[2 * i + 1].T
        return x


def test_a_defect_that_does_next_to_nothing_moves_no_claim() -> None:
    x = 3 * torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))
    before, plain, wrong = (
        graphprobe.capture(Slight(d, o), (x,)) for d, o in ((False,) * 2, (False, True), (True, True))
    )
    claims = []
    for after in (plain, wrong):
        bare = rewrites.stripped(after, "values")
        left, right = program(before, (x,), {}), copied(program(bare, (x,), {}))
        found = align.align(left, right, (), {"x": x})
        claims.append({(c.before.name, right.order[c.after]) for c in found.claims})
    assert claims[0] and claims[0] == claims[1]

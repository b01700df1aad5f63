"""What the lanes may leave out, and what they do once for both sides."""

from __future__ import annotations

import copy
import hashlib
import random

import pytest
import torch
from torch.fx import Node

import graphprobe
from corpus import mutations
from graphprobe import align, binding
from graphprobe.lanes import exact
from graphprobe.lanes.build import Plan, Probe, build
from graphprobe.lanes.regions import Region, regions_of
from graphprobe.lanes.same import Weights, isomorphic, substitutes
from models import tiny


def captured(name: str, dtype: torch.dtype) -> tuple[torch.fx.GraphModule, tuple, dict]:
    model, args, kwargs = tiny(name, dtype)
    return graphprobe.capture(model, args, kwargs), args, kwargs


def probed(before, after, args, kwargs, choose) -> tuple[Plan, Probe]:
    left, right, bound = binding.programs(before, after, args, kwargs)
    regions = regions_of(left, right, align.align(left, right, (), bound))
    weights = Weights(left, right)
    chosen = {r for r in regions if choose(r, weights)}
    plan = Plan(left, right, regions, chosen, substitutes(regions, weights))
    return plan, build(plan)


def shown(node: Node, plan: Plan, side: str) -> tuple[object, ...]:
    program = getattr(plan, side)
    if node.op == "get_attr":
        value = program.attribute(node)
        return (
            "weight",
            value.dtype,
            hashlib.sha256(value.detach().contiguous().view(torch.uint8).numpy()).hexdigest(),
        )
    constants = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: "operand")
    return (
        node.target,
        repr(constants),
        node.meta["val"].dtype if isinstance(node.meta["val"], torch.Tensor) else None,
    )


@pytest.mark.parametrize("seed", range(2))
def test_only_pieces_that_are_one_program_on_one_content_are_left_out(seed: int) -> None:
    rng = random.Random(seed)
    gm, args, kwargs = captured("llama", torch.bfloat16)
    mutant = mutations.draw(gm, rng, benign=seed == 0)
    assert mutant is not None

    def left_out(region: Region, weights: Weights) -> bool:
        return isomorphic(region, weights)

    plan, _ = probed(gm, mutant.gm, args, kwargs, left_out)
    assert 0 < len(plan.exact_regions) < len(plan.regions)
    for region in plan.exact_regions:
        mine = sorted(repr(shown(n, plan, "before")) for n in region.before)
        theirs = sorted(repr(shown(n, plan, "after")) for n in region.after)
        assert mine == theirs


class Scaled(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return torch.relu(x * self.factor)


def test_values_that_are_equal_are_no_reason_to_leave_out() -> None:
    x = torch.full((4, 8), 1.0, dtype=torch.bfloat16)
    before, after = Scaled(0.125), Scaled(0.125125)
    assert torch.equal(before(x), after(x))  # one unit of bfloat16 is 0.4 %
    assert graphprobe.diff(before, after, (x,)).verdict == "semantic"


@pytest.mark.parametrize("copied", [False, True])
def test_a_weight_of_both_sides_is_raised_once_a_region(copied: bool) -> None:
    model, args, kwargs = tiny("llama", torch.bfloat16)
    gm = graphprobe.capture(model, args, kwargs)
    after = graphprobe.capture(copy.deepcopy(model), args, kwargs) if copied else gm
    plan, probe = probed(gm, after, args, kwargs, lambda region, weights: True)
    raised = [
        str(n.args[0].target).partition(".")[2]
        for n in probe.graph.nodes
        if n.target is exact.lift and isinstance(n.args[0], Node) and n.args[0].op == "get_attr"
    ]
    used = [n for region in plan.regions for n in region.before if n.op == "get_attr"]
    floating = [n for n in used if plan.before.attribute(n).is_floating_point()]
    assert 0 < len(raised) <= len(floating)


def test_float64_copies_of_weights_live_for_one_region() -> None:
    gm, args, kwargs = captured("llama", torch.bfloat16)
    _, probe = probed(gm, gm, args, kwargs, lambda region, weights: True)
    order = {n: place for place, n in enumerate(probe.graph.nodes)}
    weights = [n for n in order if n.target is exact.lift and n.args[0].op == "get_attr"]
    lives = [(order[n], max(order[user] for user in n.users)) for n in weights if n.users]
    large = [sum(start <= place <= end for start, end in lives) for place, _ in lives]
    assert max(large) <= 3  # a weight, a bias, and one that a mask or a table needs

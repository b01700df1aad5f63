"""A second look goes on from what the lanes left behind, and finds what a run from the inputs would find."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch

import graphprobe
from corpus import mutations
from graphprobe import align, binding, execute
from graphprobe.align.claims import Alignment
from graphprobe.lanes import run, waypoints
from graphprobe.lanes.plan import Plan
from graphprobe.lanes.regions import Regions, regions_of
from graphprobe.lanes.replay import Replay
from graphprobe.lanes.same import Weights, substitutes
from models import tiny

NAMES = ("llama", "gpt2", "bert")


@functools.cache
def planned(name: str) -> tuple[Plan, dict[str, Any], Alignment]:
    model, args, kwargs = tiny(name, torch.bfloat16)
    gm = graphprobe.capture(model, args, kwargs)
    drawn = (mutations.draw(gm, random.Random(seed), benign=False) for seed in range(9))
    after = next(mutant for mutant in drawn if mutant is not None).gm
    left, right, bound = binding.programs(gm, after, args, kwargs)
    alignment = align.align(left, right, (), bound)
    regions = regions_of(left, right, alignment)
    return Plan(left, right, regions, set(regions), set(), substitutes(regions, Weights(left, right))), bound, alignment


def same(x: object, y: object) -> bool:
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_behind_are_values_of_before(name: str) -> None:
    plan, bound, _ = planned(name)
    known = run.measure(plan, bound).known
    assert set(plan.before.outputs.values()) <= set(known)
    assert len(known) > len(plan.before.outputs)
    plain = execute.run_program(plan.before, bound, known)
    assert all(same(value, plain[node]) for node, value in known.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_second_look_runs_less_and_finds_the_same(name: str, monkeypatch) -> None:
    plan, bound, _ = planned(name)
    known = run.measure(plan, bound).known
    ran: list[object] = []
    plain_call = execute.call
    monkeypatch.setattr(execute, "call", lambda program, node, env: ran.append(node) or plain_call(program, node, env))
    last = plan.regions[-1]
    short, long = Replay(plan, bound, known=known), Replay(plan, bound)
    short.fetch_frontiers([last])
    few = len(ran)
    long.fetch_frontiers([last])
    assert 3 * few < len(ran) - few
    for p, _ in last.frontier:
        if p.op != "placeholder":
            assert same(short.values[p], long.values[p])


def test_little_is_left_behind(monkeypatch) -> None:
    monkeypatch.setattr(waypoints, "LIMIT", 4096)
    plan, bound, _ = planned("llama")
    held = {
        v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in run.measure(plan, bound).known.values()
    }
    assert sum(held.values()) <= 4096


def test_what_was_fetched_is_freed_only_where_it_is_much() -> None:
    plan, bound, _ = planned("llama")
    replay = Replay(plan, bound, known=run.measure(plan, bound).known)
    start = set(replay.values)
    replay.fetch_frontiers(plan.regions)
    assert len(replay.values) > len(start)
    replay.forget(beyond=1 << 30)
    assert len(replay.values) > len(start)
    replay.forget()
    assert set(replay.values) == start


@pytest.mark.parametrize("name", NAMES)
def test_regions_without_some_claims_are_those_of_what_is_left(name: str) -> None:
    plan, _, alignment = planned(name)
    rng = random.Random(5)
    finder = Regions(plan.before, plan.after, alignment)
    for _ in range(20):
        withdrawn = set(rng.sample(alignment.claims, 3))
        left = alignment.without(withdrawn)
        assert left.claims == [c for c in alignment.claims if c not in withdrawn]
        for node in {n for c in withdrawn for n in (c.before, c.after)}:
            assert left.of_after.get(node, []) == [c for c in left.claims if c.after is node]
        anew, quick = Regions(plan.before, plan.after, left), finder.without(withdrawn)
        for claim in rng.sample(left.claims, 5):
            x, y = anew.region(claim), quick.region(claim)
            assert (x.before, x.after, x.frontier) == (y.before, y.after, y.frontier)
            assert (x.loose_before, x.loose_after) == (y.loose_before, y.loose_after)

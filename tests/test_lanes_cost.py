"""What the lanes may leave out, and what they do once for both sides."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import random

import pytest
import torch
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

import graphprobe
from corpus import mutations
from graphprobe import align, binding
from graphprobe.judge.rows import read
from graphprobe.lanes import exact, measure, run, together
from graphprobe.lanes.build import build
from graphprobe.lanes.plan import Plan, Probe
from graphprobe.lanes.regions import Region, regions_of
from graphprobe.lanes.same import Weights, isomorphic, repeats, substitutes
from models import tiny


def captured(name: str, dtype: torch.dtype) -> tuple[torch.fx.GraphModule, tuple, dict]:
    model, args, kwargs = tiny(name, dtype)
    return graphprobe.capture(model, args, kwargs), args, kwargs


def probed(before, after, args, kwargs, choose) -> tuple[Plan, Probe]:
    left, right, bound = binding.programs(before, after, args, kwargs)
    regions = regions_of(left, right, align.align(left, right, (), bound))
    weights = Weights(left, right)
    chosen = {r for r in regions if choose(r, weights)}
    plan = Plan(left, right, regions, chosen, set(), substitutes(regions, weights))
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


class Unsteady(torch.nn.Module):
    def forward(self, x, index):
        return torch.zeros(4, 8).index_add(0, index, torch.tanh(x)).exp()


def forced_operations(plan: Plan, probe: Probe) -> list[str]:
    return [str(node.target) for lane, node in probe.origin.values() if lane == "forced"]


def repeating(before, after, args, kwargs) -> tuple[Plan, Probe]:
    left, right, bound = binding.programs(before, after, args, kwargs)
    regions = regions_of(left, right, align.align(left, right, (), bound))
    weights = Weights(left, right)
    repeated = {r for r in regions if repeats(r, weights)}
    plan = Plan(left, right, regions, set(), repeated, substitutes(regions, weights))
    return plan, build(plan)


def test_the_forced_lane_does_not_repeat_what_before_did() -> None:
    gm, args, kwargs = captured("llama", torch.bfloat16)
    plan, probe = repeating(gm, gm, args, kwargs)
    assert len(plan.repeated) == len(plan.regions) and not forced_operations(plan, probe)


@pytest.mark.parametrize("seed", [1, 2])
def test_what_a_mutation_changes_is_forced(seed: int) -> None:
    gm, args, kwargs = captured("llama", torch.bfloat16)
    mutant = mutations.draw(gm, random.Random(seed), benign=seed == 1)
    plan, probe = repeating(gm, mutant.gm, args, kwargs)
    forced = {node for lane, node in probe.origin.values() if lane == "forced"}
    for region in plan.regions:
        mine, theirs = (sorted(repr(shown(n, plan, s)) for n in getattr(region, s)) for s in ("before", "after"))
        if mine != theirs:
            assert region not in plan.repeated and forced.issuperset(region.operations("after"))


@pytest.mark.parametrize(("dtype", "seed"), [(torch.bfloat16, 2), (torch.float16, 3)])
def test_what_is_left_out_is_known_all_the_same(dtype: torch.dtype, seed: int) -> None:
    """Every row says what it says when all lanes run."""
    gm, args, kwargs = captured("llama", dtype)
    mutant = mutations.draw(gm, random.Random(seed), benign=False)
    plan, probe = repeating(gm, mutant.gm, args, kwargs)
    whole = dataclasses.replace(plan, repeated=set())
    _, _, bound = binding.programs(gm, mutant.gm, args, kwargs)
    lazy, full = (run.measure(p, bound).rows for p in (plan, whole))
    assert full[:, measure.Column.FREE].count_nonzero() > 10
    for row, region in enumerate(plan.regions):
        assert (read(region, lazy[row]).reproduced) is (read(region, full[row]).reproduced)
    told = [column for column in measure.Column if column is not measure.Column.FORCED_EQUAL]
    torch.testing.assert_close(lazy[:, told], full[:, told], rtol=1e-6, atol=0.0)
    taken = [n for n in probe.graph.nodes if n.target is measure.take]
    measured = [n for n in probe.graph.nodes if n.target is measure.native]
    several = [row for n in probe.graph.nodes if n.target is measure.native_several for row in n.args[2]]
    assert len(taken) > 3 and len(taken) + len(measured) + len(several) == len(plan.regions)


def test_small_comparisons_wait_for_each_other_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is measured once, before its rows are joined, and what waits holds little."""
    monkeypatch.setattr(together, "HELD", 1 << 15)
    monkeypatch.setattr(together, "SMALL", 1 << 14)
    gm, args, kwargs = captured("llama", torch.float32)
    _, probe = repeating(gm, gm, args, kwargs)
    done: list[int] = []
    for node in probe.graph.nodes:
        if node.target is measure.native:
            done.append(node.args[2])
        elif node.target is measure.native_several:
            _, _, rows, before, free, forced, _ = node.args
            values = [v for v in (*before, *free, *forced) if v is not None]
            assert 1 < len(rows) <= together.SEVERAL
            assert sum(v.meta["val"].nbytes for v in values) <= 1 << 15
            done += rows
        elif node.target is measure.join:
            told = {row for n in probe.graph.nodes if n.target is measure.take for row in n.args[1:2]}
            assert set(range(node.args[2], node.args[2] + node.args[3])) <= {*done, *told}
    assert len(done) == len(set(done)) > 10
    assert any(n.target is measure.native_several for n in probe.graph.nodes)


def test_weights_that_lie_otherwise_in_memory_are_forced() -> None:
    before = torch.nn.Linear(8, 8).eval()
    after = copy.deepcopy(before)
    after.weight.data = after.weight.data.t().contiguous().t()
    args = (torch.randn(3, 8),)
    plan, _ = repeating(graphprobe.capture(before, args), graphprobe.capture(after, args), args, {})
    assert not plan.repeated and all(isomorphic(r, Weights(plan.before, plan.after)) for r in plan.regions)


def test_what_sums_in_whatever_order_comes_is_forced() -> None:
    args = (torch.randn(6, 8), torch.tensor([0, 1, 1, 2, 3, 3]))
    gm = graphprobe.capture(Unsteady(), args)
    plan, probe = repeating(gm, gm, args, {})
    assert forced_operations(plan, probe) == ["aten.index_add.default"]
    assert 0 < len(plan.repeated) < len(plan.regions)


def test_an_operation_that_differs_from_itself_is_seen_without_the_forced_lane(monkeypatch) -> None:
    """What atomics do, an operator of torch that is not known for it does here."""
    calls = []

    def tanh(x):
        calls.append(None)
        return torch.sigmoid(x) * (1 + 1e-7 * len(calls))

    args = (torch.randn(64, 8),)
    before, after = (graphprobe.capture(torch.nn.Tanh(), args) for _ in range(2))
    monkeypatch.setattr(torch.ops.aten.tanh.default, "_op", tanh)
    report = graphprobe.diff(before, after, args)
    assert report.verdict == "rounding"
    assert any("nondeterministic" in note for note in report.notes), report.notes


class Products(TorchDispatchMode):
    """Counts the matrix products that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("exact", "changed", "forwards"),
    [("never", False, 2), ("auto", False, 2), ("always", False, 5), ("auto", True, 2), ("always", True, 5)],
)
def test_nothing_is_run_beside_the_lanes(exact: str, changed: bool, forwards: int) -> None:
    """Before and free alone where both sides are one program; a wrong number adds its own region, and what cures it."""
    model, args, kwargs = tiny("llama", torch.bfloat16)
    before = graphprobe.capture(model, args, kwargs)
    for layer in model.model.layers[-1:] if changed else ():
        layer.self_attn.scaling *= 1.1
    after = graphprobe.capture(model, args, kwargs)
    with Products() as one, torch.no_grad():
        before(*args, **kwargs)
    with Products() as all_of_them:
        report = graphprobe.diff(before, after, args, kwargs, exact=exact)
    assert report.verdict == ("semantic" if changed else "identical")
    most = 2 if changed else 0
    assert forwards * one.count <= all_of_them.count <= (forwards + most) * one.count

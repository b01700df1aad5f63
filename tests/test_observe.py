"""What a transform does is seen, and only what its author claims is taken for a claim."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule, Node

import graphprobe
from graphprobe import observe
from graphprobe.errors import PipelineError
from graphprobe.pipeline import fresh_copy
from graphprobe.records import Replacement


class Small(torch.nn.Module):
    """relu and neg of one sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        return torch.relu(y) - torch.neg(y)


def traced() -> tuple[GraphModule, dict[str, Node]]:
    gm = torch.fx.symbolic_trace(Small())
    return gm, {node.name: node for node in gm.graph.nodes}


def seen(change: Callable[[GraphModule, dict[str, Node]], object]) -> observe.Observation:
    gm, nodes = traced()
    with observe.watch(gm, "pass") as observation:
        change(gm, nodes)
    gm.graph.lint()
    return observation


def after(node: Node, function: Callable[..., object], *args: object) -> Node:
    with node.graph.inserting_after(node):
        return node.graph.call_function(function, args)


def test_a_replacement_is_a_claim() -> None:
    def change(gm: GraphModule, nodes: dict[str, Node]) -> None:
        old = nodes["relu"]
        old.replace_all_uses_with(after(old, torch.nn.functional.gelu, nodes["add"]))
        gm.graph.erase_node(old)

    found = seen(change)
    assert found.replacements == (Replacement("relu", "gelu", "pass"),)
    assert (found.created, found.erased, found.rewritten) == (("gelu",), ("relu",), ())


def test_chains_are_claimed_link_by_link() -> None:
    def change(gm: GraphModule, nodes: dict[str, Node]) -> None:
        for old_name, function in (("relu", torch.sin), ("sin", torch.cos)):
            old = next(n for n in gm.graph.nodes if n.name == old_name)
            old.replace_all_uses_with(after(old, function, nodes["add"]))
            gm.graph.erase_node(old)

    found = seen(change)
    assert [(r.old, r.new) for r in found.replacements] == [("relu", "sin"), ("sin", "cos")]
    assert (found.created, found.erased) == (("cos",), ("relu",))


def wrap(gm: GraphModule, nodes: dict[str, Node]) -> None:
    """Put an operation behind `add`, which stays its input: not equal to `add`."""
    old = nodes["add"]
    new = after(old, torch.sin, old)
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def one_user(gm: GraphModule, nodes: dict[str, Node]) -> None:
    """Give one of two users another input."""
    nodes["relu"].replace_input_with(nodes["add"], nodes["x"])


def two_targets(gm: GraphModule, nodes: dict[str, Node]) -> None:
    """Send the two users of `add` to different nodes."""
    nodes["relu"].replace_input_with(nodes["add"], after(nodes["add"], torch.sin, nodes["x"]))
    nodes["neg"].replace_input_with(nodes["add"], after(nodes["add"], torch.cos, nodes["x"]))
    gm.graph.erase_node(nodes["add"])


@pytest.mark.parametrize("change", [wrap, one_user, two_targets])
def test_nothing_is_claimed_where_uses_are_left_or_part(change: Callable[..., None]) -> None:
    assert seen(change).replacements == ()


def test_a_renamed_node_keeps_its_old_name_on_the_left_and_has_its_new_one_on_the_right() -> None:
    def change(gm: GraphModule, nodes: dict[str, Node]) -> None:
        old = nodes["relu"]
        new = after(old, torch.sin, nodes["add"])
        old._rename("was_relu")
        new._rename("fused")
        old.replace_all_uses_with(new)
        gm.graph.erase_node(old)

    assert seen(change).replacements == (Replacement("relu", "fused", "pass"),)


def test_assignments_that_fire_no_hook_are_seen() -> None:
    def change(gm: GraphModule, nodes: dict[str, Node]) -> None:
        nodes["add"].args = (nodes["x"], 2)
        nodes["neg"].target = torch.abs
        nodes["sub"].args = (nodes["neg"], nodes["relu"])

    assert seen(change).rewritten == ("add", "neg", "sub")


def test_inputs_that_a_replacement_changed_are_no_rewriting() -> None:
    def change(gm: GraphModule, nodes: dict[str, Node]) -> None:
        old = nodes["add"]
        old.replace_all_uses_with(after(old, operator.sub, nodes["x"], -1))
        gm.graph.erase_node(old)

    assert seen(change).rewritten == ()


class Weighted(torch.nn.Module):
    """A linear layer and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos() + 1, (self.linear(x) + self.shift,))


def weight_put_in_place(gm: GraphModule) -> None:
    gm.linear.weight = torch.nn.Parameter(gm.linear.weight.detach() * 2)


def buffer_put_in_place(gm: GraphModule) -> None:
    gm.register_buffer("shift", gm.shift * 2)


def weight_written_into(gm: GraphModule) -> None:
    with torch.no_grad():
        gm.linear.bias.add_(1)


def operator_of_a_body(gm: GraphModule) -> None:
    for node in gm.true_graph_0.graph.nodes:
        if node.target is torch.ops.aten.sin.default:
            node.target = torch.ops.aten.tan.default
    gm.true_graph_0.recompile()


@pytest.mark.parametrize(
    ("change", "rewritten"),
    [
        (weight_put_in_place, "linear_weight"),
        (buffer_put_in_place, "shift"),
        (weight_written_into, "linear_bias"),
        (operator_of_a_body, "true_graph_0/sin"),
    ],
)
def test_weights_and_bodies_are_watched_too(change: Callable[[GraphModule], None], rewritten: str) -> None:
    gm = graphprobe.capture(Weighted(), (torch.ones(2, 4),))
    with observe.watch(gm) as observation:
        change(gm)
    assert observation.rewritten == (rewritten,) and observation.changed
    assert (observation.created, observation.erased, observation.replacements) == ((), (), ())


@pytest.mark.parametrize("change", [weight_put_in_place, buffer_put_in_place, operator_of_a_body])
def test_a_copy_is_changed_alone(change: Callable[[GraphModule], None]) -> None:
    x = torch.ones(2, 4)
    gm = graphprobe.capture(Weighted(), (x,))
    before = gm(x)
    copy = fresh_copy(gm)
    assert {id(p) for p in copy.parameters()} == {id(p) for p in gm.parameters()}
    change(copy)
    assert torch.equal(gm(x), before) and not torch.equal(copy(x), before)


def test_a_copy_of_a_graph_that_calls_modules_is_changed_alone() -> None:
    gm = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4))))
    copy = fresh_copy(gm)
    weight_of = "1.0.weight"
    assert copy.get_parameter(weight_of) is gm.get_parameter(weight_of)
    copy.get_submodule("1.0").weight = torch.nn.Parameter(torch.zeros(4, 4))
    assert gm.get_parameter(weight_of).abs().sum() > 0


def test_hooks_are_gone_afterwards_even_when_the_transform_raises() -> None:
    gm, _ = traced()
    with pytest.raises(RuntimeError, match="boom"), observe.watch(gm):
        raise RuntimeError("boom")
    with observe.watch(gm) as observation:
        pass
    gm.graph.erase_node(after(next(iter(gm.graph.nodes)), torch.sin, next(iter(gm.graph.nodes))))
    assert observation == observe.Observation()


def test_a_torch_without_hooks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, _ = traced()
    monkeypatch.delattr(GraphModule, "_register_replace_node_hook")
    with pytest.raises(PipelineError, match=r"no FX hook for replace events.*torch 2\.11"), observe.watch(gm):
        pass

"""What a transform does is seen, and only what its author claims is taken for a claim."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule, Node

from graphprobe import observe
from graphprobe.errors import PipelineError
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

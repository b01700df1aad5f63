"""Lint: a clean graph has no defect, and every careless transform is named with its node and a remedy that works."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import graphprobe
from graphprobe import provenance
from graphprobe.errors import InputError
from graphprobe.linting import RULES
from models import NAMES, tiny

aten = torch.ops.aten


def fresh(name: str, dynamic: bool = False) -> GraphModule:
    model, args, kwargs = tiny(name)
    free = {key: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for key in kwargs if key != "use_cache"}
    shapes = {**free, **({"use_cache": None} if "use_cache" in kwargs else {})} if dynamic else None
    return graphprobe.capture(model, args, kwargs, dynamic_shapes=shapes)


def one(gm: GraphModule, target: Any, index: int = 0) -> Node:
    return list(gm.graph.find_nodes(op="call_function", target=target))[index]


def vals(gm: GraphModule) -> list[str]:
    return [str(node.meta.get("val")) for node in gm.graph.nodes]


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_capture_is_clean_and_stays_as_it_is(name: str) -> None:
    gm = fresh(name)
    before, code = vals(gm), gm.code
    assert graphprobe.lint(gm) == ()
    assert (vals(gm), gm.code) == (before, code)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_dynamic_capture_is_clean_and_gains_no_guards(name: str) -> None:
    gm = fresh(name, dynamic=True)
    sizes = [d for node in gm.graph.nodes for d in getattr(node.meta.get("val"), "shape", ())]
    env = next(d for d in sizes if isinstance(d, torch.SymInt)).node.shape_env
    guards = len(env.guards)
    assert graphprobe.lint(gm) == ()
    assert len(env.guards) == guards


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, when it decomposes
@pytest.mark.parametrize("name", ["qwen3", "conv", "mixtral"])
def test_a_decomposed_graph_is_clean(name: str) -> None:
    model, args, kwargs = tiny(name)
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs)
        provenance.stamp(program.graph_module)
        assert graphprobe.lint(graphprobe.capture(program.run_decompositions())) == ()


# --- missing values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["missing", "None"])
def test_every_node_that_lost_its_value_is_named(how: str) -> None:
    gm = fresh("llama")
    lost = []
    for node in gm.graph.nodes:
        if node.meta.get("val") is not None:
            lost.append(node.name)
            if how == "None":
                node.meta["val"] = None
            else:
                del node.meta["val"]
    found = [issue.node for issue in graphprobe.lint(gm, ["missing-val"])]
    assert found == [name for name in lost if how == "missing" or name != "use_cache"]  # an unused input may be None


def test_a_lost_value_is_told_with_its_place_and_what_it_would_be() -> None:
    gm = fresh("llama")
    node = one(gm, aten.linear.default, 3)
    del node.meta["val"]
    (issue,) = graphprobe.lint(gm)
    assert (issue.rule, issue.node, issue.target) == ("missing-val", node.name, "aten.linear.default")
    assert issue.module_path == "model.layers.0.self_attn.o_proj"
    assert issue.source.startswith("linear.py:")
    assert "float32[2, 16, 64]" in issue.message
    assert "FakeTensorProp" in issue.fix


def test_the_recipe_mends_the_graph() -> None:
    gm = fresh("llama")
    wanted = [str(node.meta["val"]) for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default)]
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta.pop("val", None)
    (fix,) = {issue.fix for issue in graphprobe.lint(gm)}
    recipe = fix.rpartition("for the whole graph, ")[2]
    steps, _, inputs = recipe.partition(", where ")
    scope: dict[str, Any] = {"gm": gm, "FakeTensorProp": FakeTensorProp}
    exec(f"{inputs}\n{steps}".replace("; ", "\n"), scope)
    assert graphprobe.lint(gm) == ()
    found = [str(node.meta["val"]) for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default)]
    assert found == wanted


def test_a_custom_operator_without_a_shape_function_is_told_to_register_one() -> None:
    torch.library.define("graphprobe_tests::shapeless", "(Tensor x) -> Tensor")
    torch.library.impl("graphprobe_tests::shapeless", "CPU", lambda x: x.clone())
    gm = fresh("custom")
    node = one(gm, torch.ops.graphprobe_tests.scaled_silu.default)
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(torch.ops.graphprobe_tests.shapeless.default, (node,))
    node.replace_all_uses_with(new, lambda user: user is not new)
    (issue,) = graphprobe.lint(gm)
    assert issue.node == new.name
    assert 'register_fake("graphprobe_tests::shapeless")' in issue.fix


def test_operators_without_a_result_are_exempt() -> None:
    gm = fresh("llama")
    checks = [n for n in gm.graph.nodes if n.target is aten._assert_tensor_metadata.default]
    assert checks
    for node in checks:
        node.meta.pop("val", None)
    assert graphprobe.lint(gm) == ()


def test_bodies_of_control_flow_are_looked_into() -> None:
    gm = fresh("branch")
    body = gm.get_submodule("true_graph_0")
    node = one(body, aten.sin.default)  # type: ignore[arg-type]
    del node.meta["val"]
    (issue,) = graphprobe.lint(gm)
    assert issue.node == "true_graph_0/sin"


class Autocast(nn.Module):
    """Computes in bfloat16 inside an autocast region."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float() + 1


def test_a_body_under_autocast_is_judged_under_autocast() -> None:
    gm = graphprobe.capture(Autocast(), (torch.ones(2, 4),))
    assert "wrap_with_autocast" in gm.code
    assert graphprobe.lint(gm) == ()


# --- stale values ----------------------------------------------------------------------------------------------------


def other_dtype(gm: GraphModule) -> Node:
    node = one(gm, aten.to.dtype, -1)
    node.args = (node.args[0], torch.float16)
    return node


def other_target(gm: GraphModule) -> Node:
    node = one(gm, aten.mean.dim, -1)
    node.args = (*node.args[:2], False)
    return node


def other_shape(gm: GraphModule) -> Node:
    node = one(gm, aten.cat.default, -1)
    node.args = ([*node.args[0], node.args[0][0]], -1)
    return node


def other_stride(gm: GraphModule) -> Node:
    node = one(gm, aten.linear.default, 0)
    val = node.meta["val"]
    with val.fake_mode:
        node.meta["val"] = torch.empty_strided(val.shape, (64, 128, 1), dtype=val.dtype)
    return node


def other_weight(gm: GraphModule) -> Node:
    (node,) = (n for n in gm.graph.nodes if n.target == "model.norm.weight")
    gm.get_submodule("model.norm").weight = nn.Parameter(torch.ones(1, 64, dtype=torch.float64))
    return node


STATIC = [(change, False) for change in (other_dtype, other_target, other_shape, other_stride, other_weight)]
DYNAMIC = [(change, True) for change in (other_dtype, other_shape)]


@pytest.mark.parametrize(("change", "dynamic"), STATIC + DYNAMIC)
def test_a_stale_value_is_found_at_its_root(change: Callable[[GraphModule], Node], dynamic: bool) -> None:
    gm = fresh("llama", dynamic)
    node = change(gm)
    issues = graphprobe.lint(gm, ["stale-val"])
    assert [issue.node for issue in issues] == [node.name]
    assert "says" in issues[0].message and "but it is" in issues[0].message


def test_two_stale_values_are_two_defects_even_when_one_follows_the_other() -> None:
    gm = fresh("mlp")
    first, second = one(gm, aten.view.default), one(gm, aten.slice.Tensor)
    first.args = (first.args[0], [4, 8, 4, 16])
    second.args = (*second.args[:3], 7)
    assert [issue.node for issue in graphprobe.lint(gm, ["stale-val"])] == [first.name, second.name]


def test_a_stride_over_one_element_means_nothing() -> None:
    gm = graphprobe.capture(nn.Linear(4, 4), (torch.ones(1, 4),))
    node = one(gm, aten.linear.default)
    val = node.meta["val"]
    with val.fake_mode:
        node.meta["val"] = torch.empty_strided((1, 4), (99, 1))
    assert graphprobe.lint(gm) == ()


# --- the other rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lambda", "closure", "partial"])
def test_a_target_without_a_name_is_found(kind: str) -> None:
    gm = fresh("custom")
    node = one(gm, aten.add.Tensor)

    def inner(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    node.target = {"lambda": lambda x, y: x + y, "closure": inner, "partial": functools.partial(torch.add)}[kind]
    (issue,) = graphprobe.lint(gm)
    assert (issue.rule, issue.node) == ("python-closure", node.name)
    assert "0x" not in issue.target


def test_functions_with_a_name_are_no_closures() -> None:
    gm = fresh("custom")
    one(gm, aten.add.Tensor).target = operator.add
    assert graphprobe.lint(gm) == ()


def test_dead_operations_are_found_with_those_that_feed_only_them() -> None:
    gm = fresh("mlp")
    node = one(gm, aten.linear.default)
    with gm.graph.inserting_after(node):
        used = gm.graph.call_function(aten.exp.default, (node,))
    with gm.graph.inserting_after(used):
        unused = gm.graph.call_function(aten.sin.default, (used,))
    for new in (used, unused):
        new.meta["val"] = node.meta["val"]
    assert [issue.node for issue in graphprobe.lint(gm)] == [used.name, unused.name]
    gm.graph.eliminate_dead_code()  # the remedy that it names
    assert graphprobe.lint(gm) == ()


def test_an_id_on_two_operations_is_found() -> None:
    gm = fresh("llama")
    first, second = one(gm, aten.linear.default, 4), one(gm, aten.linear.default, 11)
    found = provenance.node_id(first)
    assert found is not None
    provenance.set_id(second, found)
    (issue,) = graphprobe.lint(gm)
    assert (issue.rule, issue.node) == ("copied-id", second.name)
    assert first.name in issue.message


def test_an_orphaned_parameter_is_found() -> None:
    gm = fresh("conv")
    gm.register_parameter("left_over", nn.Parameter(torch.ones(3, 5, dtype=torch.bfloat16)))
    (issue,) = graphprobe.lint(gm)
    assert (issue.rule, issue.node) == ("orphaned-parameter", "left_over")
    assert "bfloat16[3, 5], 30 bytes" in issue.message


def test_rules_can_be_chosen() -> None:
    gm = fresh("mlp")
    del one(gm, aten.linear.default).meta["val"]
    gm.register_parameter("left_over", nn.Parameter(torch.ones(2)))
    for rule in RULES:
        assert {issue.rule for issue in graphprobe.lint(gm, [rule])} <= {rule}
    assert len(graphprobe.lint(gm)) == 2
    with pytest.raises(InputError, match=r"'mising-val'; did you mean 'missing-val'\?"):
        graphprobe.lint(gm, ["mising-val"])

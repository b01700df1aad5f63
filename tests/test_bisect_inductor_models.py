"""Inductor over models of many kinds: honest ones are not blamed, a pass that spoils one node is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import nn

import bisect_models
import graphprobe
import models
from bisect_models import HOOKS, Spoil, mlp, needs_compiler
from graphprobe.bisection.records import Bisection
from graphprobe.capturing import quiet


class Cached(nn.Module):
    """Attention over a cache in its buffers: each call writes one row and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(4, 8))
        self.register_buffer("length", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.index_copy_(0, self.length.view(1), self.keys(x))
        self.length.add_(1)
        return torch.softmax(x @ self.cache.t(), -1) @ self.cache


class Broken(nn.Module):
    """How it goes on depends on a number, so that Dynamo makes several graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x if x.sum().item() > 1e9 else torch.softmax(self.second(x.relu()), -1)


def seeded(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


@needs_compiler
def test_state_is_compared_and_left_as_it_was() -> None:
    model, x = seeded(Cached), torch.randn(1, 8)
    found = graphprobe.bisect(model, (x,), pipeline="inductor")
    assert found.ok and int(model.length) == 0 and not model.cache.any()  # type: ignore[operator]
    assert found.steps[-1].what == "eager against the compiled model, end to end"


@needs_compiler
def test_graphs_around_a_break_are_judged_each() -> None:
    found = graphprobe.bisect(seeded(Broken), (torch.randn(4, 8),), pipeline="inductor")
    assert found.ok
    assert {"graph 0: dynamo against aot", "graph 1: dynamo against aot"} <= {step.what for step in found.steps}


@needs_compiler
def test_an_exported_program_goes_through_inductor() -> None:
    model, args = mlp()
    assert graphprobe.bisect(torch.export.export(model, args), args, pipeline="inductor").ok


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(7, 7)


class Dropped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True) + x


@needs_compiler
@pytest.mark.parametrize(("kind", "reason"), [(Raises, "the model itself raises"), (Dropped, "draws random numbers")])
def test_what_cannot_be_judged_is_unknown(kind: type[nn.Module], reason: str) -> None:
    found = graphprobe.bisect(seeded(kind), (torch.randn(4, 8),), pipeline="inductor")
    assert (found.verdict, found.transform) == ("unknown", None)
    assert any(reason in text for text in (*found.notes, *(step.reason for step in found.steps)))


# --- honest models ---------------------------------------------------------------------------------------------------


def assert_not_blamed(found: Bisection) -> None:
    assert (found.verdict, found.transform, found.transforms) == ("good", None, ())
    assert found.report is not None and found.report.verdict in ("identical", "rounding")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "mistral", "mixtral", "conv", "mlp", "branch"])
def test_honest_models_are_not_blamed(name: str, dtype: torch.dtype) -> None:
    if name in models.TEXT:
        pytest.importorskip("transformers")
    model, args, kwargs = models.tiny(name, dtype)
    found = graphprobe.bisect(model, args, kwargs, pipeline="inductor")
    assert_not_blamed(found)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", bisect_models.NAMES)
def test_other_honest_models_are_not_blamed(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    model, args, kwargs = bisect_models.build(name, dtype)
    assert_not_blamed(graphprobe.bisect(model, args, kwargs, pipeline="inductor"))


# --- planted passes --------------------------------------------------------------------------------------------------


def planted(hook: str, spoil: Spoil, case: models.Case) -> Bisection:
    model, args, kwargs = case
    with inductor.patch({hook: spoil}):
        return graphprobe.bisect(model, args, kwargs, pipeline="inductor")


@needs_compiler
@pytest.mark.parametrize("hook", HOOKS)
def test_a_pass_that_spoils_one_node_is_named_by_stage_and_name(hook: str) -> None:
    found = planted(hook, Spoil(bisect_models.too_large), (*mlp(), {}))
    assert found.transforms == (f"{HOOKS[hook]}: {hook}",)
    assert found.report is not None and found.report.verdict == "semantic"
    assert found.match is not None and found.match.startswith("aten.")


@needs_compiler
@pytest.mark.parametrize(
    "hook", ["post_grad_custom_post_pass", pytest.param("joint_custom_post_pass", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("make", "verdict"),
    [
        (bisect_models.no_lowering, "semantic"),
        (bisect_models.no_shape, "structural"),
        (bisect_models.out_of_luck, "structural"),
        (bisect_models.infinite, "nonfinite"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_pass_that_makes_the_compiler_fail_is_named_too(hook: str, make: Any, verdict: str) -> None:
    found = planted(hook, Spoil(make), (*mlp(), {}))
    assert found.transforms == (f"{HOOKS[hook]}: {hook}",)
    assert found.report is not None and found.report.verdict == verdict


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["gpt_neox", "opt", "vit"])
def test_a_pass_that_spoils_one_node_of_a_model_is_named(name: str, hook: str, seed: int) -> None:
    pytest.importorskip("transformers")
    found = planted(hook, Spoil(bisect_models.too_large, seed), bisect_models.build(name))
    assert found.transforms == (f"{HOOKS[hook]}: {hook}",)


# --- planted lowerings -----------------------------------------------------------------------------------------------


class Tanhs(nn.Module):
    """Three layers, each with a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return x


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("by_pattern", [True, False], ids=["pattern", "operation"])
def test_a_wrong_lowering_is_named_by_its_pattern_or_its_operation(
    by_pattern: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet():  # torch's own imports warn
        from torch._inductor import lowering
        from torch._inductor.fx_passes import post_grad
        from torch._inductor.pattern_matcher import Arg, CallFunction, PatternMatcherPass, register_lowering_pattern

    tanh, mul = (lowering.lowerings[op] for op in (torch.ops.aten.tanh.default, torch.ops.aten.mul.Tensor))

    def wrong_tanh(match: Any, x: Any) -> Any:
        return mul(tanh(x), 1.01)

    if by_pattern:
        mine = PatternMatcherPass(pass_name="mine")
        register_lowering_pattern(CallFunction(torch.ops.aten.tanh.default, Arg()), pass_dict=mine)(wrong_tanh)
        monkeypatch.setattr(post_grad, "pass_patterns", [*post_grad.pass_patterns, mine])
    else:
        monkeypatch.setitem(lowering.lowerings, torch.ops.aten.tanh.default, lambda x: wrong_tanh(None, x))
    found = graphprobe.bisect(seeded(Tanhs), (torch.randn(4, 8),), pipeline="inductor")
    assert found.transforms == ("codegen",) and found.match is not None
    assert found.match.startswith("wrong_tanh at tanh" if by_pattern else "aten.tanh.default at tanh")

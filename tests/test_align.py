"""Alignment: what claims what, from which evidence, and that nothing is claimed that should not be."""

from __future__ import annotations

import copy
import operator
import random
from typing import Any

import pytest
import torch

import graphprobe
from corpus import mutations
from graphprobe import align, inputs
from graphprobe.errors import OperatorError
from graphprobe.program import copied, program
from models import NAMES, tiny
from plain_llama import PlainLlama

# torch warns about its own pytree classes when it copies a program
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
DTYPES = [torch.float32, torch.bfloat16]


def claims(
    before: torch.fx.GraphModule, after: torch.fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, str]:
    left, right = program(before, args, kwargs), copied(program(after, args, kwargs))
    found = align.align(left, right, (), inputs.bind(before, args, kwargs, "before"))
    return {right.label(c.after): left.label(c.before) for c in found.claims}


class Wrapped(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits}


def two_llamas(dtype: torch.dtype, bug: str = "") -> tuple[torch.nn.Module, torch.nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    # the rotary table stays float32, as transformers loads it
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    ids = torch.randint(0, 128, (2, 12))
    return Wrapped(model), PlainLlama(model, bug), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "mixtral" else ()) for n in NAMES])
def test_every_value_claims_itself_at_every_level_of_evidence(name: str) -> None:
    model, args, kwargs = tiny(name)
    before = graphprobe.capture(model, args, kwargs)
    for level in ("ids", "modules", "values"):
        after = mutations.strip(before, level)
        names = dict(zip((n.name for n in after.graph.nodes), (n.name for n in before.graph.nodes), strict=True))
        found = claims(before, after, args, kwargs)
        wrong = {y: x for y, x in found.items() if names.get(y, x) != x}
        assert len(wrong) <= 0.02 * len(found), wrong  # equal values may stand for each other
        assert found


@pytest.mark.parametrize("level", ["ids", "modules", "values"])
def test_claims_of_unchanged_nodes_survive_a_change_elsewhere(level: str) -> None:
    model, args, kwargs = tiny("llama")
    before = graphprobe.capture(model, args, kwargs)
    rng = random.Random(3)
    right = total = 0
    for _ in range(6):
        mutant = mutations.draw(before, rng, benign=rng.random() < 0.5)
        if mutant is None:
            continue
        after = mutations.strip(mutant.gm, level)
        names = dict(zip((n.name for n in after.graph.nodes), (n.name for n in mutant.gm.graph.nodes), strict=True))
        original = {n.name for n in before.graph.nodes} - set(mutant.nodes)
        for y, x in claims(before, after, args, kwargs).items():
            if names[y] in original:
                total += 1
                right += names[y] == x
    # with nothing but values, nodes that hold equal values (a norm's weights are all ones here) stand for each other
    assert right >= (0.95 if level == "values" else 0.99) * total > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_implementations_with_nothing_in_common_but_the_mathematics(dtype: torch.dtype) -> None:
    before, after, kwargs = two_llamas(dtype)
    report = graphprobe.diff(before, after, (), kwargs, min_coverage=0.6)
    assert report.verdict == "rounding", (report.coverage, report.findings)
    assert report.coverage.evidence["value"] > report.coverage.evidence["layout"] > 0


@pytest.mark.parametrize(("bug", "layer"), [("scale", "layers.2"), ("gate", "layers.1")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bug_between_two_implementations_is_one_finding_in_its_layer(
    dtype: torch.dtype, bug: str, layer: str
) -> None:
    before, after, kwargs = two_llamas(dtype, bug)
    report = graphprobe.diff(before, after, (), kwargs)
    assert report.verdict == "semantic"
    assert [layer in f.module_path for f in report.findings] == [True], report.findings


@pytest.mark.parametrize("name", ["llama", "bert", pytest.param("mixtral", marks=pytest.mark.slow), "conv"])
def test_decompositions_align_by_ids(name: str) -> None:
    model, args, kwargs = tiny(name)
    with torch.no_grad():
        program_ = torch.export.export(model, args, kwargs, strict=False)
    before = graphprobe.capture(program_)
    report = graphprobe.diff(before, program_.run_decompositions(), args, kwargs)
    assert report.verdict in ("identical", "rounding"), [(f.kind, f.culprit, f.exact) for f in report.findings]
    assert report.coverage.resolution >= 0.9
    assert report.coverage.evidence["id"] >= 0.5 * report.coverage.compared


def test_ids_survive_copies_and_files(tmp_path: Any) -> None:
    model, args, kwargs = tiny("llama")
    before = graphprobe.capture(model, args, kwargs)
    graphprobe.save(before, tmp_path / "before.fx", args=args, kwargs=kwargs)
    report = graphprobe.diff(before, tmp_path / "before.fx", args, kwargs)
    assert report.verdict == "identical" and set(report.coverage.evidence) == {"id"}
    assert graphprobe.diff(tmp_path / "before.fx", tmp_path / "before.fx").verdict == "identical"


def test_another_lineage_claims_nothing_by_id() -> None:
    model, args, kwargs = tiny("gpt2")
    report = graphprobe.diff(model, copy.deepcopy(model), args, kwargs)
    assert "id" not in report.coverage.evidence and report.verdict == "identical"


class Halves(torch.nn.Module):
    """Writes into a tensor, so that it has to be made functional, and takes the results of one operator apart."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, places = (x * 2).topk(4, -1)
        best.add_(places)
        mean, spread = torch.var_mean(best, -1, keepdim=True)
        return (best - spread) * mean


def test_graphs_that_cannot_be_run_are_named_with_the_operation_that_raises() -> None:
    """Whatever evidence runs a graph leaves it to the comparison to say what raises, in which graph and where."""
    sides = []
    for activation in (torch.nn.ReLU(), torch.nn.Tanh()):  # unlike, so that alignment runs them
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 16), activation, torch.nn.Linear(16, 16))
        gm = graphprobe.capture(model, (torch.randn(8, 16),))
        last = [n for n in gm.graph.nodes if n.op == "get_attr"][-2]
        holder, _, name = str(last.target).rpartition(".")
        weight = getattr(gm.get_submodule(holder), name)
        weight.data = weight.data.bfloat16()
        sides.append(mutations.strip(gm, "values"))
    with pytest.raises(OperatorError, match=r"before cannot be run: .*aten\.linear\.default"):
        graphprobe.diff(*sides, (torch.randn(8, 16),))


def test_each_result_of_an_operator_has_the_name_the_user_knows() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    gm = graphprobe.capture(Halves(), (x,))
    one = program(gm, (x,), {})
    taken = [n.name for n in gm.graph.nodes if n.target is operator.getitem]
    assert len(taken) == 4 and one.gm is not gm
    labels = [one.label(n) for n in one.live if n.target is operator.getitem]
    assert labels == taken
    named = claims(gm, copy.deepcopy(gm), (x,), {})
    assert all(y == x for y, x in named.items()) and set(taken) - {"getitem"} <= named.keys()

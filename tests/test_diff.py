"""The main job: two graphs in, the guilty operation out. Corpora of tiny models x changes x dtypes."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import graphprobe
from corpus import mutations
from graphprobe import errors
from models import NAMES, tiny

DTYPES = [torch.float32, torch.bfloat16]
GRAVE = ("quantization", "precision", "semantic", "nonfinite", "structural")


def captured(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.fx.GraphModule, tuple, dict]:
    model, args, kwargs = tiny(name, dtype)
    return graphprobe.capture(model, args, kwargs), args, kwargs


def changed(gm: torch.fx.GraphModule, kind: str, node: str) -> torch.fx.GraphModule:
    table = {**mutations.DEFECTS, **mutations.BENIGN}
    after = mutations.fork(gm)
    target = next(n for n in after.graph.nodes if n.name == node)
    assert table[kind](after, target) is not None
    after.recompile()
    return after


@pytest.mark.parametrize("name", NAMES)
def test_a_model_agrees_with_itself(name: str) -> None:
    model, args, kwargs = tiny(name)
    report = graphprobe.diff(model, copy.deepcopy(model), args, kwargs)
    assert report.verdict == "identical" and report.ok and report.exit_code == 0
    assert report.findings == () and report.first is None
    assert report.coverage.resolution == 1.0 and report.coverage.compared > 0
    assert all(output.identical for output in report.outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_attention_scale_below_one_ulp_is_the_only_finding(dtype: torch.dtype) -> None:
    model, args, kwargs = tiny("llama", dtype)
    before = graphprobe.capture(model, args, kwargs)
    model.model.layers[1].self_attn.scaling *= 1.001
    after = graphprobe.capture(model, args, kwargs)
    for exact in ("auto", "always"):
        report = graphprobe.diff(before, after, args, kwargs, exact=exact)
        assert report.verdict == "semantic" and report.exit_code == 1
        assert [f.module_path for f in report.findings] == ["model.layers.1.self_attn"]
        first = report.first
        assert first is not None and "scaled_dot_product_attention" in first.op
        assert first.culprit in first.after and first.located
        assert first.cures is not None and first.cures > 0.99
        assert first.exact is not None and 1e-9 < first.exact < 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_another_attention_kernel_is_rounding(name: str, dtype: torch.dtype) -> None:
    model, args, kwargs = tiny(name, dtype)
    before = graphprobe.capture(model, args, kwargs)
    model.set_attn_implementation("eager")
    report = graphprobe.diff(before, graphprobe.capture(model, args, kwargs), args, kwargs)
    assert report.verdict == "rounding" and report.ok
    assert not [f for f in report.findings if f.kind in GRAVE]
    assert report.coverage.resolution >= 0.9


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_lowering_to_bf16_is_rounding(name: str) -> None:
    model, args, kwargs = tiny(name)
    report = graphprobe.diff(model, copy.deepcopy(model).to(torch.bfloat16), args, kwargs)
    assert report.verdict in ("rounding", "precision")
    # the only things lowered too coarsely may be the rotary tables, which are buffers that .to() casts too
    assert all("rotary" in f.module_path for f in report.findings if f.kind in GRAVE)


@pytest.mark.parametrize("level", ["ids", "modules", "values"])
def test_drawn_defects_are_named_and_drawn_rewrites_are_not(level: str) -> None:
    rng = random.Random(level)
    gm, args, kwargs = captured("llama")
    for _ in range(4):
        for benign in (True, False):
            mutant = mutations.draw(gm, rng, benign)
            if mutant is None:
                continue
            report = graphprobe.diff(gm, mutations.strip(mutant.gm, level), args, kwargs)
            grave = [f for f in report.findings if f.kind in GRAVE]
            if benign:
                assert not grave, (mutant.change, mutant.nodes)
            elif not report.outputs[0].identical:
                assert grave, (mutant.change, mutant.nodes)


def test_auto_and_always_agree() -> None:
    rng = random.Random(5)
    gm, args, kwargs = captured("gpt2", torch.bfloat16)
    for _ in range(4):
        mutant = mutations.draw(gm, rng, benign=rng.random() < 0.5)
        if mutant is None:
            continue
        auto = graphprobe.diff(gm, mutant.gm, args, kwargs, exact="auto")
        always = graphprobe.diff(gm, mutant.gm, args, kwargs, exact="always")
        assert auto.verdict == always.verdict
        assert [(f.kind, f.culprit) for f in auto.findings if f.kind in GRAVE] == [
            (f.kind, f.culprit) for f in always.findings if f.kind in GRAVE
        ]


def test_two_bugs_are_two_findings() -> None:
    gm, args, kwargs = captured("llama")
    after = changed(changed(gm, "wrong row", "linear_3"), "wrong row", "linear_10")
    report = graphprobe.diff(gm, after, args, kwargs)
    assert [f.outputs[1] for f in report.findings] == ["linear_3", "linear_10"]
    assert report.first is report.findings[0]


def test_padding_is_left_out_and_counted() -> None:
    model, args, kwargs = tiny("llama")
    kwargs["attention_mask"][0, :5] = 0
    before = graphprobe.capture(model, args, kwargs)
    model.set_attn_implementation("eager")
    after = graphprobe.capture(model, args, kwargs)
    report = graphprobe.diff(before, after, args, kwargs)
    assert report.verdict == "rounding", [(f.kind, f.outputs, f.exact) for f in report.findings]
    assert report.coverage.dont_care > 0 and any("padded" in note for note in report.notes)


def test_an_operation_that_raises_is_structural_and_the_rest_is_judged() -> None:
    gm, args, kwargs = captured("llama")
    after = mutations.fork(gm)
    node = next(n for n in after.graph.nodes if n.name == "linear_10")
    node.args = (node.args[0], node.args[0])
    after.recompile()
    report = graphprobe.diff(gm, after, args, kwargs)
    assert report.verdict == "structural" and report.exit_code == 1
    assert report.first is not None and report.first.after == ("linear_10",)
    assert report.coverage.compared > 10


def test_a_value_that_overflows_on_one_side_is_nonfinite() -> None:
    class Net(torch.nn.Module):
        def __init__(self, big: float) -> None:
            super().__init__()
            self.big = big

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ((x * self.big) / self.big).exp()

    x = torch.linspace(1, 2, 64).half().reshape(4, 16)
    report = graphprobe.diff(Net(16.0), Net(60000.0), (x,))
    assert report.verdict == "nonfinite"
    swapped = graphprobe.diff(Net(60000.0), Net(16.0), (x,))
    assert swapped.verdict != "nonfinite"
    assert any(f.better == "after" for f in swapped.findings)


def test_in_place_and_functional_are_the_same_program() -> None:
    class InPlace(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            y[:, 1].add_(1)
            return y.relu_()

    class Functional(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            y = torch.cat([y[:, :1], y[:, 1:2] + 1, y[:, 2:]], 1)
            return y.relu()

    report = graphprobe.diff(InPlace(), Functional(), (torch.randn(4, 6),))
    assert report.verdict == "identical", report.findings


def test_inputs_are_drawn_the_same_way_every_time() -> None:
    gm, _, _ = captured("llama")
    assert graphprobe.diff(gm, mutations.fork(gm)).verdict == "identical"


def test_accept_and_allow() -> None:
    gm, args, kwargs = captured("llama")
    after = changed(gm, "wrong row", "linear_3")
    refused = graphprobe.diff(gm, after, args, kwargs)
    accepted = graphprobe.diff(gm, after, args, kwargs, accept=["linear_3:semantic:1.0"])
    assert refused.exit_code == 1 and accepted.exit_code == 0
    assert accepted.findings[0].accepted and accepted.verdict == "rounding"
    assert graphprobe.diff(gm, after, args, kwargs, allow=["semantic"]).ok
    with pytest.raises(errors.InputError, match="NODE:KIND:BOUND"):
        graphprobe.diff(gm, after, args, kwargs, accept=["linear_3"])


def test_a_report_survives_json() -> None:
    gm, args, kwargs = captured("llama")
    report = graphprobe.diff(gm, changed(gm, "wrong row", "linear_3"), args, kwargs)
    again = graphprobe.Report.from_json(report.to_json())
    assert again == report and again.first == report.first


class TestBadInput:
    """Each mistake gets one clear sentence."""

    def test_shape(self) -> None:
        gm, args, kwargs = captured("llama")
        kwargs["input_ids"] = kwargs["input_ids"][:, :5]
        with pytest.raises(errors.InputError, match=r"input_ids.*shape"):
            graphprobe.diff(gm, mutations.fork(gm), args, kwargs)

    def test_dtype(self) -> None:
        gm, args, kwargs = captured("llama")
        kwargs["input_ids"] = kwargs["input_ids"].float()
        with pytest.raises(errors.InputError, match=r"dtype float32.*int64"):
            graphprobe.diff(gm, mutations.fork(gm), args, kwargs)

    def test_missing(self) -> None:
        gm, args, kwargs = captured("llama")
        del kwargs["attention_mask"]
        with pytest.raises(errors.InputError, match="attention_mask"):
            graphprobe.diff(gm, mutations.fork(gm), args, kwargs)

    def test_other_number_of_outputs(self) -> None:
        left, args, _ = captured("mlp")
        right = graphprobe.capture(torch.nn.Linear(32, 32), args)
        with pytest.raises(errors.MismatchError, match="returns"):
            graphprobe.diff(left, right, args)

    def test_no_graph(self) -> None:
        with pytest.raises(errors.CaptureError, match="int"):
            graphprobe.diff(3, 4, (torch.ones(1),))  # type: ignore[arg-type]


class Gated(torch.nn.Module):
    """Adds something only where an input is positive: one input set may hide what another shows."""

    def __init__(self, added: float) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.where(x > 0, x + self.added, x)
        return y if shift is None else y + shift


def test_several_input_sets_are_joined() -> None:
    right, wrong, negative, positive = Gated(1.0), Gated(1.1), -torch.ones(4), torch.ones(4)
    hidden = graphprobe.diff(right, wrong, (negative,))
    assert hidden.verdict == "identical" and hidden.coverage.pardoned == 1  # nothing depends on it here, and it is said
    for shown in (0, 1):
        sets = [(negative,), (negative,)]
        sets[shown] = (positive,)
        report = graphprobe.diff(right, wrong, sets)
        assert report.verdict == "semantic" and len(report.findings) == 1
        assert report.first is not None and report.first.inputs == shown
        assert report.outputs[0].error is not None and report.outputs[0].error > 0.01
    assert graphprobe.diff(right, Gated(1.0), [(negative,), (positive,)]).verdict == "identical"


def test_sets_of_other_shapes_and_of_named_inputs() -> None:
    sets = [{"x": torch.ones(n), "shift": torch.ones(n)} for n in (3, 5)]
    assert graphprobe.diff(Gated(1.0), Gated(1.0), kwargs=sets).verdict == "identical"
    report = graphprobe.diff(Gated(1.0), Gated(1.5), [(torch.ones(3),), (torch.ones(5),)], {"shift": torch.zeros(1)})
    assert report.verdict == "semantic"
    with pytest.raises(errors.InputError, match="sets of args"):
        graphprobe.diff(Gated(1.0), Gated(1.5), [(torch.ones(3),)], sets)


def test_an_assertion_for_unit_tests() -> None:
    from graphprobe.testing import assert_equivalent

    x = torch.ones(4)
    assert assert_equivalent(Gated(1.0), Gated(1.0), (x,)).ok
    assert graphprobe.testing.assert_equivalent(Gated(1.0), Gated(1.5), (x,), allow=("semantic",)).verdict == "semantic"
    with pytest.raises(AssertionError, match=r"semantic.*add"):
        assert_equivalent(Gated(1.0), Gated(1.5), (x,))


class Counting(torch.nn.Module):
    """Counts its calls in a buffer, so that its graph has to be made functional before it is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.norm(x) * self.calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_graph_that_writes_in_place_is_made_functional_in_the_dtype_it_takes(dtype: torch.dtype) -> None:
    model, x = Counting().eval(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    before = graphprobe.capture(model, (x,))
    after = graphprobe.capture(copy.deepcopy(model).to(dtype), (x.to(dtype),))
    report = graphprobe.diff(before, after, (x,))
    assert report.verdict == "rounding", report

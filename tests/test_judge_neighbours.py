"""What neighbouring tools get wrong, and coverage that can never be vacuous."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprobe
from graphprobe import errors
from judge_tools import Pair, module, randn
from models import tiny

SAME = ("identical", "rounding")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


class InPlace(nn.Module):
    """Writes into what it has made; loggers that keep references see what was written later."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        z = y[:, :8]
        y.add_(60)
        z.mul_(0.5)
        return y.relu() + z.sum()


def test_a_model_that_writes_in_place_agrees_with_its_own_decomposition() -> None:
    model, x = InPlace().eval(), randn(4, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own treespecs
        decomposed = torch.export.export(model, (x,), strict=False).run_decompositions({})
    report = graphprobe.diff(model, decomposed, (x,))
    assert report.verdict in SAME and not [f for f in report.findings if f.kind not in SAME]
    wrong = copy.deepcopy(model)
    wrong.linear.bias.data[3] += 1e-3
    report = graphprobe.diff(wrong, decomposed, (x,))
    assert report.verdict == "semantic"


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_nan_in_both_is_agreement_and_hides_nothing_beside_it(dtype: torch.dtype) -> None:
    x = randn(8, 16, dtype=dtype)
    log = module(lambda m, x: torch.log(x) * 2)
    Pair(log, module(lambda m, x: 2 * torch.log(x)), (x,), SAME).check()
    Pair(log, module(lambda m, x: torch.log(x) * 2.002), (x,), "semantic").check()


@pytest.mark.parametrize(
    "turn", [lambda y: -y.flip(-1), lambda y: y.flip(-1), lambda y: -y], ids=["both", "flip", "sign"]
)
def test_what_keeps_norms_and_sums_of_bits_is_still_seen(turn: object) -> None:
    before = module(lambda m, x: torch.tanh(x @ m.w), w=randn(16, 16))
    after = module(lambda m, x: turn(torch.tanh(x @ m.w)), w=randn(16, 16))  # type: ignore[operator]
    Pair(before, after, (randn(8, 16),), "semantic").check()


@pytest.mark.parametrize(("dtype", "off"), [(FP32, 0.09), (FP32, 1e-4), (BF16, 3.0), (BF16, 0.03)], ids=str)
def test_one_element_in_a_million_is_found_and_named(dtype: torch.dtype, off: float) -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return y + m.delta

    delta = torch.zeros(1024, 1024, dtype=dtype)
    wrong = delta.clone()
    wrong[700, 41] = off
    pair = Pair(
        module(forward, delta=delta), module(forward, delta=wrong), (randn(1024, 1024, dtype=dtype),), "semantic"
    )
    report = pair.check()
    assert report.first is not None and ("700" in report.first.hint or "41" in report.first.hint), report.first.hint


def test_one_zeroed_row_in_a_thousand_is_found() -> None:
    w = randn(1000, 64)
    wrong = w.clone()
    wrong[371] = 0
    linear = lambda m, x: F.linear(x, m.w)  # noqa: E731
    Pair(module(linear, w=w), module(linear, w=wrong), (randn(4, 64),), "semantic", says="371").check()


@pytest.mark.parametrize("dtype", [FP64, BF16], ids=str)
def test_another_dtype_is_compared_and_hides_no_zeroed_weight(dtype: torch.dtype) -> None:
    before = nn.Sequential(nn.Embedding(20, 32), nn.GELU(), nn.Linear(32, 16)).eval()
    after = copy.deepcopy(before).to(dtype)
    x = torch.arange(20).reshape(4, 5)
    assert graphprobe.diff(before, after, (x,)).verdict == "rounding"
    after[2].weight.data.zero_()
    report = graphprobe.diff(before, after, (x,))
    assert report.verdict == "semantic" and report.first is not None and report.first.module_path == "2"
    assert "never loaded" in report.first.hint


class TestCoverage:
    """A report that compared nothing is a failure, never a pass."""

    @pytest.mark.parametrize(
        "function", [lambda m, x: x, lambda m, x: x.view(-1), lambda m, x: x[1:]], ids=["input", "view", "slice"]
    )
    def test_nothing_that_computes(self, function: object) -> None:
        report = graphprobe.diff(module(function), module(function), (randn(4, 8),))  # type: ignore[arg-type]
        assert report.verdict == "unknown" and report.exit_code == 2 and report.coverage.compared == 0

    def test_without_exact_arithmetic_nothing_else_passes(self) -> None:
        before, after = module(lambda m, x: x.softmax(-1)), module(lambda m, x: x.exp() / x.exp().sum(-1, keepdim=True))
        report = graphprobe.diff(before, after, (randn(4, 8),), exact="never")
        assert report.verdict == "unknown" and report.exit_code == 2

    def test_the_share_that_is_needed_can_be_set(self) -> None:
        def long(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
            for _ in range(40):  # as one operation of `before`: no claim can lie inside
                x = x + 0.5
            return x.sin() * 2

        before = module(lambda m, x: (x + 20.0).sin() * 2)
        report = graphprobe.diff(before, module(long), (randn(4, 8, dtype=FP64),))
        assert report.verdict == "unknown" and report.exit_code == 2 and report.coverage.resolution < 0.9
        assert report.coverage.largest
        report = graphprobe.diff(before, module(long), (randn(4, 8, dtype=FP64),), min_coverage=0.0)
        assert report.verdict in SAME and report.exit_code == 0
        with pytest.raises(errors.InputError, match="min_coverage"):
            graphprobe.diff(before, before, (randn(4, 8),), min_coverage=1.5)

    @pytest.mark.parametrize("name", ["conv", "mlp", "gpt2", pytest.param("mixtral", marks=pytest.mark.slow)])
    def test_every_operation_that_reaches_an_output_lies_in_a_judged_region(self, name: str) -> None:
        model, args, kwargs = tiny(name)
        after = copy.deepcopy(model)
        for parameter in list(after.parameters())[::3]:
            parameter.data *= 1.01
        report = graphprobe.diff(model, after, args, kwargs)
        assert report.coverage.unmatched == () and report.coverage.inside > 0
        closed = {row.after for row in report.regions}
        output = next(n for n in report.after.nodes if n.op == "output")
        assert output.inputs and all(name in closed for name in output.inputs if not report.after.by_name[name].is_view)
        assert len(report.outputs) > 0 and all(row.error is not None for row in report.outputs)

"""What generated code returns: judged by its distance from exact arithmetic; casts that it leaves out are rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphprobe
from bisect_models import mlp, needs_compiler
from graphprobe.bisection.inductor import expanded
from graphprobe.bisection.inductor.noise import Raising, Shaking
from graphprobe.bisection.inductor.outputs import Reference, compared
from graphprobe.bisection.oracle import Answer
from graphprobe.bisection.search import GOOD, UNKNOWN
from graphprobe.records import Coverage, OutputRow, RegionRow, Report

# --- outputs ---------------------------------------------------------------------------------------------------------


def test_outputs_are_judged_by_their_distance_from_exact_arithmetic() -> None:
    model, args = mlp()
    gm = graphprobe.capture(model, args)
    reference = Reference.of(gm, args)
    (x,) = [v for k, v in reference.native.items() if not k.startswith("state:")]
    step = torch.finfo(x.dtype).eps / 2
    verdicts = [reference.compare([y])[0].kind for y in (x, x * (1 + 2 * step), x * (1 + 100 * step), 1.5 * x, x[:2])]
    assert verdicts == ["identical", "rounding", "precision", "semantic", "structural"]
    spoiled = x.clone()
    spoiled[0, 0] = float("nan")
    assert reference.compare([spoiled])[0].kind == "nonfinite"


def test_another_dtype_is_another_output_unless_both_are_floating() -> None:
    x = torch.ones(4, dtype=torch.uint8)
    assert compared("y", x, x.to(torch.int64), x).kind == "structural"
    y = torch.linspace(0, 1, 64)
    assert compared("y", y, y.bfloat16(), y.double(), [y.bfloat16().float()]).kind == "rounding"


def test_noise_reaches_what_is_rounded_and_nothing_else() -> None:
    x = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    with Shaking(0):
        moved, kept, narrowed, added = x * 2, x.view(8, 8).t().flip(0), x.half(), x.clone().add_(1)
    for found, plain in ((moved, x * 2), (narrowed, x.half()), (added, x + 1)):
        assert not torch.equal(found, plain) and torch.allclose(found, plain, rtol=1e-2)
    assert torch.equal(kept, x.view(8, 8).t().flip(0))


def test_the_reference_can_be_the_one_that_is_wrong() -> None:
    truth = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    right = truth.float()
    assert compared("y", 1.5 * right, right, truth).better == "after"
    assert compared("y", right, 1.5 * right, truth).better == "before"


def test_casts_of_floats_are_left_out_of_exact_arithmetic_and_bits_are_not() -> None:
    x = torch.linspace(0.1, 1.0, 8, dtype=torch.float64)
    with Raising():
        assert (
            torch.equal(x.to(torch.float16).float(), x) and torch.ones(2, dtype=torch.bfloat16).dtype is torch.float64
        )
        assert x.long().dtype is torch.int64 and x.view(torch.int64).dtype is torch.int64
        assert x.to(torch.float8_e4m3fn).dtype is torch.float8_e4m3fn


# --- expansions ------------------------------------------------------------------------------------------------------


def expanded_report(before: int, after: int, verdict: str = "rounding", **coverage: Any) -> Report:
    """Return a report that is unknown: one region of these sizes, and three small ones."""
    sizes = [(before, after), (1, 1), (1, 2), (2, 1)]
    rows = [RegionRow("x", "y", "op", "", verdict, 0.0, 0.0, 0.0, 0.0, "id", *size) for size in sizes]
    output = OutputRow("output", (2,), "float32", 1e-8, 1e-8, False)
    return Report(verdict="unknown", regions=tuple(rows), outputs=(output,), coverage=Coverage(**coverage))


@pytest.mark.parametrize(
    ("report", "verdict"),
    [
        (expanded_report(6, 36), "rounding"),
        (expanded_report(36, 6), "rounding"),
        (expanded_report(36, 36), "unknown"),
        (expanded_report(6, 36, unknown=1), "unknown"),
        (expanded_report(6, 36, unmatched=("z",)), "unknown"),
        (expanded_report(6, 36, verdict="unknown"), "unknown"),
        (dataclasses.replace(expanded_report(6, 36), regions=()), "unknown"),
        (dataclasses.replace(expanded_report(6, 36), outputs=()), "unknown"),
    ],
)
def test_what_was_one_operation_before_is_located_however_many_it_became(report: Report, verdict: str) -> None:
    found = expanded.judged(Answer(UNKNOWN, "unknown", report=report), {"min_coverage": 0.9})
    assert found.report is not None and found.report.verdict == verdict
    assert (found.verdict == GOOD) is (verdict == "rounding")


# --- narrowing casts -------------------------------------------------------------------------------------------------


class Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


NARROWED = pytest.mark.parametrize(
    "function",
    [
        lambda x: x.to(torch.float16).to(torch.float32).sum(0),
        lambda x: x.to(torch.float16).to(torch.float32) == x,  # a decision that the cast moves
        lambda x: (5000 * x.to(torch.float16) * x.to(torch.float16)).float(),  # infinite in 16 bits alone
    ],
    ids=["sum", "equal", "overflow"],
)


@needs_compiler
@NARROWED
def test_narrowing_casts_that_code_leaves_out_are_rounding_and_said(function: Callable[..., torch.Tensor]) -> None:
    x = torch.arange(1, 21, dtype=torch.float32).reshape(5, 4) / 3
    found = graphprobe.bisect(Function(function), (x,), pipeline="inductor")
    assert (found.verdict, found.transforms) == ("good", ())
    assert found.report is not None and found.report.verdict in ("identical", "rounding")
    same = any(step.what.endswith("generated code") and step.reason == "identical" for step in found.steps)
    assert same or any("emulate_precision_casts" in note for note in found.notes)


def drop_casts(graph: torch.fx.Graph) -> None:
    """Take casts to float16 out of a graph where it goes on in float32, as passes of some versions of torch do."""
    cast = torch.ops.prims.convert_element_type.default
    for node in list(graph.nodes):
        if node.target is cast and node.args[1] is torch.float16:
            for user in [u for u in node.users if u.target is cast and u.args[1] is torch.float32]:
                user.replace_all_uses_with(node.args[0])
                graph.erase_node(user)
            if not node.users:
                graph.erase_node(node)


@needs_compiler
def test_narrowing_casts_that_a_pass_takes_out_are_rounding_and_said() -> None:
    x = torch.arange(1, 21, dtype=torch.float32).reshape(5, 4) / 3
    model = Function(lambda x: x.to(torch.float16).to(torch.float32) == x)
    with torch._inductor.config.patch(post_grad_custom_post_pass=drop_casts):
        found = graphprobe.bisect(model, (x,), pipeline="inductor")
    assert (found.verdict, found.transforms) == ("good", ())
    assert any("passes take narrowing casts out" in note for note in found.notes)

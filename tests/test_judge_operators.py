"""Operators that few models hold, written in another way they are rounding; changed they are found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphprobe
from graphprobe.records import Report
from judge_tools import module, randn
from operator_cases import OPERATORS, Op

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BOTH = [(name, dtype) for name in OPERATORS for dtype in DTYPES]
#: All of them take a minute; every run takes a third, in one of the dtypes.
QUICK = {(name, list(DTYPES)[i % 2]) for i, name in enumerate(OPERATORS) if i % 3 == 2}
CASES = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in BOTH]


def between_layers(op: Op, dtype: torch.dtype, float32: bool) -> nn.Module:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x @ m.w) * 2
        y = op(h.float() if float32 else h)
        return torch.tanh(y.float()).to(dtype)

    return module(forward, w=randn(16, 16, seed=1, dtype=dtype) / 4)


def compare(name: str, dtype: str, other: str) -> Report:
    case = OPERATORS[name]
    before, after = (between_layers(op, DTYPES[dtype], case.float32) for op in (case.plain, getattr(case, other)))
    return graphprobe.diff(before, after, (randn(2, 8, 16, seed=42, dtype=DTYPES[dtype]),))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_written_in_another_way_is_rounding(name: str, dtype: str) -> None:
    report = compare(name, dtype, "honest")
    assert report.verdict in ("identical", "rounding") and report.coverage.unknown == 0, report.to_json()


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_change_is_found_at_the_operator(name: str, dtype: str) -> None:
    report = compare(name, dtype, "wrong")
    found = [f for f in report.findings if f.kind not in ("rounding", "quantization")]
    assert [f.kind for f in found] == ["semantic"], report.to_json()
    assert report.coverage.unknown == 0 and report.coverage.resolution > 0.9

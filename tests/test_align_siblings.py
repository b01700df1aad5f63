"""Repeated layers: what the layers without a defect claim tells what to compare in the one that has it."""

from __future__ import annotations

import pytest
import torch

import graphprobe
from graphprobe.records import ClaimRecord
from plain_layers import DEFECTS, two_styles

QUICK = ("rotation", "window", "residual", "heads")
DTYPES = (torch.float32, torch.bfloat16)


def test_two_styles_of_one_decoder_are_rounding() -> None:
    report = graphprobe.diff(*two_styles("", 0, torch.float32))
    assert report.verdict == "rounding" and report.coverage.resolution == 1.0, report.findings


@pytest.mark.parametrize(
    ("defect", "dtype"),
    [
        pytest.param(d, t, marks=() if d in QUICK and t is DTYPES[0] else pytest.mark.slow)
        for d in DEFECTS
        for t in DTYPES
    ],
    ids=str,
)
def test_a_defect_in_one_layer_is_named_by_its_operation(defect: str, dtype: torch.dtype) -> None:
    at = list(DEFECTS).index(defect) % 4
    report = graphprobe.diff(*two_styles(defect, at, dtype))
    operators, places = DEFECTS[defect]
    found = [f for f in report.findings if f.kind != "rounding"]
    assert report.verdict == "semantic" and report.coverage.resolution == 1.0, report.coverage
    assert len(found) == places and {f.kind for f in found} == {"semantic"}, found
    assert {f.op.split(".")[1] for f in found} <= operators, found
    assert all(f.module_path.startswith(f"layers.{at}") for f in found), found


def test_what_the_other_layers_pair_is_paired_in_the_layer_with_the_defect() -> None:
    before, after, args = two_styles("rotation", 2, torch.float32)
    found = {(c.before.split("_")[0], c.after.split("_")[0]) for c in _siblings(before, after, args)}
    assert ("add", "cat") in found and ("cat", "cat") not in found, found


def _siblings(before: torch.nn.Module, after: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> list[ClaimRecord]:
    report = graphprobe.diff(before, after, args)
    return [c for c in report.claims if c.evidence == "sibling"]

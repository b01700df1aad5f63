"""What the tests of taps share: exact statistics of a tensor, and when two outputs are the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

from graphprobe import nodes
from graphprobe.records import Tap


def tensors_of(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def same(before: Any, after: Any) -> bool:
    pairs = list(zip(tensors_of(before), tensors_of(after), strict=True))
    return bool(pairs) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def assert_describes(tap: Tap, value: torch.Tensor) -> None:
    """Compare a row with sums that are exact."""
    numbers = (value.abs() if value.is_complex() else value).double().flatten()
    finite = numbers[numbers.isfinite()].tolist()
    assert (tap.shape, tap.dtype) == (tuple(value.shape), nodes.dtype_name(value.dtype))
    assert (tap.nan, tap.inf) == (int(numbers.isnan().sum()), int(numbers.isinf().sum()))
    assert tap.zeros == int((numbers == 0).sum())
    if not finite:
        assert (tap.min, tap.max, tap.mean, tap.rms) == (None, None, None, None)
        return
    scale = max(abs(x) for x in finite) or 1.0
    rms = math.sqrt(math.fsum((x / scale) ** 2 for x in finite) / len(finite)) * scale
    mean = math.fsum(x / scale for x in finite) / len(finite) * scale
    assert (tap.min, tap.max) == (min(finite), max(finite))
    assert tap.mean == pytest.approx(mean, abs=3e-6 * rms) and tap.rms == pytest.approx(rms, rel=3e-6)

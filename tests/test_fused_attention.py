"""Attention in float64 as one kernel over the scores, against torch: on the GPU and interpreted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import interpreting


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what scaled_dot_product_attention takes."""

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)

    plain = {"query": drawn(2, 4, 5, 8), "key": drawn(2, 4, 7, 8), "value": drawn(2, 4, 7, 6)}
    yield "plain", plain
    yield "causal and scaled", {**plain, "is_causal": True, "scale": 0.3}
    yield "a negative scale", {**plain, "is_causal": True, "scale": -0.3}
    yield "one sequence", {key: value[:1] for key, value in plain.items()}
    yield "a mask that adds", {**plain, "attn_mask": drawn(2, 1, 5, 7)}
    chosen = drawn(5, 7) > 0
    chosen[2] = False  # nothing is left of one row
    yield "a mask that chooses", {**plain, "attn_mask": chosen}
    yield "infinite mask", {**plain, "attn_mask": torch.where(chosen, 0.0, -math.inf).double()[None, None]}
    shared = {"key": drawn(2, 2, 7, 8), "value": drawn(2, 2, 7, 6), "enable_gqa": True}
    yield "heads that share keys", {**plain, **shared}
    odd = plain["query"].clone()
    odd[0, 0, 0, 0] = math.nan
    yield "nan", {**plain, "query": odd}
    yield "heads apart in memory", {**plain, "query": drawn(2, 5, 4, 8).transpose(1, 2)}


def check(name: str, given: dict[str, Any]) -> None:
    from graphprobe.lanes.fused.attention import attend

    wanted = torch.nn.functional.scaled_dot_product_attention(**given)
    causal, scale = given.get("is_causal", False), given.get("scale")
    found = attend(given["query"], given["key"], given["value"], given.get("attn_mask"), causal, scale)
    assert found is not None and found.shape == wanted.shape, name
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-14, equal_nan=True, msg=name)


_INTERPRETED = """
import test_fused_attention as shared
from graphprobe.lanes.fused import attention
for held in (1 << 25, 70):  # all heads at once, one after the other
    attention._HELD = held
    for name, given in shared.cases():
        shared.check(name, given)
"""


def test_the_kernel_attends_the_same_when_interpreted() -> None:
    interpreting.check(_INTERPRETED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [name for name, _ in cases()])
def test_the_gpu_attends_the_same(name: str) -> None:
    given = dict(cases())[name]
    check(name, {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in given.items()})

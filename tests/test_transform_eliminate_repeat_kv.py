"""eliminate_repeat_kv: the operators afterwards, the numbers, the metadata, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from graphprobe.pipeline import Pipeline
from transform_cases import DECODERS, DTYPES, Case, apply
from transform_tools import captured, reason

CASE = Case(
    "eliminate_repeat_kv",
    before="eager_attention_to_sdpa",
    matches=2,
    change={"aten.unsqueeze.default": -4, "aten.expand.default": -4, "aten.reshape.default": -4},
)


@pytest.mark.parametrize("name", DECODERS)
def test_exactly_the_pattern_is_replaced(name: str) -> None:
    CASE.check_operators(name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_it_differs_by_rounding_at_most(name: str, dtype: torch.dtype) -> None:
    assert CASE.verdict(name, dtype) in ("identical", "rounding")


@pytest.mark.parametrize("name", DECODERS)
def test_metadata_is_complete_and_fresh(name: str) -> None:
    CASE.check_metadata(name)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_models_without_the_pattern_are_left_alone(name: str) -> None:
    CASE.check_left_alone(name, "keys and values are not both repeated")


def test_attention_written_out_is_said_to_need_another_transform_first() -> None:
    done = Pipeline.parse("eliminate_repeat_kv").run(captured("llama")[0])
    assert "run eager_attention_to_sdpa before this" in reason(done)


class KeysAlone(torch.nn.Module):
    """Keys are repeated, values are not."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k = k[:, :, None].expand(2, 2, 2, 4, 8).reshape(2, 4, 4, 8)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def test_repeated_keys_alone_are_a_near_miss_that_is_named() -> None:
    done, _ = apply("eliminate_repeat_kv", KeysAlone(), *(torch.randn(2, h, 4, 8) for h in (4, 2, 4)))
    assert "not both repeated" in reason(done)

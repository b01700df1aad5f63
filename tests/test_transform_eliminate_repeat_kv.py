"""eliminate_repeat_kv: what is its own; what holds of every transform is in test_transforms.py."""

from __future__ import annotations

import torch

from graphprobe.pipeline import Pipeline
from transform_cases import apply
from transform_tools import captured, reason


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

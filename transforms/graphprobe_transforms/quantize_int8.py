"""Weights of linear layers become int8 codes with one scale a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from graphprobe.pipeline import Outcome
from graphprobe_transforms import quantizing
from graphprobe_transforms.linears import Linear


@dataclass(frozen=True)
class QuantizeInt8:
    """Fake-quantise linear layers to int8, one scale an output channel: linear(x, codes * scale).

    `where` and `skip` are globs on the layer's module path. The scale is of the weight's dtype, as the kernel wants it.
    Tried on llama, qwen2, qwen3, mistral, gpt2 and bert.
    """

    where: str = "*"
    skip: tuple[str, ...] = quantizing.SKIP
    name: ClassVar[str] = "quantize_int8"
    stage: ClassVar[str] = "pattern_matcher"

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        return quantizing.quantize(gm, self.where, self.skip, _dequantized, lambda layer: "")


def _dequantized(gm: GraphModule, layer: Linear) -> Node:
    return quantizing.scaled_codes(gm, layer, encode)


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes [out, in] int8, scale [out, 1] of the weight's dtype), rounded to nearest."""
    scale = (weight.double().abs().amax(1, keepdim=True) / 127).clamp(min=1e-12).to(weight.dtype)
    codes = torch.round(weight.double() / scale.double()).clamp(-127, 127)
    return codes.to(torch.int8), scale

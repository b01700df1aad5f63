"""Weights of linear layers become four-bit codes, two a byte, with one scale a group of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from graphprobe.pipeline import Outcome
from graphprobe_transforms import graphs, ops, quantizing
from graphprobe_transforms.linears import Linear


@dataclass(frozen=True)
class QuantizeInt4:
    """Fake-quantise linear layers to int4 with one scale for every `group` columns of a row.

    `where` and `skip` are globs on the layer's module path; layers whose columns do not fall into groups are left
    alone. Tried on llama, qwen2, qwen3, mistral, gpt2 and bert.
    """

    where: str = "*"
    skip: tuple[str, ...] = quantizing.SKIP
    group: int = 32
    name: ClassVar[str] = "quantize_int4"
    stage: ClassVar[str] = "pattern_matcher"
    makes: ClassVar[tuple[str, ...]] = ("graphprobe_transforms.dequantize_int4.default",)

    def __post_init__(self) -> None:
        if self.group < 2 or self.group % 2:
            raise ValueError(f"group is {self.group}, but must be even and at least 2: codes are packed in pairs")

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        obstacle = quantizing.groups_of(self.group)
        return quantizing.quantize(gm, self.where, self.skip, self._dequantized, obstacle)

    def _dequantized(self, gm: GraphModule, layer: Linear) -> Node:
        weight = layer.weight(gm)
        packed, scale = encode(weight, self.group)
        operands = (
            quantizing.store(gm, layer, "weight_packed", packed),
            quantizing.store(gm, layer, "weight_scale", scale),
            weight.dtype,
        )
        target = torch.ops.graphprobe_transforms.dequantize_int4.default
        return graphs.insert(layer.node, target, operands, like=layer.node)


def encode(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (packed [out, in / 2] uint8, scale [out, in / group] float32), by rounding; codes are 8 too high."""
    grouped = weight.float().reshape(weight.shape[0], -1, group)
    scale = (grouped.abs().amax(-1) / 7).clamp(min=1e-12)
    codes = torch.round(grouped / scale.unsqueeze(-1)).clamp(-8, 7) + 8
    return ops.pack(codes.reshape(weight.shape)), scale

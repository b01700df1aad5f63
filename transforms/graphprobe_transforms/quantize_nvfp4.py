"""Weights of linear layers become e2m1 codes in blocks of 16, as NVFP4 has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from graphprobe.pipeline import Outcome
from graphprobe_transforms import graphs, ops, quantizing
from graphprobe_transforms.linears import Linear
from graphprobe_transforms.quantizing import E2M1_MAX, E4M3_MAX

BLOCK = 16


@dataclass(frozen=True)
class QuantizeNvfp4:
    """Fake-quantise weights of linear layers to four-bit floats: an e4m3 scale for 16 columns, a float32 one for all.

    `where` and `skip` are globs on the layer's module path; layers whose columns do not fall into blocks are left
    alone. Tried on llama, qwen2, qwen3, mistral, gpt2 and bert.
    """

    where: str = "*"
    skip: tuple[str, ...] = quantizing.SKIP
    name: ClassVar[str] = "quantize_nvfp4"
    stage: ClassVar[str] = "pattern_matcher"
    makes: ClassVar[tuple[str, ...]] = ("graphprobe_transforms.dequantize_nvfp4.default",)

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        obstacle = quantizing.groups_of(BLOCK)
        return quantizing.quantize(gm, self.where, self.skip, dequantized, obstacle)


def dequantized(gm: GraphModule, layer: Linear) -> Node:
    """Store codes and scales of a layer and insert the operator that makes a weight of them."""
    weight = layer.weight(gm)
    packed, block_scale, scale = encode(weight)
    operands = (
        quantizing.store(gm, layer, "weight_packed", packed),
        quantizing.store(gm, layer, "weight_block_scale", block_scale),
        quantizing.store(gm, layer, "weight_scale", scale),
        weight.dtype,
    )
    target = torch.ops.graphprobe_transforms.dequantize_nvfp4.default
    return graphs.insert(layer.node, target, operands, like=layer.node)


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (packed [out, in / 2] uint8, block_scale [out, in / 16] float8_e4m3fn, scale [] float32).

    The scale of all lets the largest block scale be the largest e4m3 number (NVIDIA, NVFP4, 2025).
    """
    blocks = weight.float().reshape(weight.shape[0], -1, BLOCK)
    largest = blocks.abs().amax(-1)
    scale = (largest.amax() / (E2M1_MAX * E4M3_MAX)).clamp(min=1e-12)
    block_scale = (largest / E2M1_MAX / scale).to(torch.float8_e4m3fn)
    effective = block_scale.float() * scale
    ratio = torch.where(effective > 0, 1 / effective, 0.0).unsqueeze(-1)
    codes = quantizing.nearest_e2m1((blocks * ratio).clamp(-E2M1_MAX, E2M1_MAX))
    return ops.pack(codes.reshape(weight.shape)), block_scale, scale

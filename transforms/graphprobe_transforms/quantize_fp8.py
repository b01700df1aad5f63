"""Weights of linear layers become float8_e4m3fn codes with one scale a layer, their inputs likewise on the fly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from graphprobe.pipeline import Applied, NotApplied, Outcome
from graphprobe_transforms import graphs, quantizing
from graphprobe_transforms.graphs import Target, aten
from graphprobe_transforms.linears import Linear, stored_linears
from graphprobe_transforms.quantizing import E4M3_MAX


@dataclass(frozen=True)
class QuantizeFp8:
    """Fake-quantise linear layers to fp8 e4m3: linear(Q(x) * scale_x, codes * scale), one scale each.

    With `activations` (the default) the input is quantised, too, with the scale that its largest element asks for.
    `where` and `skip` are globs on the layer's module path. Tried on llama, qwen2, qwen3, mistral, gpt2 and bert.
    """

    where: str = "*"
    skip: tuple[str, ...] = quantizing.SKIP
    activations: bool = True
    name: ClassVar[str] = "quantize_fp8"
    stage: ClassVar[str] = "pattern_matcher"

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        layers = list(stored_linears(gm, self.where, self.skip))
        if not layers:
            return NotApplied(f"there is no linear layer with a stored floating weight that matches {self.where!r}")
        inputs: dict[Node, Node] = {}
        weights: dict[object, Node] = {}
        for layer in layers:
            x = None
            if self.activations:
                # layers that share their input share its codes
                x = inputs.get(layer.x) or inputs.setdefault(layer.x, fake_quantized_input(layer))
            weight = weights.get(layer.source.target) or quantizing.scaled_codes(gm, layer, encode)
            weights[layer.source.target] = weight  # layers that share their weight share its codes
            layer.use(weight, x)
        graphs.tidy(gm, [layer.node for layer in layers])
        return Applied(tuple(layer.path for layer in layers))


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes float8_e4m3fn, scale [] float32), rounded to nearest."""
    scale = (weight.float().abs().amax() / E4M3_MAX).clamp(min=1e-12)
    codes = (weight.float() / scale).clamp(-E4M3_MAX, E4M3_MAX)
    return codes.to(torch.float8_e4m3fn), scale


def fake_quantized_input(layer: Linear) -> Node:
    """Insert Q and DQ of the layer's input: x / s as e4m3, times s, with s = max |x| / 448 in float32."""
    value = graphs.tensor(layer.x)
    assert value is not None  # the layer has a weight that fits

    def call(target: Target, *args: object) -> Node:
        return graphs.insert(layer.node, target, args, like=layer.node)

    wide = call(aten.to.dtype, layer.x, torch.float32)
    largest = call(aten.amax.default, call(aten.abs.default, wide))
    scale = call(aten.clamp.default, call(aten.div.Tensor, largest, E4M3_MAX), 1e-12)
    bounded = call(aten.clamp.default, call(aten.div.Tensor, wide, scale), -E4M3_MAX, E4M3_MAX)
    codes = call(aten.to.dtype, bounded, torch.float8_e4m3fn)
    back = call(aten.mul.Tensor, call(aten.to.dtype, codes, torch.float32), scale)
    return back if value.dtype == torch.float32 else call(aten.to.dtype, back, value.dtype)

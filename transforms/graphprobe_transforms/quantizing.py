"""What the transforms that quantise linear layers share: the frame, and rounding to each kind of code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import GraphModule, Node

from graphprobe.pipeline import Applied, NotApplied, Outcome
from graphprobe_transforms import graphs, ops
from graphprobe_transforms.graphs import aten
from graphprobe_transforms.linears import Linear, stored_linears

E4M3_MAX = 448.0
E2M1_MAX = 6.0
#: Modules that are usually left in floating point: their outputs are the scores that decide.
SKIP = ("lm_head",)

Dequantize = Callable[[GraphModule, Linear], Node]
Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # weight -> codes, scale


def quantize(
    gm: GraphModule, where: str, skip: Sequence[str], dequantize: Dequantize, obstacle: Callable[[Linear], str]
) -> Outcome:
    """Let every stored linear take ``dequantize(gm, layer)``, the node of its weight computed from codes.

    `obstacle` says why a layer cannot be quantised, '' if it can.
    """
    layers = list(stored_linears(gm, where, skip))
    if not layers:
        return NotApplied(f"there is no linear layer with a stored floating weight in a module that matches {where!r}")
    reasons = [obstacle(layer) for layer in layers]
    fit = [layer for layer, why in zip(layers, reasons, strict=True) if not why]
    if not fit:
        return NotApplied(reasons[0], layers[0].node.name)
    codes: dict[object, Node] = {}
    for layer in fit:
        weight = codes.get(layer.source.target) or dequantize(gm, layer)
        codes[layer.source.target] = weight  # layers that share their weight share its codes
        layer.use(weight)
    graphs.tidy(gm, [layer.node for layer in fit])
    return Applied(tuple(layer.path for layer in fit))


def groups_of(size: int) -> Callable[[Linear], str]:
    """Return an obstacle: the weight's columns must fall into groups of `size`."""

    def obstacle(layer: Linear) -> str:
        value = graphs.tensor(layer.source)
        columns = 0 if value is None else int(value.shape[0 if layer.transposed else 1])
        return "" if columns and columns % size == 0 else f"its {columns} columns do not fall into groups of {size}"

    return obstacle


def store(gm: GraphModule, layer: Linear, name: str, value: torch.Tensor) -> Node:
    """Register codes or scales of a layer as a buffer and read it before the layer."""
    return graphs.insert_buffer(gm, layer.node, f"{layer.path}.{name}", value.contiguous(), like=layer.source)


def scaled_codes(gm: GraphModule, layer: Linear, encode: Encode) -> Node:
    """Store what `encode` makes of the weight, and insert ``codes.to(scale.dtype) * scale`` in the weight's dtype."""
    weight = layer.weight(gm)
    codes, scale = encode(weight)
    code_node, scale_node = store(gm, layer, "weight_codes", codes), store(gm, layer, "weight_scale", scale)
    place = layer.node
    wide = graphs.insert(place, aten.to.dtype, (code_node, scale.dtype), like=place)
    value = graphs.insert(place, aten.mul.Tensor, (wide, scale_node), like=place)
    if scale.dtype == weight.dtype:
        return value
    return graphs.insert(place, aten.to.dtype, (value, weight.dtype), like=place)


def nearest_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Return the four-bit codes nearest to the values, [-6, 6] -> uint8 below 16; ties go to the even code."""
    levels = torch.tensor(ops.E2M1[:8], dtype=torch.float64)
    middles = (levels[1:] + levels[:-1]) / 2
    magnitude = values.double().abs().contiguous()
    below, above = (torch.bucketize(magnitude, middles, right=right) for right in (False, True))
    code = torch.where(below % 2 == 0, below, above)
    return (code | (torch.signbit(values) << 3)).to(torch.uint8)

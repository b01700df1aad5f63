"""A linear layer on dequantised codes becomes one kernel on the codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from graphprobe.pipeline import NotApplied, Outcome
from graphprobe_transforms import graphs, matching, ops
from graphprobe_transforms.graphs import Target, arg, aten, is_call
from graphprobe_transforms.linears import Linear, as_linear

assert ops.NAMESPACE  # importing it registers the operators
_own = torch.ops.graphprobe_transforms


@dataclass(frozen=True)
class _Match:
    """A layer whose weight is made of codes, and the kernel that takes them: call(layer) gives [..., out]."""

    layer: Linear
    kernel: Callable[[Node], Node]  # place -> the node of the result
    inside: tuple[Node, ...]


@dataclass(frozen=True)
class FuseQuantizedLinear:
    """Replace dequantise-then-linear by a kernel on codes: what tells a fault of the codes from one of the kernel.

    int8 codes with a scale a row go to aten._weight_int8pack_mm, fp8 codes of weight and input to aten._scaled_mm,
    packed int4 and nvfp4 codes to graphprobe_transforms.{int4,nvfp4}_linear. `where` is a glob on the layer's module
    path. Tried on llama, qwen2, qwen3, mistral, gpt2 and bert.
    """

    where: str = "*"
    name: ClassVar[str] = "fuse_quantized_linear"
    stage: ClassVar[str] = "post_load_fusion"
    makes: ClassVar[tuple[str, ...]] = (
        "aten._weight_int8pack_mm.default",
        "aten._scaled_mm.default",
        "graphprobe_transforms.int4_linear.default",
        "graphprobe_transforms.nvfp4_linear.default",
    )

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        layers = matching.anchors(gm, self.where, aten.linear.default, aten.addmm.default)
        computed = [n for n in layers if (layer := as_linear(n)) is not None and layer.source.op != "get_attr"]
        nothing = f"no linear layer takes a weight that is made of codes in a module that matches {self.where!r}"
        return matching.rewrite(gm, computed, match, _fuse, nothing)


def match(node: Node) -> _Match | NotApplied:
    """Match the codes above one layer, or say what is in the way."""
    layer = as_linear(node)
    assert layer is not None
    weight = layer.source
    if layer.transposed:
        if not is_call(weight, aten.t.default):
            return NotApplied("the weight is computed, but not from codes", node.name)
        weight = arg(weight, 0)
    if is_call(weight, _own.dequantize_int4.default, _own.dequantize_nvfp4.default):
        return _packed(layer, weight)
    scaled = arg(weight, 0) if is_call(weight, aten.to.dtype) else weight
    if not is_call(scaled, aten.mul.Tensor):
        return NotApplied("the weight is computed, but not from codes", node.name)
    codes = arg(arg(scaled, 0), 0) if is_call(arg(scaled, 0), aten.to.dtype) else None
    scale, value = arg(scaled, 1), graphs.tensor(codes)
    if value is None or not isinstance(scale, Node) or not isinstance(codes, Node):
        return NotApplied("the weight is computed, but not from codes", node.name)
    if value.dtype == torch.int8:
        return _int8(layer, weight, codes, scale)
    if value.dtype == torch.float8_e4m3fn:
        return _fp8(layer, weight, codes, scale)
    return NotApplied(f"there is no kernel for codes of {value.dtype}", node.name)


def _packed(layer: Linear, weight: Node) -> _Match:
    four_bit = weight.target is _own.dequantize_int4.default
    target = _own.int4_linear.default if four_bit else _own.nvfp4_linear.default
    args = (layer.x, *weight.args[:-1], layer.bias)

    def kernel(place: Node) -> Node:
        return graphs.insert(place, target, args, like=layer.node)

    return _Match(layer, kernel, (layer.source, weight))


def _int8(layer: Linear, weight: Node, codes: Node, scale: Node) -> _Match | NotApplied:
    x, steps, rows = graphs.tensor(layer.x), graphs.tensor(scale), graphs.tensor(codes)
    if x is None or steps is None or rows is None or steps.shape != (rows.shape[0], 1) or steps.dtype != x.dtype:
        return NotApplied("the kernel wants one scale a row, of the dtype of the input", layer.node.name)

    def kernel(place: Node) -> Node:
        call = _caller(place, layer)
        flat = call(aten.reshape.default, layer.x, [-1, x.shape[-1]])
        product = call(aten._weight_int8pack_mm.default, flat, codes, call(aten.reshape.default, scale, [-1]))
        return _shaped(call, layer, product)

    return _Match(layer, kernel, (layer.source, *_chain(weight)))


def _fp8(layer: Linear, weight: Node, codes: Node, scale: Node) -> _Match | NotApplied:
    found = _quantized_input(layer.x)
    x, rows = graphs.tensor(layer.x), graphs.tensor(codes)
    if found is None or x is None or rows is None:
        return NotApplied("the kernel wants the input in fp8 as well, with one float32 scale", layer.node.name)
    steps = graphs.tensor(scale)
    if steps is None or steps.numel() != 1 or steps.dtype != torch.float32:
        return NotApplied("the kernel wants one float32 scale for the whole weight", layer.node.name)
    if any(size % 16 for size in rows.shape):
        return NotApplied("the kernel wants sizes that are multiples of 16", layer.node.name)
    input_codes, input_scale = found

    def kernel(place: Node) -> Node:
        call = _caller(place, layer)
        flat = call(aten.reshape.default, input_codes, [-1, x.shape[-1]])
        columns = call(aten.t.default, codes)
        product = call(aten._scaled_mm.default, flat, columns, input_scale, scale, None, None, x.dtype)
        return _shaped(call, layer, product)

    return _Match(layer, kernel, (layer.source, *_chain(weight), *_chain(layer.x)))


def _quantized_input(x: Node) -> tuple[Node, Node] | None:
    """Return (codes, scale) where the input is codes.to(float) * scale, cast or not."""
    scaled = arg(x, 0) if is_call(x, aten.to.dtype) and is_call(arg(x, 0), aten.mul.Tensor) else x
    wide = arg(scaled, 0) if is_call(scaled, aten.mul.Tensor) else None
    codes = arg(wide, 0) if is_call(wide, aten.to.dtype) else None
    value = graphs.tensor(codes)
    if value is None or value.dtype != torch.float8_e4m3fn or not isinstance(codes, Node):
        return None
    scale = arg(scaled, 1)
    steps = graphs.tensor(scale)
    one = steps is not None and steps.numel() == 1 and steps.dtype == torch.float32
    return (codes, scale) if one else None


def _chain(node: Node) -> list[Node]:
    """Return the nodes from codes (left out) to the value: cast, product with the scale, cast back."""
    found = [node]
    while not is_call(found[-1], aten.mul.Tensor):
        found.append(arg(found[-1], 0))
    return [*found, arg(found[-1], 0)]


def _shaped(call: Callable[..., Node], layer: Linear, product: Node) -> Node:
    """Give the product of a kernel on matrices the leading sizes of the input, and add the bias."""
    leading = graphs.sizes(layer.node, layer.x)[:-1]
    value = call(aten.reshape.default, product, [*leading, -1]) if len(leading) != 1 else product
    return value if layer.bias is None else call(aten.add.Tensor, value, layer.bias)


def _caller(place: Node, layer: Linear) -> Callable[..., Node]:
    def call(target: Target, *args: Any) -> Node:
        return graphs.insert(place, target, args, like=layer.node)

    return call


def _fuse(gm: GraphModule, m: _Match) -> list[Node]:
    fused = m.kernel(m.layer.node)
    graphs.replace(m.layer.node, fused)
    graphs.erase_unused(m.inside)
    return [fused]

"""Operators that the transforms put in place of patterns, in plain torch: ``torch.ops.graphprobe_transforms.*``.

Each computes in float32 or wider and rounds once, at the end, as a fused kernel does; with float64 inputs it computes
in float64 throughout. They stand for kernels of a runtime: what matters here is their meaning, not their speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "graphprobe_transforms"
#: The values of the four bits of an e2m1 number, sign last (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operator that runs on every device, on fake tensors too."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{NAMESPACE}::{function.__name__}"
        torch.library.define(name, schema)
        torch.library.impl(name, "CompositeExplicitAutograd")(function)
        torch.library.register_fake(name)(function)
        return function

    return register


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@_operator("(Tensor x, Tensor cos, Tensor sin) -> Tensor")
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin (Su et al. 2021, equation 34, halves in place of pairs); x is [..., tokens, size]."""
    wide = _wide(x)
    left, right = wide.chunk(2, -1)
    return (wide * _wide(cos) + torch.cat((-right, left), -1) * _wide(sin)).to(x.dtype)


@_operator("(Tensor gate, Tensor up) -> Tensor")
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, equation 6, without the projections)."""
    return (torch.nn.functional.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


@_operator("(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)")
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm(x + residual) * weight, x + residual); the norm sees the sum before it is rounded."""
    total = _wide(x) + _wide(residual)
    inverse = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (total * inverse * _wide(weight)).to(x.dtype), total.to(x.dtype)


@_operator("(Tensor[] parts) -> Tensor")
def all_reduce(parts: list[Tensor]) -> Tensor:
    """The sum of what all ranks hold, in the order of the ranks."""
    total = _wide(parts[0])
    for part in parts[1:]:
        total = total + _wide(part)
    return total.to(parts[0].dtype)


@_operator("(Tensor[] parts, int dim) -> Tensor")
def all_gather(parts: list[Tensor], dim: int) -> Tensor:
    """What all ranks hold, one beside the other along `dim`."""
    return torch.cat(parts, dim)


# --- four-bit weights ------------------------------------------------------------------------------------------------


def nibbles(packed: Tensor) -> Tensor:
    """[rows, columns / 2] uint8 -> [rows, columns] uint8 below 16; the low half of a byte comes first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """The inverse of `nibbles`."""
    pairs = codes.to(torch.uint8).reshape(*codes.shape[:-1], -1, 2)
    packed: Tensor = pairs[..., 0] | (pairs[..., 1] << 4)
    return packed


def _scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply every group of columns with its scale; `scale` is [rows, groups]."""
    groups = values.reshape(*scale.shape, -1) * scale.unsqueeze(-1)
    return groups.flatten(-2).to(dtype)


@_operator("(Tensor packed, Tensor scale, ScalarType dtype) -> Tensor")
def dequantize_int4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(code - 8) * scale, two codes a byte; packed [rows, columns / 2] uint8, scale [rows, groups] floating."""
    scale = _wide(scale)
    return _scaled(nibbles(packed).to(scale.dtype) - 8, scale, dtype)


@_operator("(Tensor packed, Tensor block_scale, Tensor scale, ScalarType dtype) -> Tensor")
def dequantize_nvfp4(packed: Tensor, block_scale: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """e2m1 * block_scale * scale: packed [rows, columns / 2] uint8, block_scale [rows, columns / 16] float8_e4m3fn,
    scale [] floating.
    """
    scale = _wide(scale)
    levels = torch.tensor(E2M1, dtype=scale.dtype, device=packed.device)
    values = levels[nibbles(packed).long()]
    return _scaled(values, block_scale.to(scale.dtype) * scale, dtype)


@_operator("(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor")
def int4_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias with W = dequantize_int4(packed, scale), kept wide until the end."""
    return _linear(x, dequantize_int4(packed, scale, _wide(x).dtype), bias)


@_operator("(Tensor x, Tensor packed, Tensor block_scale, Tensor scale, Tensor? bias) -> Tensor")
def nvfp4_linear(x: Tensor, packed: Tensor, block_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias with W = dequantize_nvfp4(packed, block_scale, scale), kept wide until the end."""
    return _linear(x, dequantize_nvfp4(packed, block_scale, scale, _wide(x).dtype), bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = _wide(x) @ weight.t()
    return (product if bias is None else product + _wide(bias)).to(x.dtype)

"""float64 references for the operators that quantise: by their definition, or with the rounding taken out.

An affine quantiser maps x to the code ``clamp(round(x / scale) + zero, low, high)``, and back to ``(code - zero)
scale`` (Jacob et al. 2018, equation 1). *Relaxed*, the code is ``x / scale + zero`` itself, so that quantising and
dequantising cancel exactly where scales and zero points are right. Tables are keyed by schema name; torchao need not
be there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes

Tensor = torch.Tensor
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Affine:
    """The operands of one quantiser, all of the shape of `x` or broadcast to it."""

    x: Tensor
    scale: Tensor | float
    zero: Tensor | float = 0.0
    low: float = -torch.inf
    high: float = torch.inf
    dtype: torch.dtype | None = None

    def relaxed(self) -> Tensor:
        """Return x / scale + zero, neither rounded nor clipped."""
        codes: Tensor = _double(self.x) / self.scale + self.zero
        return codes

    def codes(self) -> Tensor:
        """Return the codes, as float64 where `dtype` is not known."""
        if self.dtype is not None and self.dtype.is_floating_point:
            top = torch.finfo(self.dtype).max
            return self.relaxed().clamp(-top, top).to(self.dtype)
        # the reciprocal first, as the kernels do it
        codes = torch.round(_double(self.x) * (1.0 / self.scale)) + self.zero
        codes = codes.clamp(self.low, self.high)
        return codes if self.dtype is None else codes.to(self.dtype)

    def back(self, codes: Tensor) -> Tensor:
        """Return what the codes stand for."""
        value: Tensor = (_double(codes) - self.zero) * self.scale
        return value


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else x


def _block(value: Any, shape: Sequence[int], block: Sequence[int]) -> Any:
    """Spread one number per block over a tensor of the given shape."""
    if not isinstance(value, Tensor):
        return 0.0 if value is None else value
    value = value.double().reshape([size // step for size, step in zip(shape, block, strict=True)])
    for dim, step in enumerate(block):
        value = value.repeat_interleave(step, dim)
    return value


def _channel(value: Any, like: Tensor, axis: int) -> Any:
    if not isinstance(value, Tensor):
        return 0.0 if value is None else value
    shape = [1] * like.dim()
    shape[axis] = -1
    return value.double().reshape(shape)


def _scalar(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.numel() > 1 else float(value)


def _per_tensor(x: Tensor, scale: Any, zero: Any, low: Any, high: Any, dtype: Any = None, **_: Any) -> Affine:
    return Affine(x, _scalar(scale), _scalar(zero), float(low), float(high), dtype)


def _per_channel(
    x: Tensor, scale: Any, zero: Any, axis: int, low: Any, high: Any, dtype: Any = None, **_: Any
) -> Affine:
    return Affine(x, _channel(scale, x, axis), _channel(zero, x, axis), low, high, dtype)


def _per_token(x: Tensor, scale: Any, zero: Any, low: Any, high: Any, dtype: Any, *_: Any) -> Affine:
    return Affine(x, _double(scale), _double(zero), low, high, dtype)


def _per_group(x: Tensor, scale: Any, zero: Any, low: Any, high: Any, dtype: Any, group: int, *_: Any) -> Affine:
    block = [*(1 for _ in x.shape[:-1]), group]
    return Affine(x, _block(scale, x.shape, block), _block(zero, x.shape, block), low, high, dtype)


def _by_block(
    x: Tensor, block: Sequence[int], scale: Any, zero: Any, dtype: Any, low: Any = None, high: Any = None, *_: Any
) -> Affine:
    low = torch.iinfo(dtype).min if low is None else low
    high = torch.iinfo(dtype).max if high is None else high
    return Affine(x, _block(scale, x.shape, block), _block(zero, x.shape, block), low, high, dtype)


def _float8(x: Tensor, scale: Tensor, dtype: Any = torch.float8_e4m3fn, *_: Any) -> Affine:
    spread = scale.double()
    if spread.numel() > 1 and spread.dim() == x.dim():
        spread = _block(spread, x.shape, [a // b for a, b in zip(x.shape, spread.shape, strict=True)])
    return Affine(x, spread, dtype=dtype if dtype in _FP8 else None)


_FP8 = {getattr(torch, n) for n in dir(torch) if n.startswith("float8_")}

#: x -> codes
QUANTIZERS: dict[str, Callable[..., Affine]] = {
    "quantized_decomposed::quantize_per_tensor": _per_tensor,
    "quantized_decomposed::quantize_per_channel": _per_channel,
    "quantized_decomposed::quantize_per_token": _per_token,
    "quantized_decomposed::quantize_per_channel_group": _per_group,
    "torchao::quantize_affine": _by_block,
    "torchao::quantize_affine_float8": _float8,
    "torchao::quantize_affine_float8_non_decomposed": _float8,
}
#: codes -> what they stand for
DEQUANTIZERS: dict[str, Callable[..., Affine]] = {
    "quantized_decomposed::dequantize_per_tensor": _per_tensor,
    "quantized_decomposed::dequantize_per_channel": _per_channel,
    "quantized_decomposed::dequantize_per_token": _per_token,
    "quantized_decomposed::dequantize_per_channel_group": _per_group,
    "torchao::dequantize_affine": _by_block,
    "torchao::dequantize_affine_float8": _float8,
    "torchao::dequantize_affine_float8_non_decomposed": _float8,
}
#: x -> codes -> what they stand for, in one
FAKE_QUANTIZERS: dict[str, Callable[..., Affine]] = {
    "aten::fake_quantize_per_tensor_affine": _per_tensor,
    "aten::fake_quantize_per_channel_affine": _per_channel,
}


# --- scales and zero points chosen from the data --------------------------------------------------------------------


def _asymmetric(low: Tensor, high: Tensor, bottom: float, top: float, eps: float) -> tuple[Tensor, Tensor]:
    scale = ((high - low) / (top - bottom)).clamp(min=eps)
    return scale, (bottom - torch.round(low / scale)).clamp(bottom, top)


def _symmetric(low: Tensor, high: Tensor, bottom: float, top: float, eps: float) -> tuple[Tensor, Tensor]:
    scale = (torch.maximum(-low, high) / ((top - bottom) / 2)).clamp(min=eps)
    return scale, torch.full_like(scale, int((top + bottom + 1) / 2))


def _unclipped(low: Tensor, high: Tensor, bottom: float, top: float, eps: float) -> tuple[Tensor, Tensor]:
    scale = torch.maximum(low / bottom, high / top).clamp(min=eps)
    return scale, torch.full_like(scale, int((top + bottom + 1) / 2))


_MAPPINGS = {"SYMMETRIC": _symmetric, "SYMMETRIC_NO_CLIPPING_ERR": _unclipped, "ASYMMETRIC": _asymmetric}


def _extremes(x: Tensor, dims: list[int] | None = None, keep: bool = False) -> tuple[Tensor, Tensor]:
    """Return (min, max), zero included."""
    x = x.double()
    if dims is None:
        return x.min().clamp(max=0.0), x.max().clamp(min=0.0)
    return x.amin(dims, keep).clamp(max=0.0), x.amax(dims, keep).clamp(min=0.0)


def _choose_affine(x: Tensor, mapping: str, block: Sequence[int], dtype: torch.dtype, *rest: Any) -> Any:
    """torchao::choose_qparams_affine: (scale, zero point), one per block."""
    bottom, top, eps, _scale_dtype, zero_dtype, keep = (*rest, *(None,) * 6)[:6]
    bottom = torch.iinfo(dtype).min if bottom is None else bottom
    top = torch.iinfo(dtype).max if top is None else top
    counts = [size // step for size, step in zip(x.shape, block, strict=True)]
    blocks = x.reshape([n for pair in zip(counts, block, strict=True) for n in pair])
    low, high = _extremes(blocks, list(range(1, 2 * x.dim(), 2)))
    scale, zero = _MAPPINGS[mapping](low, high, bottom, top, eps)
    if not keep:  # dimensions that one block spans are dropped
        shape = [n for n, step in zip(counts, block, strict=True) if n > 1 or step == 1]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return scale, zero.to(zero_dtype or torch.int32)


def _with_eps(node: Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Fill in the smallest scale: by default the smallest normal number of the native dtype."""
    full = (*args, *(None,) * (7 - len(args)))
    if full[6] is not None:
        return args
    value = nodes.tensor_val(node.all_input_nodes[0])
    dtype = value.dtype if value is not None and value.is_floating_point() else torch.float32
    return (*full[:6], torch.finfo(dtype).smallest_normal, *full[7:])


def _choose_float8(x: Tensor, block: Sequence[int], dtype: torch.dtype = torch.float8_e4m3fn, *rest: Any) -> Tensor:
    """torchao::choose_scale_float8: one scale per block."""
    scale_dtype, bottom, top = (*rest, *(None,) * 3)[:3]
    counts = [size // step for size, step in zip(x.shape, block, strict=True)]
    blocks = x.double().reshape([n for pair in zip(counts, block, strict=True) for n in pair])
    largest = blocks.abs().amax(list(range(1, 2 * x.dim(), 2)))
    if bottom is not None or top is not None:
        largest = largest.clamp(min=bottom, max=top)
    scale = largest / torch.finfo(dtype).max
    return torch.exp2(torch.round(torch.log2(scale))) if scale_dtype not in (None, torch.float32) else scale


def _choose_tensor(x: Tensor, bottom: float, top: float, eps: float, dtype: Any) -> Any:
    scale, zero = _asymmetric(*_extremes(x), bottom, top, eps)
    return scale.reshape(1), zero.reshape(1).long()


def _choose_tensor_symmetric(x: Tensor, bottom: float, top: float, eps: float, dtype: Any) -> Any:
    scale, _ = _symmetric(*_extremes(x), bottom, top, eps)
    return scale.reshape(1), torch.full((1,), 128 if dtype == torch.uint8 else 0, device=x.device)


def _choose_token(x: Tensor, dtype: Any) -> Any:
    scale = x.double().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return scale, torch.zeros_like(scale)


def _choose_token_asymmetric(x: Tensor, dtype: Any) -> Any:
    low, high = _extremes(x, [-1], True)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    left, right = -128 - low / scale, 127 - high / scale
    zero = torch.where((-128 + low / scale) + (127 + high / scale) > 0, left, right)
    return scale, zero.clamp(-128, 127).round()


#: x -> (scale, zero point)
CHOOSERS: dict[str, Callable[..., Any]] = {
    "torchao::choose_qparams_affine": _choose_affine,
    "torchao::choose_scale_float8": _choose_float8,
    "quantized_decomposed::choose_qparams": _choose_tensor,
    "quantized_decomposed::choose_qparams_symmetric": _choose_tensor_symmetric,
    "quantized_decomposed::choose_qparams_per_token": _choose_token,
    "quantized_decomposed::choose_qparams_per_token_asymmetric": _choose_token_asymmetric,
}


# --- rules for the table of exact arithmetic ------------------------------------------------------------------------


def _rule(name: str) -> Callable[[Node, tuple[Any, ...], dict[str, Any]], Any]:
    def rule(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in CHOOSERS:
            return CHOOSERS[name], _with_eps(node, args) if name == "torchao::choose_qparams_affine" else args, kwargs
        return evaluate, (name, *args), {k: v for k, v in kwargs.items() if k not in ("out_dtype", "output_dtype")}

    return rule


def evaluate(name: str, *args: Any, **kwargs: Any) -> Tensor:
    """Evaluate a quantiser, a dequantiser or both in one, rounding as it should."""
    if name in QUANTIZERS:
        return QUANTIZERS[name](*args, **kwargs).codes()
    if name in DEQUANTIZERS:
        affine = DEQUANTIZERS[name](*args, **kwargs)
        return affine.back(affine.x)
    affine = FAKE_QUANTIZERS[name](*args, **kwargs)
    return affine.back(affine.codes())


RULES = {name: _rule(name) for name in (*QUANTIZERS, *DEQUANTIZERS, *FAKE_QUANTIZERS, *CHOOSERS)}

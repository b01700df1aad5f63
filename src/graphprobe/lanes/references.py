"""float64 references for operators whose kernels have no float64 form, each by its definition."""

from __future__ import annotations

import math
from typing import Any

import torch

from graphprobe.lanes.measure import triton_works

Tensor = torch.Tensor


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale + bias) v and its log-sum-exp, for [batch, heads, tokens, head dim]; repeats shared heads.

    Formula: Vaswani et al. 2017, section 3.2.1. Causal masks are aligned to the upper left, as in ATen.
    """
    if key.shape[1] != query.shape[1]:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    score = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if causal:
        keep = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
        score = score.masked_fill(~keep, -math.inf)
    if bias is not None:
        score = score.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else score + bias
    nothing = (score == -math.inf).all(-1, keepdim=True)  # who may look at nothing gets zeros, as in ATen
    return torch.softmax(score, -1).masked_fill(nothing, 0.0) @ value, torch.logsumexp(score, -1)


#: No score of a model lies this low: what does has been masked (-1e4 in bfloat16 is -9,984).
MASKED = -9e3


def masked_sum(x: Any, y: Any, dtype: torch.dtype) -> Any:
    """Return x + y in float64, but the mask itself where it swallows the score in the dtype of the native sum.

    -65504 + score is -65504 in float16: a row in which all is masked is uniform there, and would not be here.
    """
    total = x + y
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return total
    native = x.to(dtype) + y.to(dtype)
    for mask in (x, y):
        total = torch.where((mask <= MASKED) & (native == mask.to(dtype)), mask, total)
    return total


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kw: Any,
) -> Tensor:
    """aten::scaled_dot_product_attention; on CUDA in one pass over the scores, where torch needs ten."""
    if q.is_cuda and not dropout_p and triton_works():
        from graphprobe.lanes.fused.attention import attend  # late: Triton is not installed everywhere

        out = attend(q, k, v, attn_mask, is_causal, kw.get("scale"))
        if out is not None:
            return out
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **kw)


def flash(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *rest: Any, **kw: Any) -> Any:
    """aten::_scaled_dot_product_flash_attention, also for_cpu: (output, logsumexp, ...)."""
    out, sums = attention(q, k, v, kw.get("attn_mask"), causal, kw.get("scale"))
    return (out, sums, *(None,) * 7)


def efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    **kw: Any,
) -> Any:
    """aten::_scaled_dot_product_efficient_attention: (output, logsumexp, ...)."""
    out, sums = attention(q, k, v, bias, causal, kw.get("scale"))
    return (out, sums, None, None)


def cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool, dropout: float = 0.0, causal: bool = False,
    *rest: Any, **kw: Any,
) -> Any:  # fmt: skip
    """aten::_scaled_dot_product_cudnn_attention: (output, logsumexp, ...)."""
    out, sums = attention(q, k, v, bias, causal, kw.get("scale"))
    return (out, sums, *(None,) * 7)


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """aten::_grouped_mm: one matrix product per group; `offs` holds the end of each group.

    Shapes: [M, K] x [G, K, N] groups of rows; [G, M, K] x [K, N] groups of columns; [M, K] x [K, N] groups of the
    contraction; [G, M, K] x [G, K, N] a plain batch.
    """
    if offs is None:
        return a @ b if bias is None else a @ b + bias
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    if a.dim() == 2 and b.dim() == 3:
        out = a.new_zeros(a.shape[0], b.shape[-1])
        for g, (start, end) in enumerate(zip(starts, ends, strict=True)):
            out[start:end] = a[start:end] @ b[g]
    elif a.dim() == 3 and b.dim() == 2:
        out = a.new_zeros(a.shape[1], b.shape[-1])
        for g, (start, end) in enumerate(zip(starts, ends, strict=True)):
            out[:, start:end] = a[g] @ b[:, start:end]
    else:
        out = torch.stack([a[:, s:e] @ b[s:e] for s, e in zip(starts, ends, strict=True)])
    return out if bias is None else out + bias


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    scale_result: Tensor | None = None, out_dtype: Any = None, use_fast_accum: bool = False,
) -> Tensor:  # fmt: skip
    """aten::_scaled_mm: (scale_a a) @ (scale_b b) + bias on fp8 codes; scales per tensor, row or column."""
    left, right = a.double() * scale_a.double(), b.double() * scale_b.double()
    out = left @ right
    return out if bias is None else out + bias.double()


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """aten::_int_mm: int8 x int8 -> int32, exact."""
    return (a.double() @ b.double()).to(torch.int32)


def weight_int8pack_mm(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """aten::_weight_int8pack_mm: x @ (scales weight)^T with int8 rows."""
    return x @ (weight.double() * scales.double().unsqueeze(-1)).t()


def weight_int4pack_mm(kernel: Any) -> Any:
    """aten::_weight_int4pack_mm and _for_cpu: x @ W with W = code scale + zero, codes -8..7, one pair for every group.

    The packing is the kernel's own affair; it unpacks itself: times the unit matrix, with scales of one and zero points
    of none, it returns the codes, small integers that every dtype holds exactly.
    """

    def reference(x: Tensor, packed: Tensor, group: int, scales_and_zeros: Tensor) -> Tensor:
        dtype = torch.bfloat16 if x.is_cuda else torch.float32
        plain = torch.zeros_like(scales_and_zeros, dtype=dtype)
        plain[..., 0] = 1
        codes = kernel(torch.eye(x.shape[-1], dtype=dtype, device=x.device), packed, group, plain).double()
        scale, zero = scales_and_zeros.double().repeat_interleave(group, 0).unbind(-1)  # [in, out] each
        out: Tensor = x @ (codes * scale + zero)
        return out

    return reference


def fused_rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """aten::_fused_rms_norm: (x / rms(x)) weight and 1 / rms. Formula: Zhang and Sennrich 2019, equation 4."""
    dims = list(range(-len(shape), 0))
    inverse = torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    return (x * inverse if weight is None else x * inverse * weight), inverse

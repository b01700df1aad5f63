"""Attention in float64 on CUDA. torch has no fused kernel for it: its plain path reads and writes the scores ten times.

Scores are made for a few heads at a time; scale, mask and softmax are one kernel that works in place.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

#: Longest row of scores that one program holds, and scores that are held at once (8 bytes each).
LONGEST, _HELD = 8192, 1 << 25


@triton.jit  # type: ignore[untyped-decorator]
def _softmax(  # type: ignore[no-untyped-def]
    scores, mask, heads, queries, keys, m0, m1, m2, m3,
    SCALE: tl.constexpr, HAS_M: tl.constexpr, CHOOSES: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """softmax(scores * SCALE + mask) of one row a program, in place; 0 where everything is masked, as in torch."""
    row = tl.program_id(0).to(tl.int64)
    query = row % queries
    head, batch = (row // queries) % heads, row // queries // heads
    key = tl.arange(0, BLOCK)
    inside = key < keys
    # scores are read without asking the mask first: waiting for it costs more than half of the reads
    v = tl.load(scores + row * keys + key, mask=inside, other=0.0) * SCALE
    v = tl.where(inside, v, float("-inf"))
    if HAS_M:
        place = mask + batch * m0 + head * m1 + query * m2 + key * m3
        w = tl.load(place, mask=inside, other=0)
        v = tl.where(w != 0, v, float("-inf")) if CHOOSES else v + w.to(tl.float64)
    if CAUSAL:
        v = tl.where(key <= query, v, float("-inf"))
    top = tl.max(v, axis=0)
    e = tl.exp(v - tl.where(top > float("-inf"), top, 0.0))
    total = tl.sum(e, axis=0)
    tl.store(scores + row * keys + key, e * tl.where(total == 0, 0.0, 1 / total), mask=inside)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor | None:
    """Return softmax(q k^T scale + mask) v for [batch, heads, tokens, head size] float64; None for other inputs."""
    tensors = (query, key, value)
    if any(t.dim() != 4 or t.dtype != torch.float64 or t.device != query.device for t in tensors):
        return None
    if key.shape[-2] > LONGEST or not query.numel() or not key.numel():
        return None
    (batch, heads, queries, size), keys = query.shape, key.shape[-2]
    if key.shape[1] != heads or value.shape[1] != heads:  # heads that share keys
        key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
    together = max(1, _HELD // (batch * queries * keys))
    out = query.new_empty(batch, heads, queries, value.shape[-1])
    for start in range(0, heads, together):
        part = slice(start, start + together)
        scores = torch.matmul(query[:, part], key[:, part].transpose(-2, -1)).contiguous()
        _normalise(scores, None if mask is None else mask[:, part], causal, size**-0.5 if scale is None else scale)
        if batch == 1:
            torch.bmm(scores[0], value[0, part], out=out[0, part])
        else:
            out[:, part] = torch.matmul(scores, value[:, part])
    return out


def _normalise(scores: Tensor, mask: Tensor | None, causal: bool, scale: float) -> None:
    batch, heads, queries, keys = scores.shape
    given: Any = scores if mask is None else mask.view(torch.uint8) if mask.dtype is torch.bool else mask
    _softmax[(batch * heads * queries,)](
        scores, given, heads, queries, keys, *((0,) * 4 if mask is None else mask.stride()),
        SCALE=scale, HAS_M=mask is not None, CHOOSES=mask is not None and mask.dtype is torch.bool, CAUSAL=causal,
        BLOCK=1 << max(4, (keys - 1).bit_length()), num_warps=4 if keys <= 1024 else 8,
    )  # fmt: skip

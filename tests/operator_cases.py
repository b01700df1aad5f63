"""Operators that few models hold, each with an honest way to write it and a change that must be found.

Every entry takes h [2, 8, 16] and returns a tensor; what it needs besides is a constant of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from judge_tools import randn

Op = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One operator: as it stands, written in another way, and wrong. Those that need float32 are given it."""

    plain: Op
    honest: Op
    wrong: Op
    float32: bool = False


WEIGHT = randn(16, 16, seed=3) / 4
KERNEL = randn(8, 4, 3, seed=4) / 4
SLOTS = (torch.arange(16) * 5) % 8
SPREAD = SLOTS.expand(2, 8, 16)
TABLE = randn(20, 16, seed=8)
TOKENS = torch.arange(16).reshape(2, 8)
EDGES = torch.linspace(-2, 2, 9)
EYE = torch.eye(8)


def positive(h: torch.Tensor) -> torch.Tensor:
    """Return well-conditioned symmetric matrices."""
    return h @ h.transpose(1, 2) + 4 * EYE


def image(h: torch.Tensor) -> torch.Tensor:
    return h.reshape(1, 4, 8, 8)


def windows(padded: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Return the 3 x 3 neighbourhoods, [1, channels * 9, places]."""
    seen = padded.unfold(2, 3, stride).unfold(3, 3, stride)
    return seen.permute(0, 1, 4, 5, 2, 3).reshape(1, padded.shape[1] * 9, -1)


def rotated(h: torch.Tensor, angle: float) -> torch.Tensor:
    turn = torch.polar(torch.ones(8), angle * torch.arange(8.0) / 5)
    return torch.view_as_real(torch.view_as_complex(h.reshape(2, 8, 8, 2).contiguous()) * turn).flatten(-2)


def rotated_by_hand(h: torch.Tensor) -> torch.Tensor:
    a, b = h.reshape(2, 8, 8, 2).unbind(-1)
    cos, sin = torch.cos(torch.arange(8.0) / 5), torch.sin(torch.arange(8.0) / 5)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def low_rank(h: torch.Tensor, rank: int, sign: float = 1.0) -> torch.Tensor:
    """Return the nearest matrices of a rank; `sign` turns every other singular vector round."""
    left, size, right = torch.linalg.svd(h, full_matrices=False)
    signs = torch.where(torch.arange(8) % 2 == 0, 1.0, sign)
    left, right = left * signs, right * signs[:, None]
    return (left[..., :rank] * size[:, None, :rank]) @ right[:, :rank]


def shared(h: torch.Tensor, how: str, include: bool = False) -> torch.Tensor:
    return torch.zeros(2, 8, 8, dtype=h.dtype).scatter_reduce(2, SPREAD, h, how, include_self=include)


def put(h: torch.Tensor, accumulate: bool) -> torch.Tensor:
    places = (torch.arange(2)[:, None], torch.arange(8) // 2)
    return torch.zeros_like(h).index_put(places, h, accumulate=accumulate)


def bag(h: torch.Tensor, mode: str) -> torch.Tensor:
    return h + F.embedding_bag(TOKENS, TABLE.to(h.dtype), mode=mode)[:, None]


def grouped(h: torch.Tensor) -> torch.Tensor:
    x = h.float().reshape(2, 4, -1)
    y = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + 1e-5)
    return y.reshape(h.shape).to(h.dtype)


def smoothed(h: torch.Tensor, by: float) -> torch.Tensor:
    return F.cross_entropy(h.reshape(16, 16), torch.arange(16), reduction="none", label_smoothing=by)


def smoothed_by_hand(h: torch.Tensor) -> torch.Tensor:
    logs = h.reshape(16, 16).log_softmax(-1)
    return 0.9 * F.nll_loss(logs, torch.arange(16), reduction="none") - 0.1 * logs.mean(-1)


OPERATORS: dict[str, Case] = {
    "fft": Case(
        lambda h: torch.fft.ifft(torch.fft.fft(h) * torch.fft.fft(WEIGHT[0])).real,
        lambda h: torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(WEIGHT[0]), n=16),
        lambda h: torch.fft.ifft(torch.fft.fft(h) * torch.fft.fft(WEIGHT[0] * 1.001)).real,
        float32=True,
    ),
    "polar": Case(lambda h: rotated(h, 1.0), rotated_by_hand, lambda h: rotated(h, 1.001), float32=True),
    "cumsum": Case(
        lambda h: h.cumsum(1),
        lambda h: torch.tril(torch.ones(8, 8, dtype=h.dtype)) @ h,
        lambda h: h.cumsum(1) - h,
    ),
    "logcumsumexp": Case(lambda h: h.logcumsumexp(1), lambda h: h.exp().cumsum(1).log(), lambda h: h.logcumsumexp(2)),
    "scatter_reduce": Case(
        lambda h: shared(h, "mean"),
        lambda h: torch.zeros(2, 8, 8, dtype=h.dtype).scatter_add(2, SPREAD, h) / 2,
        lambda h: shared(h, "mean", include=True),
    ),
    "scatter_reduce amax": Case(
        lambda h: shared(h, "amax"),
        lambda h: torch.maximum(h[..., :8], h[..., 8:])[..., torch.argsort(SLOTS[:8])],
        lambda h: shared(h, "amin"),
    ),
    "index_put": Case(
        lambda h: put(h, True), lambda h: F.pad(h[:, ::2] + h[:, 1::2], (0, 0, 0, 4)), lambda h: put(h, False)
    ),
    "embedding_bag": Case(
        lambda h: bag(h, "mean"),
        lambda h: h + F.embedding(TOKENS, TABLE.to(h.dtype)).mean(1)[:, None],
        lambda h: bag(h, "max"),
    ),
    "unfold": Case(
        lambda h: F.unfold(image(h), 3, padding=1),
        lambda h: (
            F.pad(image(h), (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 1, 4, 5, 2, 3).reshape(1, 36, 64)
        ),
        lambda h: F.unfold(image(h), 3, padding=2, dilation=2),
    ),
    "conv_transpose": Case(
        lambda h: F.conv_transpose1d(h, KERNEL.to(h.dtype), stride=2, padding=1),
        lambda h: F.conv1d(
            F.pad(torch.stack([h, torch.zeros_like(h)], -1).flatten(-2)[..., :-1], (1, 1)),
            KERNEL.to(h.dtype).transpose(0, 1).flip(-1),
        ),
        lambda h: F.conv_transpose1d(h, KERNEL.flip(-1).to(h.dtype), stride=2, padding=1),
    ),
    "avg_pool": Case(
        lambda h: F.avg_pool2d(image(h), 3, 2, 1),
        lambda h: F.conv2d(h.reshape(4, 1, 8, 8), torch.full((1, 1, 3, 3), 1 / 9, dtype=h.dtype), None, 2, 1).reshape(
            1, 4, 4, 4
        ),
        lambda h: F.avg_pool2d(image(h), 3, 2, 1, count_include_pad=False),
    ),
    "group_norm": Case(lambda h: F.group_norm(h, 4), grouped, lambda h: F.group_norm(h, 4, eps=1e-3)),
    "cdist": Case(
        lambda h: torch.cdist(h, WEIGHT[None] * 4),
        lambda h: (h[:, :, None] - WEIGHT * 4).square().sum(-1).sqrt(),
        lambda h: torch.cdist(h, WEIGHT[None] * 4.01),
        float32=True,
    ),
    "solve": Case(
        lambda h: torch.linalg.solve(positive(h), h),
        lambda h: torch.cholesky_solve(h, torch.linalg.cholesky(positive(h))),
        lambda h: torch.linalg.solve(positive(h) + 0.01 * EYE, h),
        float32=True,
    ),
    "svd": Case(lambda h: low_rank(h, 4), lambda h: low_rank(h, 4, -1.0), lambda h: low_rank(h, 3), float32=True),
    "slogdet": Case(
        lambda h: torch.linalg.slogdet(positive(h))[1],
        lambda h: torch.linalg.cholesky(positive(h)).diagonal(dim1=-2, dim2=-1).log().sum(-1) * 2,
        lambda h: torch.linalg.cholesky(positive(h)).diagonal(dim1=-2, dim2=-1).log().sum(-1),
        float32=True,
    ),
    "erfinv": Case(
        lambda h: torch.erfinv(torch.tanh(h) * 0.9),
        lambda h: torch.special.ndtri((torch.tanh(h) * 0.9 + 1) / 2) / math.sqrt(2),
        lambda h: torch.erfinv(torch.tanh(h) * 0.901),
        float32=True,
    ),
    "lgamma": Case(  # near its zeros, starting from a sum that was rounded
        lambda h: torch.lgamma(h.abs() + 1),
        lambda h: torch.lgamma(h.abs() + 2) - torch.log(h.abs() + 1),
        lambda h: torch.lgamma(h.abs() + 1.001),
        float32=True,
    ),
    "bessel": Case(torch.special.i0, lambda h: torch.special.i0e(h) * h.abs().exp(), torch.special.i1, float32=True),
    "einsum": Case(
        lambda h: torch.einsum("bti,ij,bsj->bts", h, WEIGHT.to(h.dtype), h),
        lambda h: h @ (WEIGHT.to(h.dtype) @ h.transpose(1, 2)),
        lambda h: torch.einsum("bti,ji,bsj->bts", h, WEIGHT.to(h.dtype), h),
    ),
    "bucketize": Case(
        lambda h: torch.bucketize(h.float(), EDGES).to(h.dtype) * 0.1 + h,
        lambda h: (h.float()[..., None] > EDGES).sum(-1).to(h.dtype) * 0.1 + h,
        lambda h: torch.bucketize(h.float(), EDGES + 0.2).to(h.dtype) * 0.1 + h,
    ),
    "sort": Case(  # half of the numbers are equal
        lambda h: torch.sort((h * 2).round() / 2, -1)[0],
        lambda h: torch.topk((h * 2).round() / 2, 16, largest=False)[0],
        lambda h: torch.sort((h * 2).round() / 2, -1, descending=True)[0],
    ),
    "kthvalue": Case(
        lambda h: h.kthvalue(8, -1)[0], lambda h: h.median(-1)[0], lambda h: h.kthvalue(9, -1)[0], float32=True
    ),
    "bincount": Case(
        lambda h: h + torch.bincount(SLOTS, minlength=16).to(h.dtype),
        lambda h: h + F.one_hot(SLOTS, 16).sum(0).to(h.dtype),
        lambda h: h + torch.bincount(SLOTS[:12], minlength=16).to(h.dtype),
    ),
    "index_copy": Case(
        lambda h: h.index_copy(1, torch.tensor([1, 3]), h[:, :2] * 2),
        lambda h: torch.cat([h[:, :1], h[:, :1] * 2, h[:, 2:3], h[:, 1:2] * 2, h[:, 4:]], 1),
        lambda h: h.index_copy(1, torch.tensor([1, 4]), h[:, :2] * 2),
    ),
    "cond": Case(
        lambda h: torch.cond(h.sum() > 1e4, torch.sin, torch.cos, (h,)),
        lambda h: torch.cond(h.sum() <= 1e4, torch.cos, torch.sin, (h,)),
        lambda h: torch.cond(h.sum() > -1e4, torch.sin, torch.cos, (h,)),
    ),
    "lerp": Case(
        lambda h: torch.lerp(h, h.flip(1), 0.3),
        lambda h: 0.7 * h + 0.3 * h.flip(1),
        lambda h: torch.lerp(h, h.flip(1), 0.301),
    ),
    "softplus": Case(
        lambda h: F.softplus(h, beta=2), lambda h: torch.log1p(torch.exp(2 * h)) / 2, lambda h: F.softplus(h, beta=2.01)
    ),
    "cross_entropy": Case(lambda h: smoothed(h, 0.1), smoothed_by_hand, lambda h: smoothed(h, 0.11)),
    "remainder": Case(
        lambda h: torch.remainder(h, 0.6), lambda h: h - 0.6 * torch.floor(h / 0.6), lambda h: torch.remainder(h, 0.61)
    ),
    "var": Case(
        lambda h: torch.var_mean(h, -1)[0],
        lambda h: (h - h.mean(-1, keepdim=True)).square().sum(-1) / 15,
        lambda h: torch.var_mean(h, -1, correction=0)[0],
    ),
    "logaddexp": Case(
        lambda h: torch.logaddexp(h, h.flip(1)),
        lambda h: torch.stack([h, h.flip(1)]).logsumexp(0),
        lambda h: torch.logaddexp2(h, h.flip(1)),
    ),
    "atan2": Case(
        lambda h: torch.atan2(h, h.flip(1)),
        lambda h: torch.complex(h.flip(1), h).angle(),
        lambda h: torch.atan2(h.flip(1), h),
        float32=True,
    ),
    "pixel_shuffle": Case(
        lambda h: F.pixel_shuffle(image(h), 2),
        lambda h: h.reshape(1, 1, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(1, 1, 16, 16),
        lambda h: h.reshape(1, 1, 2, 2, 8, 8).permute(0, 1, 4, 3, 5, 2).reshape(1, 1, 16, 16),
    ),
    "pinv": Case(
        torch.linalg.pinv,
        lambda h: h.transpose(1, 2) @ torch.linalg.inv(h @ h.transpose(1, 2)),
        lambda h: torch.linalg.pinv(h, rtol=0.5),
        float32=True,
    ),
    "solve_triangular": Case(
        lambda h: torch.linalg.solve_triangular(positive(h).tril(), h, upper=False),
        lambda h: torch.linalg.inv(positive(h).tril()) @ h,
        lambda h: torch.linalg.solve_triangular(positive(h).tril(), h, upper=False, unitriangular=True),
        float32=True,
    ),
    "prelu": Case(
        lambda h: F.prelu(h, WEIGHT[0, :8].to(h.dtype)),
        lambda h: torch.where(h > 0, h, h * WEIGHT[0, :8, None].to(h.dtype)),
        lambda h: F.prelu(h, WEIGHT[1, :8].to(h.dtype)),
    ),
    "log1p": Case(  # the logarithm of 1 + x loses six of seven digits
        lambda h: torch.log1p(h.abs() * 1e-6) * 1e6,
        lambda h: torch.special.xlog1py(1e6, h.abs() * 1e-6),
        lambda h: torch.log1p(h.abs() * 1.01e-6) * 1e6,
        float32=True,
    ),
    "gather": Case(
        lambda h: h.gather(1, h.argmax(1, keepdim=True).expand(2, 8, 16)),
        lambda h: h.amax(1, keepdim=True).expand(2, 8, 16),
        lambda h: h.gather(1, h.argmin(1, keepdim=True).expand(2, 8, 16)),
    ),
}

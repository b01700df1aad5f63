"""Norms and bits of whole tensors; on the CPU in as few passes over memory as torch allows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

Tensor = torch.Tensor

_ROW = 1024  # so many float32 squares are added up in float32, the rest in float64
#: What a slice whose reference is zero is set against, of the tensor's mean square: else 1e-300 against 0 is infinite.
FLOOR = 1e-12
_SAFE = (1e-12, 1e15)  # norms within are neither overflowed nor, by any element that matters, underflowed


def norm(x: Tensor) -> Tensor:
    """Return the L2 norm in float64; on the CPU, where a widening reduction is slow, float32 goes row by row."""
    found: Tensor
    if x.dtype is torch.float32 and not x.is_cuda and x.is_contiguous() and x.numel():
        flat = x.view(-1)
        cut = x.numel() // _ROW * _ROW
        parts = [torch.linalg.vector_norm(flat[:cut].view(-1, _ROW), dim=1)] if cut else []
        if cut < x.numel():
            parts.append(torch.linalg.vector_norm(flat[cut:])[None])
        found = torch.linalg.vector_norm(torch.cat(parts).double())
        if _SAFE[0] < float(found) < _SAFE[1]:
            return found
    found = torch.linalg.vector_norm(x, dtype=torch.float64)
    return found


def squares(x: Tensor) -> Tensor:
    """Return sum x^2 in float64."""
    return norm(x).square()


def bitwise(x: Tensor, *others: Tensor | None) -> tuple[bool, ...]:
    """Whether tensors on the CPU hold the numbers of x, in its dtype; eight bytes at once is much the quickest."""
    words = _words(x)
    same = [words is not None and _same_words(x, words, y) for y in others]
    if any(same) and x.dtype.is_floating_point and math.isnan(float(x.sum())):
        same = [False] * len(others)  # NaN equals nothing, or infinities of both signs
    return tuple(
        found or (y is not None and y.dtype == x.dtype and torch.equal(x, y))
        for found, y in zip(same, others, strict=True)
    )


def _same_words(x: Tensor, words: Tensor, y: Tensor | None) -> bool:
    if y is None or y.dtype != x.dtype or y.shape != x.shape:
        return False
    theirs = _words(y)
    return theirs is not None and torch.equal(words, theirs)


def _words(x: Tensor) -> Tensor | None:
    size = x.dtype.itemsize
    if (
        size >= 8
        or (size < 2 and x.dtype.is_floating_point)
        or not x.is_contiguous()
        or x.numel() * size % 8
        or x.storage_offset() * size % 8
    ):
        return None
    return x.view(-1).view(torch.int64)


def slices(difference: Tensor, scale: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each dimension and ||d||^2 / ||x||^2 of every slice along it; both are given as squares, in float64."""
    floor = scale.mean() * FLOOR
    for dim in range(difference.dim()):
        if difference.shape[dim] < 2:
            continue
        others = [d for d in range(difference.dim()) if d != dim]
        over = difference.sum(others) if others else difference
        under = scale.sum(others) if others else scale
        count = max(difference.numel() // difference.shape[dim], 1)
        yield dim, over / (under + floor * count + 1e-300)


def worst_slice(difference: Tensor, scale: Tensor) -> Tensor:
    """Return the largest ||d|| / ||x|| over all slices along each dimension; both given as squares."""
    worst = difference.new_zeros(())
    for _, ratio in slices(difference, scale):
        worst = torch.maximum(worst, ratio.amax())
    return worst.sqrt()

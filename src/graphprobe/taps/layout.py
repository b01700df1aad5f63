"""The memory a tensor occupies, with everything forgotten that statistics do not depend on."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def collapse(value: torch.Tensor) -> tuple[list[int], list[int], int]:
    """Return (sizes, strides, repeat): the fewest dimensions that visit each element of `value` once.

    Order is lost, and dimensions of stride 0 (an ``expand``) are left out: every element then counts `repeat` times.
    A dense tensor comes back as one dimension of stride 1, however it is permuted.
    """
    repeat = 1
    sizes: list[int] = []
    strides: list[int] = []
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True), reverse=True):
        if size == 1:
            continue
        if stride == 0:
            repeat *= size
        elif strides and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    return sizes or [1], strides or [1], repeat


def chunks(x: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Cut into pieces [n] of at most so many elements, in logical order, copying only what is strided."""
    if x.is_contiguous() or x.dim() == 1:
        pieces = -(-x.numel() // most)
        yield from torch.split(x.reshape(-1), -(-x.numel() // pieces))
        return
    for part in torch.split(x, max(1, most // x[0].numel())):
        if part.numel() <= most:
            yield part.reshape(-1)
        else:
            yield from chunks(part[0], most)  # one entry of the first dimension is more than a chunk: split its others

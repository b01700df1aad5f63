"""One walk through several tensors of one shape, in the fewest dimensions that serve all of them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

#: Dimensions that the kernels follow.
DIMS = 5


class Joint(NamedTuple):
    """Sizes [DIMS], and for each tensor its strides [DIMS] in elements; the last dimension is the innermost."""

    numel: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    dense: bool  # every tensor is one run of memory, all in the same order
    is_long: bool  # an offset may exceed 32 bits

    def spread(self, present: list[bool]) -> list[int]:
        """List the strides of the tensors one after the other, zeros for those that are not there."""
        found = iter(self.strides)
        return [step for here in present for step in (next(found) if here else (0,) * DIMS)]


def joint(tensors: tuple[torch.Tensor, ...], *, inner: bool) -> Joint | None:
    """Return the walk in the order in which the first tensor lies in memory; None where it needs too many dimensions.

    With `inner`, the innermost dimension is one of the tensors' own, not joined with others.
    """
    return _joint(tuple(tensors[0].shape), tuple(t.stride() for t in tensors), inner)


@functools.lru_cache(4096)
def _joint(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], inner: bool) -> Joint | None:
    count = 1
    for size in shape:
        count *= size
    order = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: (-strides[0][d], d))
    dims: list[tuple[int, tuple[int, ...]]] = []
    for place, d in enumerate(order):
        size, steps = shape[d], tuple(s[d] for s in strides)
        alone = inner and place == len(order) - 1
        if dims and not alone and all(last == step * size for last, step in zip(dims[-1][1], steps, strict=True)):
            dims[-1] = (dims[-1][0] * size, steps)
        else:
            dims.append((size, steps))
    if len(dims) > DIMS:
        return None
    none = (0,) * len(strides)
    dense = count == 0 or not dims or (len(dims) == 1 and all(step == 1 for step in dims[0][1]))
    reach = max((sum((size - 1) * abs(steps[t]) for size, steps in dims) for t in range(len(strides))), default=0)
    # a row without an inner dimension is one of one element
    dims = [(1, none)] * (DIMS - len(dims)) + dims
    return Joint(
        count,
        tuple(size for size, _ in dims),
        tuple(tuple(steps[t] for _, steps in dims) for t in range(len(strides))),
        dense,
        max(reach, count) >= 2**30,
    )

"""Which elements of two values compare as numbers, which as a class, and which nobody cares about.

Elements of one class stay out of every sum: the same infinity, NaN on both sides, or both beyond the *sentinel* bound
with equal sign (mask values), else one mask value would swallow any bug. Don't-care elements are left out, too.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.lanes.norms import norm, squares

Tensor = torch.Tensor
Bounds = tuple[float, float]  # from which magnitude on x and y are mask values


def sentinel_bound(dtype: torch.dtype) -> float:
    """Return the magnitude from which on equal signs compare as one class.

    A thousandth of the largest number where the type has room to spare (bf16, fp32, fp64); float16's activations reach
    the hundreds, so there only what is within one percent of the largest number counts as a mask value.
    """
    if not dtype.is_floating_point:
        return float("inf")
    share = 0.99 if torch.finfo(dtype).max < 1e6 else 1e-3
    return share * torch.finfo(dtype).max


def sentinel_bounds(x: torch.dtype | Node, y: torch.dtype | Node) -> Bounds:
    """Return the bounds of both sides of a comparison: a mask lowered to float16 is -65504, and that of float32 -3e38.

    Each side is measured by its own type: float16's bound says nothing of a float32 activation of 70,000. That of a
    node is the narrowest that its value was cast to on its way.
    """
    narrow = [nodes.narrowest_dtype(side) if isinstance(side, Node) else side for side in (x, y)]
    return sentinel_bound(narrow[0]), sentinel_bound(narrow[1])


def taken(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast before's value to what `after` takes; a mask value becomes that type's own, where a cast would overflow."""
    out = x.to(dtype)
    if not x.dtype.is_floating_point or not dtype.is_floating_point or dtype.itemsize < 2:
        return out
    largest = torch.finfo(dtype).max
    if largest >= torch.finfo(x.dtype).max or (not x.is_cuda and not bool(torch.isinf(out).any())):
        return out
    masks = torch.isinf(out) & torch.isfinite(x) & (x.abs() >= sentinel_bound(x.dtype))
    return torch.where(masks, torch.copysign(torch.full_like(out, largest), out), out)


def compared(x: Tensor, y: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (difference, x, mask of elements whose class differs or None); 0 where a class compares."""
    return summed(x, y, bounds)[:3]


def summed(
    x: Tensor, y: Tensor, bounds: Bounds, size: Tensor | None = None, room: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Return what `compared` does, and the sums of squares of the first two.

    `size` is the norm of x where it is known, `room` memory that the difference may take.
    """
    difference = y - x if room is None else torch.sub(y, x, out=room)
    if not x.is_cuda:
        top, size = norm(difference), norm(x) if size is None else size
        if is_plain(top, size, bounds):
            return difference, x, None, top.square(), size.square()
    finite = torch.isfinite(x) & torch.isfinite(y)
    masked = (x.abs() >= bounds[0]) & (y.abs() >= bounds[1]) & (torch.signbit(x) == torch.signbit(y))
    same = masked | (x == y) | (torch.isnan(x) & torch.isnan(y))
    counts = finite & ~masked
    zero = x.new_zeros(())
    difference, x = torch.where(counts, difference, zero), torch.where(counts, x, zero)
    return difference, x, ~(finite | same), squares(difference), squares(x)


def is_plain(difference: Tensor, x: Tensor, bounds: Bounds) -> bool:
    """Whether no element needs a class, given the norms: a finite norm has finite elements only, and none beyond it.

    Asked on the CPU alone, where reading a number does not wait for a device.
    """
    return math.isfinite(float(difference)) and float(x) < bounds[0]


def count(wrong: Tensor | None) -> Tensor | int:
    """Count the elements whose class differs."""
    return 0 if wrong is None else wrong.sum()


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """Return a dtype in which the tensors can be subtracted: float32 for anything up to 32 bits, else float64."""
    wide = any(t.dtype in (torch.float64, torch.complex128) or not t.dtype.is_floating_point for t in tensors)
    return torch.float64 if wide else torch.float32


def real(x: Tensor) -> Tensor:
    """Show a complex tensor as a real one with a last dimension of 2."""
    return torch.view_as_real(x) if x.is_complex() else x


def keep(moved: Tensor | None, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Set don't-care elements to zero in all tensors."""
    if moved is None or moved.shape != x.shape:
        return (x, *others)
    return tuple(torch.where(moved, t.new_zeros(()), t) for t in (x, *others))


def moved(x: Tensor, again: Tensor) -> Tensor:
    """Return where a value changed when padded inputs were drawn anew."""
    same = (x == again) | (x.isnan() & again.isnan()) if x.is_floating_point() else x == again
    return ~same


def either(x: Tensor, y: Tensor) -> Tensor:
    """Return the union of two masks."""
    return x | y

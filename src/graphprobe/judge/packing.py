"""How stored codes are packed: one or several in an element, at even or uneven distances, with all bits in use or few.

Nothing is known of the format: codes are flipped, filled in and evaluated, and what changes tells.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensor = torch.Tensor
_SAMPLES = 4096


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the nearest of the ascending levels."""
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)


def repeated(code: int, dtype: torch.dtype, fields: int) -> int:
    """Return an element that packs `fields` times the same code."""
    width = dtype.itemsize * 8 // fields
    packed = sum(code << (width * i) for i in range(fields))
    top = 2 ** (dtype.itemsize * 8 - 1)
    signed = not dtype.is_floating_point and dtype.is_signed
    return packed - 2 * top if signed and packed >= top else packed


def flip(codes: Tensor, fields: int) -> Tensor:
    """Flip the lowest bit of every code of a tensor that packs `fields` of them into an element."""
    if codes.dtype.is_floating_point:
        return (codes.view(torch.uint8) ^ repeated(1, torch.uint8, fields)).view(codes.dtype)
    return codes ^ repeated(1, codes.dtype, fields)


def filled(codes: Tensor, fields: int, code: int) -> Tensor:
    """Return codes of the same kind, all of them `code`."""
    if codes.dtype.is_floating_point:
        return filled(codes.view(torch.uint8), fields, code).view(codes.dtype)
    return torch.full_like(codes, repeated(code, codes.dtype, fields))


def uneven(codes: Tensor, fields: int, evaluate: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return (scale of every element, levels) where at most 16 codes stand for values at uneven distances; else None.

    `evaluate` maps codes to [rows, columns] float64. The values of a scale differ by that factor alone.
    """
    width = codes.dtype.itemsize * 8 // fields
    if width > 4 and (codes.dtype.is_floating_point or int(codes.min()) < 0 or int(codes.max()) > 15):
        return None
    made: list[Tensor] = []
    scale: Tensor | None = None
    for code in range(2 ** min(width, 4)):
        value = evaluate(filled(codes, fields, code))
        scale = value.abs() if scale is None else torch.maximum(scale, value.abs())
        flat = value.reshape(-1)
        made.append(flat[:: max(1, flat.numel() // _SAMPLES)])
    assert scale is not None
    sample = torch.stack(made)
    size = sample.abs().amax(0)
    profile = (sample / size)[:, size > 0]
    if profile.shape[1] == 0 or not bool(torch.isfinite(profile).all()):
        return None
    levels = torch.unique(profile[:, 0])
    if not bool(((profile - profile[:, :1]).abs() < 1e-9).all()) or levels.numel() < 3:
        return None
    gaps = levels.diff()
    if bool((gaps - gaps.mean()).abs().amax() < 1e-9):
        return None
    return torch.where(scale > 0, scale, 1.0), levels


def narrowest(codes: Tensor, held: Tensor, step: Tensor, bits: int, size: int) -> int:
    """Return how many bits the codes really use: 2 to 4 where all fit and most groups reach the end of the range."""
    if bits != 8 or codes.dtype.is_floating_point:
        return bits
    low, high = int(codes.min()), int(codes.max())
    reached = (held / step).reshape(held.shape[0], -1, size)
    for narrow in (2, 3, 4):
        top = 2 ** (narrow - 1)
        signed, unsigned = -top <= low and high <= top - 1, low >= 0 and high <= 2 * top - 1
        ends = reached.abs().amax(-1) >= top - 1 - 1e-6
        ends |= (reached.amax(-1) - reached.amin(-1)) >= 2 * top - 2 - 1e-6
        if (signed or unsigned) and float(ends.double().mean()) >= 0.5:
            return narrow
    return bits

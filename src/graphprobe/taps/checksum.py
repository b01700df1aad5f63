"""A checksum of a value that tells where its bits stand: equal on every device, for every layout.

With ``w`` the bits of an element and ``p`` its place in logical order, all modulo 2**32 and with logical shifts:

    h = w ^ (p PLACE);  h ^= h >> 16;  h *= MIX;  h ^= h >> 13;  checksum = sum h

Of an element of 64 bits, ``w`` is its lower half ^ (its upper half times UPPER); a complex one is two elements. Integer
sums do not depend on the order, so it is the same however the work is cut. Different values share a checksum with a
chance of 2**-32; -0 and 0, and NaNs of different bits, are different values.
"""

from __future__ import annotations

import torch

from graphprobe.taps import layout

PLACE, MIX, UPPER = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
MASK = 2**32 - 1
#: Elements that are taken at once: on the CPU so many stay in the cache.
_CHUNK = {"cpu": 1 << 16}
_MOST = 1 << 26
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def of(value: torch.Tensor) -> torch.Tensor:
    """Return the checksum of a strided tensor as int64 [] on its device, without synchronising."""
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    if value.is_quantized:
        value = value.int_repr()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    value = value.resolve_neg()
    first = 0
    for part in layout.chunks(value, _CHUNK.get(value.device.type, _MOST)) if value.numel() else ():
        total += _sum(part, first)
        first += part.numel()
    return total & MASK


def _sum(part: torch.Tensor, first: int) -> torch.Tensor:
    """Return the sum of one run of elements [n] that begins at place `first`, modulo 2**64."""
    word = _word(part)
    place = torch.arange(part.numel(), dtype=torch.int32, device=part.device)
    # the product of a sum: only the first place of a run leaves 32 bits
    mixed = place.mul_(_signed(PLACE)).add_(_signed(first * PLACE)).bitwise_xor_(word)
    mixed.bitwise_xor_((mixed >> 16).bitwise_and_(0xFFFF)).mul_(_signed(MIX))
    mixed.bitwise_xor_((mixed >> 13).bitwise_and_(0x7FFFF))
    return mixed.sum(dtype=torch.int64)


def _word(part: torch.Tensor) -> torch.Tensor:
    """Return the bits of each element as int32."""
    size = part.element_size()
    if size > 8:
        raise TypeError(f"no checksum of elements of {size} bytes")
    if size == 8:
        halves = part.view(torch.int32).view(-1, 2)  # the lower one first
        return halves[:, 0] ^ (halves[:, 1] * _signed(UPPER))
    word = part.view(_WORDS[size]).to(torch.int32)
    return word & 0xFFFF if size == 2 else word


def _signed(number: int) -> int:
    """Return the number between -2**31 and 2**31 that is the same modulo 2**32."""
    return (number + 2**31) % 2**32 - 2**31

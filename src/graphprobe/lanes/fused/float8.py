"""Floating types of 8 bits, read as bytes: any GPU can do that, and no copy is needed."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl

#: What `decoded` calls the types; 0 is every other one.
_NAMES = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
KINDS = {getattr(torch, name): kind for kind, name in enumerate(_NAMES, 1) if hasattr(torch, name)}


@triton.jit
def decoded(x, KIND: tl.constexpr):
    """Return bytes of a type of `KINDS` as float32, exactly; of kind 0 what was given.

    Shifted into float16 they are numbers of another bias. "fnuz" types have one NaN in place of -0, e4m3fn has one at
    the end of either sign, e8m0 has neither sign nor zero.
    """
    if KIND == 0:
        found = x
    else:
        bits = x.to(tl.int32)
        if KIND == 5:
            word = tl.where(bits == 0, 0x00400000, bits << 23)  # 2 ** -127 is subnormal
            found = tl.where(bits == 0xFF, float("nan"), word.to(tl.float32, bitcast=True))
        else:
            if KIND == 2 or KIND == 4:  # noqa: SIM108
                word = bits << 8
            else:
                word = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
            half = word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            if KIND == 1:
                found = tl.where((bits & 0x7F) == 0x7F, float("nan"), half * 256.0)
            elif KIND == 2:
                found = half
            elif KIND == 3:
                found = tl.where(bits == 0x80, float("nan"), half * 128.0)
            else:  # float16 has infinities and NaNs where this type goes on
                high = ((bits & 3) + 4).to(tl.float32) * 8192.0
                high = tl.where((bits & 0x80) != 0, -high, high)
                found = tl.where((bits & 0x7C) == 0x7C, high, half * 0.5)
                found = tl.where(bits == 0x80, float("nan"), found)
    return found

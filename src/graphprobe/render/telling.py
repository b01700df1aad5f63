"""How two values differ in every detail, in one sentence."""

from __future__ import annotations

import math

from graphprobe.records import Comparison
from graphprobe.render.numbers import count, error


def details_text(found: Comparison | None) -> str:
    """Return what was found; "" where it was not asked for, or there was nothing to compare."""
    if found is None or not found.elements:
        return ""
    if not found.mismatched:
        return f"all {found.elements:,} elements are equal"
    parts = [f"{found.mismatched:,} of {count(found.elements, 'element')} differ"]
    if found.max_ulp > 0:
        parts.append(f"by up to {_ulps(found.max_ulp)}")
    if not math.isnan(found.cosine):
        parts.append(f"1 - cosine {error(1 - found.cosine)}")
    if found.worst_dim >= 0:
        parts.append(
            f"worst slice {error(found.worst_slice)}, number {found.worst_index} of dimension {found.worst_dim}"
        )
    odd = (("before", found.nonfinite_before), ("after", found.nonfinite_after))
    parts += [f"{number:,} not finite in {side}" for side, number in odd if number]
    if found.left_out:
        parts.append(f"{found.left_out:,} left out")
    return "; ".join(parts)


def _ulps(number: float) -> str:
    return f"{number:,.0f} ulp" if 10 <= number < 1e9 else f"{number:.3g} ulp"

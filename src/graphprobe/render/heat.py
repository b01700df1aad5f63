"""The colours of errors, from light to dark, and their legend."""

from __future__ import annotations

from itertools import pairwise

from graphprobe.render.scene import Key

#: error made -> fill, light to dark; the figure itself stands in the box.
SCALE = ((1e-6, "#fff7bc"), (1e-4, "#fee391"), (1e-2, "#fec44f"), (1e-1, "#fe9929"), (1.0, "#ec7014"))
GRAVE = "#cc4c02"  # an error of one and more, NaN and infinity
AGREED, PART, ALONE, HATCH = "#e6e6e6", "#fff9e8", "#ffffff", "#e2e2e2"
AGREED_LINE = "#888888"


def heat(error_made: float | None) -> str:
    """Return the fill for the error that was made at one place."""
    if error_made is None:
        return PART
    return next((fill for bound, fill in SCALE if error_made < bound), GRAVE)


def scale_keys(used: set[str]) -> list[Key]:
    """Return the legend of the colours for errors that are in use."""
    bounds = [f"{bound:g}" for bound, _ in SCALE]
    spans = [f"below {bounds[0]}", *(f"{low} to {high}" for low, high in pairwise(bounds)), "1 and more"]
    fills = [*(fill for _, fill in SCALE), GRAVE]
    return [Key(f"error made here {span}", fill) for span, fill in zip(spans, fills, strict=True) if fill in used]

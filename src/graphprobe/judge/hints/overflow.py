"""Hints where both sides are one function: a number that the native dtype cannot hold, or a score that it swallows."""

from __future__ import annotations

import torch

from graphprobe import nodes
from graphprobe.judge.hints.look import Look, as_float
from graphprobe.judge.hints.ratios import shown


def overflow(look: Look) -> str:
    """Name the first value of after's piece that is larger, in exact arithmetic, than its dtype can hold; or ''."""
    for node in (*(q for _, q in look.region.frontier), *look.region.operations("after")):
        native, exact = nodes.tensor_val(node), as_float(look.inside[1].get(node))
        if native is None or exact is None or not native.is_floating_point() or exact.numel() == 0:
            continue
        finite = exact[torch.isfinite(exact)]
        largest = float(finite.abs().amax()) if finite.numel() else 0.0
        end = torch.finfo(native.dtype).max
        if largest > end:
            kind = str(native.dtype).removeprefix("torch.")
            return (
                f"looks like an overflow: {look.label(node)} reaches {shown(largest)}, and {kind} ends at {shown(end)}"
            )
    return ""

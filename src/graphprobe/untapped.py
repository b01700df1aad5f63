"""The observer effect: what a compiled model returns by itself, against the graph that is compared in its place.

Comparing runs a graph's operations one by one. A compiler fuses them, so a compiled model may return something else;
where it does, the comparison speaks of the graph and not of the compiled code, and says so.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphprobe.execute import run_program
from graphprobe.program import Program

_ROUNDING = 64.0  # times the unit roundoff of an output: beyond that more than the order of operations has changed


def is_compiled(model: Any) -> bool:
    """Whether a model runs through ``torch.compile``, as a wrapper or in place."""
    wrapped = isinstance(model, torch.nn.Module) and isinstance(getattr(model, "_orig_mod", None), torch.nn.Module)
    return wrapped or getattr(model, "_compiled_call_impl", None) is not None


def note(side: str, model: Any, one: Program, bound: Mapping[str, Any], args: Any, kwargs: Any) -> str:
    """Run a compiled model by itself and say how its outputs relate to those of its graph; '' for any other model."""
    if not is_compiled(model):
        return ""
    if one.seeds:
        return f"{side} is compiled and draws random numbers: its own outputs were not compared with those of its graph"
    try:
        with torch.no_grad():
            given, named = copy.deepcopy((args, kwargs))  # a model may write into what it is given
            leaves = [v for v in pytree.tree_leaves(model(*given, **named)) if isinstance(v, torch.Tensor)]
    except Exception as error:  # the compiler's failure is the news here; the graph was compared all the same
        return f"{side} is compiled, and the compiled model raises {type(error).__name__}: {str(error)[:200]}"
    wanted = [n for path, n in one.outputs.items() if not path.startswith("state:")]
    values = run_program(one, bound, wanted)
    tapped = [values[n] for n in wanted if isinstance(values.get(n), torch.Tensor)]
    if len(tapped) != len(leaves) or any(x.shape != y.shape for x, y in zip(tapped, leaves, strict=False)):
        return f"{side} is compiled, and the compiled model returns other tensors than its graph"
    return _said(side, [_distance(x, y) for x, y in zip(tapped, leaves, strict=True)], tapped)


def _said(side: str, errors: list[float], tapped: list[torch.Tensor]) -> str:
    worst = max(errors, default=0.0)
    if worst == 0:
        return f"{side} is compiled: untapped it returns bitwise what its graph returns, operation by operation"
    said = f"{side} is compiled: untapped it differs by {worst:.1e} (relative L2) from its graph, which was compared"
    bounds = [_ROUNDING * torch.finfo(x.dtype).eps / 2 if x.is_floating_point() else 0.0 for x in tapped]
    if all(e <= bound for e, bound in zip(errors, bounds, strict=True)):
        return f"{said}; that is within rounding"
    return f"{said}; that is more than rounding: look into the compiler with graphprobe bisect"


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    if x.dtype == y.dtype and torch.equal(x, y):
        return 0.0
    if not torch.equal(x.isnan(), y.isnan()):
        return math.inf
    p, q = (torch.nan_to_num(t.to(torch.complex128 if t.is_complex() else torch.float64)) for t in (x, y))
    top, bottom = float(torch.linalg.vector_norm(q - p)), float(torch.linalg.vector_norm(p))
    return top / bottom if bottom > 0 else (0.0 if top == 0 else math.inf)

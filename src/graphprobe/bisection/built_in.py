"""Pipelines that need no plug-in: torch.export's decompositions, and torchao's quantisers."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule

from graphprobe.bisection import decompositions
from graphprobe.bisection.quantizing import INPUTS, QUANTIZERS, Pt2e, Quantize
from graphprobe.pipeline import Pipeline, installed

DECOMPOSITIONS = decompositions.NAME
#: Transforms by the names that a pipeline's text form may use for them.
TRANSFORMS: dict[str, Any] = {"quantize_": Quantize, "torchao": Quantize, "pt2e": Pt2e}


def plan(pipeline: Any, gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pipeline:
    """Return the pipeline that a caller means. `gm` goes into it, and carries from now on the inputs for it.

    Raises PipelineError.
    """
    if args or kwargs:
        gm.meta[INPUTS] = (args, kwargs)
    if isinstance(pipeline, str) and pipeline == DECOMPOSITIONS:
        return decompositions.plan(gm)
    found = Pipeline.of(pipeline, {**installed(), **TRANSFORMS})
    for transform in found.transforms:
        if isinstance(transform, QUANTIZERS):
            transform.check()
    return found


def tolerated(pipeline: Pipeline) -> tuple[str, ...]:
    """Return the kinds of findings that a pipeline is there to bring about."""
    return ("quantization",) if any(isinstance(t, QUANTIZERS) for t in pipeline.transforms) else ()

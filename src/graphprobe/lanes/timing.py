"""The lanes of a comparison as one callable that can be called again and again, on request as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphprobe import align, devices, inputs
from graphprobe.lanes.build import build
from graphprobe.lanes.plan import Plan
from graphprobe.lanes.regions import regions_of
from graphprobe.lanes.same import Weights, isomorphic, repeats, substitutes
from graphprobe.program import program


def lanes(
    before: torch.fx.GraphModule,
    after: torch.fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    exact: str = "auto",
    forced: str = "auto",
    detailed: bool = False,
    recorded: bool = False,
) -> Callable[[], torch.Tensor]:
    """Build the probe graph of two captured graphs; a call runs it once and returns its buffer on the device.

    With `exact` "never" that is both graphs in lockstep, compared at every cut. With `forced` "always" the forced lane
    runs also where it can only repeat before's. With `detailed` the buffer is that of `lanes.details`. With `recorded`
    a call replays a CUDA graph, which costs the host next to nothing; what the inputs hold then is what is read.
    Raises InputError where there is no CUDA device to record on.
    """
    left, right = program(before, args, kwargs), program(after, args, kwargs)
    bound = inputs.bind(before, args, kwargs, "before")
    regions = regions_of(left, right, align.align(left, right, (), bound))
    weights = Weights(left, right)
    same = {r for r in regions if exact == "auto" and isomorphic(r, weights)}
    chosen = set() if exact == "never" else set(regions) - same
    repeated = {r for r in regions if forced == "auto" and r not in chosen and repeats(r, weights)}
    probe = build(Plan(left, right, regions, chosen, repeated, substitutes(regions, weights), detailed=detailed))
    values = [bound[path] for path in probe.paths]
    probe.place(next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu")))

    def run() -> torch.Tensor:
        with torch.no_grad():
            probe.gm(*values)
        return probe.slots if probe.details is None else probe.details

    return devices.recorded(run) if recorded else run

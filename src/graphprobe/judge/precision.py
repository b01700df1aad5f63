"""Rule 2: the same function can be computed too coarsely (softmax, rotary phases, a router in bf16).

``R = rms(forced - t) / max(rms(before - t), u_after rms(t), rms(exact_after(cast(x)) - t))``, with ``t`` the value of
``exact_before`` and ``cast`` the cast of before's values, and of its parameters, into what `after` takes. (Buffers are
no parameters: a table of rotary frequencies that was cast to bf16 is computed too coarsely.) About 1 is rounding;
honest lowering to bf16 measures at most 1.1, sdpa against eager attention 2.2; above 8 is precision.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from graphprobe.judge.rows import Measured, unit_roundoff
from graphprobe.judge.same import rms
from graphprobe.lanes import measure
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

BOUND = 8.0


def ratio(
    replay: Replay, measured: Measured, quantized: bool = False, taken: Mapping[Node, torch.Tensor] | None = None
) -> float:
    """Return R with all three denominators. The region's frontier must have been fetched.

    Where `after` is quantised, what quantisation changes in exact arithmetic is a denominator too. `taken` are
    decisions that `after` takes as before does.
    """
    region = measured.region
    truth = replay.exact("before", region)
    moved = replay.mask(region.claim.before, region.claim.after)
    bounds = measure.sentinel_bounds(*(getattr(region.claim, s).meta["val"].dtype for s in ("before", "after")))

    def distance(value: torch.Tensor) -> float:
        x, y = measure.keep(moved, measure.real(truth).double(), measure.real(value).double())
        return rms(measure.compared(x, y, bounds)[0])

    before = replay.native("before", region)[region.claim.before]
    forced = replay.native("after", region, override=taken)[region.claim.after]
    override = {**_own_parameters(replay, region), **(taken or {})}
    rounded_inputs = replay.exact("after", region, cast=True, override=override)
    floor = max(
        distance(before),
        unit_roundoff(region) * distance(torch.zeros_like(truth)),
        distance(rounded_inputs),
        distance(replay.exact("after", region)) if quantized else 0.0,
    )
    top = distance(forced)
    return top / floor if floor > 0 else (0.0 if top == 0 else float("inf"))


def _own_parameters(replay: Replay, region: Region) -> dict[Node, torch.Tensor]:
    """Return the parameters that `after` holds in another dtype, with its own values."""
    own = {
        n: replay.plan.after.attribute(n) for n in region.after if n.op == "get_attr" and n in replay.plan.same_weight
    }
    return {n: value.detach() for n, value in own.items() if isinstance(value, torch.nn.Parameter)}

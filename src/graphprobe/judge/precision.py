"""Rule 2: the same function can be computed too coarsely (softmax, rotary phases, a router in bf16).

``R = rms(forced - t) / max(rms(before - t), u_after rms(t), rms(exact_after(cast(x)) - t))``, with ``t`` the value of
``exact_before`` and ``cast`` the cast of before's values, and of its parameters, into what `after` takes. (Buffers are
no parameters: a table of rotary frequencies that was cast to bf16 is computed too coarsely.) About 1 is rounding;
honest lowering to bf16 measures at most 1.1, sdpa against eager attention 2.2; above 8 is precision.

All that the cast does excuses only a model that was lowered as a whole, whose outputs are narrower. Where `after`
narrows a few values of a model that keeps its dtype (phases of 500 in bf16 before a cosine), what it does beyond the
roundoff of the narrower dtype is the loss itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.judge.rows import Measured, unit_roundoff
from graphprobe.judge.same import rms
from graphprobe.lanes import elements
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

BOUND = 8.0
_CASTS = {"aten::to", "aten::_to_copy", "prims::convert_element_type"}


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
    bounds = elements.sentinel_bounds(region.claim.before, region.claim.after)

    def distance(value: torch.Tensor) -> float:
        x, y = elements.keep(moved, elements.real(truth).double(), elements.real(value).double())
        return rms(elements.compared(x, y, bounds)[0])

    before = replay.native("before", region)[region.claim.before]
    forced = replay.native("after", region, override=taken)[region.claim.after]
    override = {**_own_parameters(replay, region), **(taken or {})}
    of_the_cast = distance(replay.exact("after", region, cast=True, override=override))
    if not _is_lowered(replay):
        of_the_cast = min(of_the_cast, _coarsest(region) * distance(torch.zeros_like(truth)))
    floor = max(
        distance(before),
        max(unit_roundoff(region), _thrown_away(region)) * distance(torch.zeros_like(truth)),
        of_the_cast,
        distance(replay.exact("after", region)) if quantized else 0.0,
        distance(replay.exact("after", region, override=finer)) if (finer := _finer(replay, region)) else 0.0,
    )
    top = distance(forced)
    return top / floor if floor > 0 else (0.0 if top == 0 else float("inf"))


def _thrown_away(region: Region) -> float:
    """Return the unit roundoff of what all readers of before's value cast it to at once: before keeps no more."""
    # torch puts assertions beside casts, which read nothing; an output hands on all digits
    users = [u for u in region.claim.before.users if u.op == "output" or not nodes.returns_nothing(u)]
    read = [nodes.tensor_val(u) for u in users if nodes.schema_name(u) in _CASTS]
    if not users or len(read) < len(users):
        return 0.0
    return min(torch.finfo(v.dtype).eps / 2 if v is not None and v.is_floating_point() else 0.0 for v in read)


def _coarsest(region: Region) -> float:
    """Return the unit roundoff of the coarsest floating value that `after` starts from."""
    values = [v for _, q in region.frontier if (v := nodes.tensor_val(q)) is not None and v.is_floating_point()]
    return max((torch.finfo(v.dtype).eps / 2 for v in values), default=0.0)


def _is_lowered(replay: Replay) -> bool:
    """Whether some output of `after` is of a narrower floating dtype than before's."""
    before, after = replay.plan.before.outputs, replay.plan.after.outputs
    for x, y in zip(before.values(), after.values(), strict=False):
        mine, theirs = nodes.tensor_val(x), nodes.tensor_val(y)
        if mine is None or theirs is None or not (mine.is_floating_point() and theirs.is_floating_point()):
            continue
        if torch.finfo(theirs.dtype).eps > torch.finfo(mine.dtype).eps:
            return True
    return False


def _finer(replay: Replay, region: Region) -> dict[Node, torch.Tensor]:
    """Return the weights and tables of which `before` holds a rounded copy, with after's own values: where a model is
    raised to a wider dtype, what it makes of its digits is no loss."""
    plan = replay.plan
    own = {n: (plan.same_weight[n], plan.after.attribute(n)) for n in region.after if n in plan.same_weight}
    return {
        n: value.detach()
        for n, (x, value) in own.items()
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and torch.finfo(value.dtype).eps < torch.finfo(plan.before.attribute(x).dtype).eps
    }


def _own_parameters(replay: Replay, region: Region) -> dict[Node, torch.Tensor]:
    """Return the parameters that `after` holds in another dtype, with its own values."""
    own = {
        n: replay.plan.after.attribute(n) for n in region.after if n.op == "get_attr" and n in replay.plan.same_weight
    }
    return {n: value.detach() for n, value in own.items() if isinstance(value, torch.nn.Parameter)}

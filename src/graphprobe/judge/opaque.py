"""Rule 3: a region with an operator that has no float64 form, no reference and no decomposition.

An operator of one's own that casts to float32 inside has none either, though it takes float64 tensors.

The side without such an operator still gives the exact value ``t``, and the other side must be as near to it as
rounding allows: ``R = rms(y - t) / max(rms(x - t), u rms(t))`` over the whole and over every slice. Where both sides
are opaque there is no ``t``, and `before` stands in its place: beyond rounding nothing can be said then, unless it is
the same operator on both sides, which does the same to the same.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.judge import precision
from graphprobe.judge.rows import unit_roundoff
from graphprobe.judge.same import Sameness, difference, rms, slices
from graphprobe.lanes import exact, narrow
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

RULE = "3 no float64 form"


def operators(replay: Replay, region: Region, side: str) -> list[str]:
    """Return the operators of a piece that exact arithmetic has to take from the native lane, or that are no finer."""
    found = [n for n in region.operations(side) if exact.takes_native(n) or n.target in replay.plan.native_only]
    found += _narrow(replay, region, side)
    return sorted({provenance.target_name(n) for n in found if not _reads_bits(n)})


def _narrow(replay: Replay, region: Region, side: str) -> list[Node]:
    """Return the operations that compute in fewer bits than the float64 they are given."""
    asked = [n for n in region.operations(side) if narrow.may_be_narrow(n) and n.target not in replay.plan.native_only]
    if not asked:
        return []
    program = replay.plan.before if side == "before" else replay.plan.after
    values = replay.exact_values(side, region)
    held = {n: exact.lift(program.attribute(n)) for node in asked for n in node.all_input_nodes if n.op == "get_attr"}
    return [n for n in asked if narrow.is_narrow(n, {**values, **held})]


def _reads_bits(node: Node) -> bool:
    """Whether the operation only takes stored bytes for another dtype: that is exact as it is."""
    if nodes.schema_name(node) != "aten::view":
        return False
    source = node.all_input_nodes[0]
    while nodes.is_view(source) and source.all_input_nodes:
        source = source.all_input_nodes[0]
    return source.op == "get_attr"


def ask_opaque(replay: Replay, region: Region) -> Sameness | None:
    """Judge a region by R alone; None where exact arithmetic knows all its operators."""
    mine, theirs = operators(replay, region, "before"), operators(replay, region, "after")
    if not mine and not theirs:
        return None
    names = ", ".join(dict.fromkeys((*mine, *theirs)))
    native = {s: replay.native(s, region)[getattr(region.claim, s)] for s in ("before", "after")}
    known = "before" if not mine else "after" if not theirs else ""
    truth = replay.exact(known, region) if known else native["before"]
    if not isinstance(truth, torch.Tensor) or not truth.is_floating_point() or native["after"].shape != truth.shape:
        return _unknown(f"{names} has no float64 form, and there are no floating tensors of one shape to compare")
    truth = truth.double()
    clear, kept, wrong = difference(replay, region, truth, native[known or "before"])
    cloudy, _, wrong_cloudy = difference(replay, region, truth, native["before" if known == "after" else "after"])
    if bool((wrong ^ wrong_cloudy).any()):
        return Sameness(False, torch.inf, rule=RULE, note=f"{names}: one side is not finite where the other is")
    ratio, floor = _ratio(cloudy, clear, kept, unit_roundoff(region))
    if ratio <= precision.BOUND:
        missed = f"a defect below {precision.BOUND * floor:.0e} would not show"
        note = f"{names} has no float64 form: R = {ratio:.1f}, {missed}"
        return Sameness(True, ratio, rule=RULE, kind="rounding", note=note)
    if known or mine == theirs:
        note = f"R = {ratio:.1f}: {names} computes another function, or far too coarsely"
        return Sameness(False, ratio, rule=RULE, note=note)
    return _unknown(f"R = {ratio:.1f}, but {names} have no float64 form; register one with graphprobe.exact_rule")


def _unknown(reason: str) -> Sameness:
    return Sameness(None, torch.nan, reason=reason, rule=RULE)


def _ratio(cloudy: torch.Tensor, clear: torch.Tensor, kept: torch.Tensor, u: float) -> tuple[float, float]:
    """Return the worst R over the whole tensor and its slices, and the relative size of the whole's denominator."""
    floor = max(rms(clear), u * rms(kept))
    size = rms(kept)
    worst = rms(cloudy) / floor if floor > 0 else (0.0 if rms(cloudy) == 0 else float("inf"))
    for dim in range(cloudy.dim()):
        if cloudy.shape[dim] > 1 and cloudy.numel() // cloudy.shape[dim] >= 16:  # few numbers scatter
            under = torch.maximum(slices(clear, dim), u * slices(kept, dim))
            worst = max(worst, float(torch.nan_to_num(slices(cloudy, dim) / under, nan=0.0).amax()))
    return worst, floor / size if size > 0 else 0.0

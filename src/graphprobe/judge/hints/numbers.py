"""Hints about a number that only one side has as a number: folded into a weight, it shows in what the other computes.

The factor of one multiplication is sought with which the sides would agree; evaluated with that one, the piece proves
it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.judge.hints.look import Look, Tensor, relative
from graphprobe.judge.hints.ratios import shown
from graphprobe.judge.hints.trials import scaling
from graphprobe.judge.same import difference, rms

_MOST = 4  # multiplications that are tried
_STEPS, _MOVE = 8, 1e-4  # each step costs two evaluations
_FOLDED = 1e-5  # a factor that is folded into float32 weights leaves this much of the difference at most


def training(look: Look) -> str | None:
    """After holds an operation that only training has, and before does not."""
    if any(_trains(x) for x in look.region.operations("before")):
        return None
    found = [y for y in look.region.operations("after") if _trains(y)]
    if not found:
        return None
    look.proved.append(found[0])
    return f"looks like a model left in training mode: {look.label(found[0])} does what only training does"


def _trains(node: Node) -> bool:
    name = nodes.schema_name(node)
    if name == "aten::scaled_dot_product_attention":
        return float(nodes.argument(node, "dropout_p") or 0.0) > 0
    if "dropout" in name:
        return bool(nodes.argument(node, "train")) and float(nodes.argument(node, "p") or 0.0) > 0
    return "batch_norm" in name and nodes.argument(node, "training") is True


def other_number(look: Look) -> str | None:
    """One side multiplies by a number, and the other computes what it would with another one."""
    for side, node, number in list(_factors(look))[:_MOST]:
        values = look.inside[side == "after"]
        held = values.get(node)
        if not isinstance(held, Tensor) or not held.is_floating_point():
            continue
        found = _solved(look, side, node, held, look.raw[1] if side == "before" else look.raw[0])
        if found is None:
            continue
        # a division by d is a multiplication by 1/d: what stands in the graph is named
        share = 1 / found if nodes.schema_name(node) == "aten::div" else found
        wanted = number * share if math.isfinite(share) else math.inf
        before, after = (number, wanted) if side == "before" else (wanted, number)
        where = f"as if {look.label(node)} took {shown(wanted)} where {side} has {shown(number)}; so the sides agree"
        other = "after" if side == "before" else "before"
        if side == "after" and abs(wanted - 1) < 1e-6:
            continue  # an operation too much: what its factor counts is for others to say
        if side == look.culprit.side:
            look.proved.append(node)
        if abs(found) < 1e-4:
            return f"looks like a term that is left out: {other} computes {where}"
        return f"looks like {scaling(before, after)}: {other} computes {where}"
    return None


def _factors(look: Look) -> Iterator[tuple[str, Node, float]]:
    for side in ("before", "after"):
        for node in look.region.operations(side):
            if node not in look.culprit.lone or nodes.schema_name(node) not in ("aten::mul", "aten::div"):
                continue
            numbers = [a for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
            if len(numbers) == 1 and numbers[0] != 0 and len(node.all_input_nodes) == 1:
                yield side, node, float(numbers[0])


def _solved(look: Look, side: str, node: Node, held: Tensor, theirs: Tensor) -> float | None:
    """Return the share of `node` with which its side computes what the other one does; None where there is none.

    Gauss-Newton in one unknown: exact after one step where the piece is linear in the factor.
    """
    share, left = 1.0, math.inf
    for _ in range(_STEPS):
        value = _with_share(look, side, node, held * share)
        moved = _with_share(look, side, node, held * (share + _MOVE))
        if value is None or moved is None or value.shape != theirs.shape:
            return None
        change, kept, wrong = difference(look.replay, look.region, theirs, value)
        slope = (moved - value).double() / _MOVE
        before, left = left, relative(rms(change), rms(kept))
        if bool(wrong.any()) or not bool(torch.isfinite(slope).all()) or rms(slope) == 0 or left > before:
            return None
        share -= float((slope * change).sum() / slope.square().sum())
        if left <= _FOLDED * min(look.distance(look.raw[1]), 1.0):
            return float(f"{share:.5g}")
    return None


def _with_share(look: Look, side: str, node: Node, value: Tensor) -> Tensor | None:
    tried = look.replay.exact(side, look.region, override={node: value})
    return tried if isinstance(tried, Tensor) and tried.is_floating_point() else None

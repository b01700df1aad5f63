"""Hints about scales of codes: missing, inverted, of other rows, transposed, zero points that are not taken off.

Codes are coarse, so no ratio is exact here. The scale that stands in after is exchanged for what a usual mistake would
have made of it, and the result that comes near before's names the mistake; else the ratio of every channel is asked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from graphprobe.judge.hints.look import Look, Tensor
from graphprobe.judge.hints.ratios import shown, vector_ratio
from graphprobe.judge.same import rms
from graphprobe.provenance import weight_name as called

_CLEARLY = 0.25
_LIKE = 0.1  # relative scatter of a channel's ratio among codes


def scale(look: Look) -> str | None:
    """Try the usual mistakes on every scale of after's codes."""
    codes = _has_codes(look)
    if not codes:
        return None
    plain = look.distance(look.raw[1])
    best: tuple[float, str, Node] | None = None
    for node, held in _scales(look):
        if held.numel() > 1 and bool((held == held.flatten()[0]).all()):
            if bool((held == 1).all()):
                return f"looks like a missing scale: {called(node)} is 1 everywhere"
            return (
                f"looks like one scale used for all: {called(node)} holds {shown(float(held.flatten()[0]))} everywhere"
            )
        for words, tried in _trials(held):
            value = look.again({node: tried})
            left = look.distance(value) if value is not None else float("inf")
            if left < _CLEARLY * plain and left < 0.5 and (best is None or left < best[0]):
                best = (left, words, node)
    if best is not None:
        left, words, node = best
        corrected = f"with {called(node)} so corrected the difference falls from {shown(plain)} to {shown(left)}"
        return f"looks like {words}: {corrected}"
    return _by_channel(look)


def _has_codes(look: Look) -> bool:
    program = look.replay.plan.after
    found = [program.attribute(n) for n in look.region.after if n.op == "get_attr"]
    return any(isinstance(v, Tensor) and (v.dtype.itemsize == 1 and v.dtype != torch.bool) for v in found)


def _scales(look: Look) -> Iterator[tuple[Node, Tensor]]:
    known = look.replay.plan.same_weight
    for node, value in look.weights("after").items():
        if (node not in known and value.dtype.itemsize > 1) or (
            node not in known and value.dim() > 0 and value.is_floating_point()
        ):
            yield node, value.double()


def _trials(held: Tensor) -> Iterator[tuple[str, Tensor]]:
    if bool((held != 0).all()):
        yield "an inverted scale", 1 / held
    if held.numel() == 1:
        return
    for dim in range(held.dim()):
        if held.shape[dim] > 1:
            for by in (1, -1):
                yield "the scale of other rows (shifted by one)", held.roll(by, dim)
    if held.dim() >= 2:
        rows, columns = held.shape[0], held.numel() // held.shape[0]
        yield "a transposed scale", held.reshape(columns, rows).t().reshape(held.shape)
        yield "a transposed scale", held.transpose(0, 1)
    yield "a zero point that is off by one", held - 1
    yield "a zero point that is off by one", held + 1


def _by_channel(look: Look) -> str | None:
    """Ask the ratio of every channel of the result, which codes blur."""
    truth, other = look.truth, look.other
    if truth.dim() < 2 or rms(other - truth) <= _LIKE * rms(truth):  # every ratio is 1 as far as codes let one see
        return None
    dims = list(range(truth.dim() - 1))
    c = (truth * other).sum(dims) / truth.square().sum(dims).clamp(min=1e-300)
    if bool((c == 0).any()) or rms(other - c * truth) > _LIKE * rms(other):
        return None
    for node, held in _scales(look):
        v = held.flatten()
        if v.numel() == c.numel():
            said = vector_ratio(c, v, _LIKE)
            if said:
                return f"looks like {said}: {called(node)}, by the ratios of the channels"
    middle = float(c.median())
    if bool(((c / middle - 1).abs() < _LIKE).all()):
        for _, held in _scales(look):
            if held.numel() == 1:
                s = float(held)
                for value, words in (
                    (1 / s, "a missing scale"),
                    (s * s, "an inverted scale"),
                    (1 / (s * s), "an inverted scale"),
                ):
                    if abs(middle / value - 1) < _LIKE:
                        return f"looks like {words}: after is about {shown(middle)} times before everywhere"
        return f"looks like a missing or a wrong scale: after is about {shown(middle)} times before everywhere"
    return None

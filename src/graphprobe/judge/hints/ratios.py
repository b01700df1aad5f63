"""Signatures of numbers: a constant ratio, a ratio for every channel or row, a constant distance, a missing addend."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.judge.hints.look import EQUAL, Look, Tensor, as_float, dimension, relative
from graphprobe.judge.same import rms
from graphprobe.provenance import weight_name as called

_FEW = 4  # a ratio of fewer numbers says nothing
_SAME_NUMBER = 1e-6


def constant_ratio(look: Look) -> str | None:
    """After is c times before everywhere: a missing, inverted or doubled scale, a sum taken twice, a sign."""
    truth, other = look.truth, look.other
    if truth.numel() < _FEW or rms(truth) == 0 or float(truth.std()) == 0 or rms(other) == 0:
        return None
    c = float((truth * other).sum() / truth.square().sum())
    if relative(rms(other - c * truth), rms(other)) > EQUAL or _near(c, 1.0, 1e-12):
        return None
    said = f"after is {shown(c)} times before everywhere"
    if _near(c, -1.0):
        return f"looks like a flipped sign: {said}"
    for constant in constants(look, "before"):
        words = _of_a_scale(c, constant, _divides(look, constant))
        if words:
            return f"looks like {words}: {said}, and before's scale is {shown(constant)}"
    if c >= 2 and _near(c, round(c)):
        twice = "added twice" if round(c) == 2 else f"reduced twice over {round(c)} ranks"
        return f"looks like a doubled sum: {said}, as if {twice}"
    return f"looks like another scale: {said}"


def _of_a_scale(c: float, constant: float, divides: bool) -> str:
    """Name what has become of a scale if the results differ by c."""
    if constant <= 0 or constant == 1:
        return ""
    scale = 1 / constant if divides else constant
    if _near(c, 1 / scale):
        return "a missing scale"
    if _near(c, scale**-2):
        return "an inverted scale"
    if _near(c, scale):
        return "a scale applied twice"
    return "the root of a scale in its place" if _near(c, scale**-0.5) else ""


def _divides(look: Look, constant: float) -> bool:
    found = [n for n in look.region.operations("before") if nodes.schema_name(n) == "aten::div"]
    return any(isinstance(a, (int, float)) and _near(float(a), constant) for n in found for a in n.args)


def constants(look: Look, side: str) -> Iterator[float]:
    """Yield the numbers that stand in a piece: arguments, and weights of one element."""
    for node in getattr(look.region, side):
        if node.op == "get_attr":
            value = look.weights(side).get(node)
            if value is not None and value.numel() == 1:
                yield float(value)
            continue
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                yield float(value)
        if nodes.schema_name(node) == "aten::scaled_dot_product_attention" and node.args:
            val = nodes.tensor_val(node.args[0]) if isinstance(node.args[0], Node) else None
            if val is not None:
                yield float(val.shape[-1]) ** -0.5


def constant_distance(look: Look) -> str | None:
    """After is before plus the same number everywhere."""
    change = look.change
    if change.numel() < _FEW or float(look.truth.std()) == 0 or not bool((change != 0).any()):
        return None
    mean = float(change.mean())
    if mean == 0 or relative(rms(change - mean), abs(mean)) > 1e-6:
        return None
    return f"looks like another added constant: after is before plus {shown(mean)} everywhere"


def addend(look: Look) -> str | None:
    """What differs is a multiple of a value that one of the sides holds: an addend dropped, or added several times."""
    change = look.change
    size = rms(change)
    if size == 0 or change.numel() < _FEW:
        return None
    for side, name, value in _values(look):
        if value.dim() > change.dim() or value.numel() < _FEW:
            continue
        try:
            wide = value.expand_as(change)
        except RuntimeError:
            continue
        norm = float(wide.square().sum())
        if norm == 0:
            continue
        k = float((change * wide).sum()) / norm
        if abs(k) < 1e-3 or relative(rms(change - k * wide), size) > EQUAL:
            continue
        if _near(k, -1.0):
            return f"looks like a missing addend: what {side} holds as {name} is not added in after"
        if _near(k, 1.0) and side == "before":
            return f"looks like something added twice: after is before plus {name} once more"
        if k > 0 and _near(k, round(k)) and round(k) > 1:
            return f"looks like something added {round(k) + 1} times, as by every one of {round(k) + 1} ranks: {name}"
        if _near(k, 1.0):
            return f"looks like a superfluous addend: after is before plus {name}"
        if _near(k, -2.0):
            return f"looks like a flipped sign: {name} is subtracted where before adds it"
    return None


def _values(look: Look) -> Iterator[tuple[str, str, Tensor]]:
    """Yield what both pieces hold: weights, frontier values and results, each once."""
    seen: set[int] = set()
    ends = {look.region.claim.before, look.region.claim.after}
    for side, values in zip(("before", "after"), look.inside, strict=True):
        for node, value in (*look.weights(side).items(), *values.items()):
            found = as_float(value)
            if node in ends or found is None or id(value) in seen or not bool(torch.isfinite(found).all()):
                continue
            seen.add(id(value))
            yield side, called(node) if node.op == "get_attr" else look.label(node), found


def slice_ratios(look: Look) -> str | None:
    """Every channel, head or token is before's times a number of its own; a norm's epsilon shows in that number."""
    truth, other = look.truth, look.other
    if truth.dim() == 0 or truth.numel() < _FEW * 2 or rms(other) == 0:
        return None
    if truth.dim() > 1 and truth.shape[-1] >= _FEW:  # rows first: tokens
        c = _ratio(truth, other, [truth.dim() - 1])
        if c is not None:
            return _epsilon(look, c) or (
                f"looks like another norm or scale of every row: each is before's times a number of its own, "
                f"from {shown(float(c.amin()))} to {shown(float(c.amax()))}"
            )
    for dim in reversed(range(truth.dim())):
        if 1 < truth.shape[dim] < truth.numel() / 2:
            c = _ratio(truth, other, [d for d in range(truth.dim()) if d != dim])
            if c is not None:
                return _channels(look, c, dim)
    return None


def _ratio(truth: Tensor, other: Tensor, dims: list[int], tolerance: float = EQUAL) -> Tensor | None:
    """Return other / truth for every slice if it is constant in each, [.., 1, ..]; None where it is not."""
    bottom = truth.square().sum(dims, keepdim=True)
    if bool((bottom == 0).any()):
        return None
    c = (truth * other).sum(dims, keepdim=True) / bottom
    if relative(rms(other - c * truth), rms(other)) > tolerance:
        return None
    return c


def _epsilon(look: Look, c: Tensor) -> str | None:
    """Find e and e' with c^2 = (v + e) / (v + e'), v being the mean square or the variance of some input's rows."""
    target = c.flatten().pow(-2)
    for p, _ in look.region.frontier:
        x = as_float(look.replay.values.get(p))
        if x is None or x.dim() < 2 or x.shape[-1] < 2:
            continue
        for v in (x.square().mean(-1).flatten(), x.var(-1, correction=0).flatten()):
            if v.shape != target.shape or v.numel() < 3:
                continue
            # target (v + e) = v + e', two unknowns
            system = torch.stack([target, -torch.ones_like(target)], 1)
            wanted = v - target * v
            scale = float(wanted.abs().amax())
            if scale == 0 or not bool(torch.isfinite(system).all() & torch.isfinite(wanted).all()):
                continue
            found = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution.flatten()
            e, e_after = (float(t) for t in found)
            left = rms(system @ found - wanted)
            if left < 1e-6 * scale and -1e-9 < e < 0.1 and -1e-9 < e_after < 0.1:
                return (
                    f"looks like a wrong epsilon: the rows fit a norm with {shown(max(e_after, 0.0))} "
                    f"where before's is {shown(max(e, 0.0))}"
                )
    return None


def _channels(look: Look, c: Tensor, dim: int) -> str:
    """Say how the numbers of a channel-wise ratio relate to a vector that one of the pieces reads."""
    ratio = c.flatten()
    off = int((ratio - 1).abs().gt(EQUAL).sum())
    place = dimension(look.truth, dim)
    if off <= ratio.numel() // 4:
        worst = int((ratio - 1).abs().argmax())
        return (
            f"looks like a few wrong rows: {off} of {place} are scaled, index {worst} by {shown(float(ratio[worst]))}"
        )
    for side in ("after", "before"):
        for node, value in look.weights(side).items():
            v = value.double().flatten()
            if v.numel() != ratio.numel() or bool((v == 0).any()):
                continue
            said = vector_ratio(ratio, v)
            if said:
                return f"looks like {said} along {place}: {called(node)}"
    return (
        f"looks like another scale of every channel: along {place} each is before's times a number of its own, "
        f"from {shown(float(ratio.amin()))} to {shown(float(ratio.amax()))}"
    )


def vector_ratio(ratio: Tensor, v: Tensor, tolerance: float = _SAME_NUMBER) -> str:
    """Say what the ratio after / before of every channel makes of a scale v that a side applies; '' if nothing."""

    def constant(x: Tensor) -> bool:
        middle = x.median()
        return bool(((x / middle - 1).abs() < tolerance).all())

    if constant(v) and not constant(ratio):
        return ""
    if constant(ratio * v):
        return "a missing scale"
    if constant(ratio * v * v) or constant(ratio / (v * v)):
        return "an inverted scale"
    if constant(ratio / v):
        return "a scale applied twice"
    wanted = v / ratio  # what v had to be for both sides to agree
    if bool(((wanted.sort().values / v.sort().values - 1).abs() < tolerance).all()):
        return "the scale of other channels (permuted, or laid out along another dimension)"
    return ""


def _near(x: float, y: float, tolerance: float = _SAME_NUMBER) -> bool:
    return abs(x - y) <= tolerance * abs(y)


def shown(x: float) -> str:
    """Show a number with as many digits as it needs, five at most."""
    return f"{x:.5g}"

"""Hints about weights: zero, on the meta device, not tied, transposed, permuted, another layer's, merged otherwise."""

from __future__ import annotations

import torch
from torch.fx import Node

from graphprobe.judge.hints.look import Look, Tensor, close, dimension
from graphprobe.judge.hints.orders import permutation, words
from graphprobe.judge.hints.ratios import shown
from graphprobe.judge.same import rms

_LARGEST_RANK = 16
_MOST_NUMBERS = 1 << 22  # beyond that no singular values are asked for


def weight(look: Look) -> str | None:
    """Compare the weights of both pieces that stand in the same place and do not hold the same."""
    mine, theirs = look.weights("before"), look.weights("after")
    known = look.replay.plan.same_weight
    taken = {known[y] for y in theirs if y in known}
    left = [x for x in mine if x not in taken]
    for y, held in theirs.items():
        if held.is_meta:
            return f"looks like a weight that was never loaded: {y.target} is on the meta device"
        if y in known:
            continue
        if held.numel() > 1 and not bool((held != 0).any()):
            return f"looks like a weight that was never loaded: {y.target} is zero everywhere"
        x = next((x for x in left if mine[x].shape == held.shape and str(x.target) == str(y.target)), None)
        x = x or next((x for x in left if mine[x].shape == held.shape), None)
        if x is not None:
            return _compared(look, x, mine[x], y, held)
    return None


def _compared(look: Look, x: Node, wanted: Tensor, y: Node, held: Tensor) -> str | None:
    tied = _tied_to(look, x, wanted)
    if tied:
        return f"looks like a weight that is not tied: in before {x.target} is {tied}, in after it holds other numbers"
    double, other = wanted.double(), held.double()
    if double.dim() == 2 and double.shape[0] == double.shape[1] and close(other, double.t()):
        return f"looks like a transposed weight: {y.target} holds before's with rows and columns swapped"
    for dim in range(double.dim()):
        order = (
            permutation(double.movedim(dim, 0).flatten(1), other.movedim(dim, 0).flatten(1))
            if double.dim() > 1
            else None
        )
        if order is not None:
            return f"looks like {words(order)} along {dimension(double, dim)} of the weight {y.target}"
    owner = _owner(look, held, x)
    if owner:
        return f"looks like another layer's weight: {y.target} holds what before has as {owner}"
    return _numbers(y, double, other)


def _tied_to(look: Look, x: Node, wanted: Tensor) -> str:
    """Return the name under which before reads the very same memory once more, or ''."""
    before = look.replay.plan.before
    for node in before.live:
        if node.op != "get_attr" or node.target == x.target:
            continue
        value = before.attribute(node)
        if (
            isinstance(value, Tensor)
            and not value.is_meta
            and value.data_ptr() == wanted.data_ptr()
            and value.numel() > 1
        ):
            return str(node.target)
    aliases = [str(n.target) for n in before.live if n.op == "get_attr" and str(n.target) == str(x.target)]
    uses = [u for n in before.live if n.op == "get_attr" and str(n.target) == str(x.target) for u in n.users]
    return f"the weight of {look.label(uses[0])}" if len(aliases) > 0 and len(uses) > 1 else ""


def _owner(look: Look, held: Tensor, x: Node) -> str:
    before = look.replay.plan.before
    for node in before.live:
        if node.op != "get_attr" or str(node.target) == str(x.target):
            continue
        value = before.attribute(node)
        same = isinstance(value, Tensor) and value.shape == held.shape and value.dtype == held.dtype
        if same and torch.equal(value.detach(), held):
            return str(node.target)
    return ""


def _numbers(y: Node, wanted: Tensor, held: Tensor) -> str | None:
    """Say in what two weights differ: a factor, a few rows, a matrix of low rank, everything."""
    change = held - wanted
    c = float((held * wanted).sum() / wanted.square().sum().clamp(min=1e-300))
    if rms(held - c * wanted) < 1e-6 * rms(held):
        return f"looks like another scale of a weight: {y.target} is {shown(c)} times before's"
    if wanted.dim() > 1:
        for dim in (0, 1):
            rows = change.movedim(dim, 0).flatten(1).abs().amax(1) > 0
            count = int(rows.sum())
            if 0 < count <= max(1, rows.numel() // 4):
                first = int(rows.nonzero()[0])
                place = f"{dimension(wanted, dim)} of {y.target}"
                return f"looks like wrong rows of a weight: {count} along {place}, first {first}"
    if wanted.dim() == 2 and wanted.numel() <= _MOST_NUMBERS and bool(torch.isfinite(change).all()):
        values = torch.linalg.svdvals(change)
        rank = int((values > 0.02 * values[0]).sum())
        if rank <= min(_LARGEST_RANK, min(wanted.shape) // 4):
            return (
                f"looks like an adapter merged otherwise: {y.target} differs from before's by a matrix of rank {rank}"
            )
    cosine = float((held * wanted).sum() / (rms(held) * rms(wanted) * wanted.numel() or 1.0))
    if abs(cosine) < 0.5 and wanted.numel() >= 16:
        shares = f"{y.target} has nothing in common with before's (cosine {cosine:.2f})"
        return f"looks like a weight that was never loaded: {shares}"
    return None

"""Signatures of masks: off by one, forgotten, boolean but added, a fill value that does not hide, other windows.

What a mask hides is read off values where they are mask values or infinite, and off the dependence of tokens on each
other where attention is one operator: each token of an input is moved in turn, and what moves of the result sees it.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.judge.hints.look import Look, Tensor, bound

_MOST_TOKENS = 64


def boolean_added(look: Look) -> str | None:
    """A mask of zeros and ones is added to scores."""
    for node in look.region.operations("after"):
        if nodes.schema_name(node) != "aten::add":
            continue
        flags = [a for a in node.args[:2] if isinstance(a, Node) and _is_boolean(a)]
        if len(flags) == 1 and any(_is_float(a) for a in node.args[:2] if isinstance(a, Node)):
            return f"looks like a boolean mask that is added: {look.label(flags[0])} adds 0 and 1 to the scores"
    truth, other = look.raw
    if truth.is_floating_point() and _only(other, (0.0, 1.0)) and _is_mask(look, truth):
        added = [u for u in look.region.claim.after.users if nodes.schema_name(u) == "aten::add"]
        said = f", and {look.label(added[0])} adds it" if added else ""
        return f"looks like a boolean mask where an additive one is meant: after's holds 0 and 1{said}"
    return None


def _is_boolean(node: Node) -> bool:
    value = nodes.tensor_val(node)
    return value is not None and value.dtype == torch.bool


def _is_float(node: Node) -> bool:
    value = nodes.tensor_val(node)
    return value is not None and value.dtype.is_floating_point


def _only(value: Tensor, allowed: tuple[float, ...]) -> bool:
    found = value.double()
    return all(bool((found == a).any()) for a in allowed) and bool(
        torch.stack([found == a for a in allowed]).any(0).all()
    )


def _is_mask(look: Look, value: Tensor) -> bool:
    hidden = _hidden(look, value)
    return bool(hidden.any()) and not bool(hidden.all())


def _hidden(look: Look, value: Tensor) -> Tensor:
    """Where a value is a mask's: False of a boolean, minus infinity or a huge negative number, NaN excluded."""
    if value.dtype == torch.bool:
        return ~value
    return value.double() <= -bound(look)


def values(look: Look) -> str | None:
    """Compare what both results hide, where they are scores, masks or shares."""
    truth, other = look.raw
    if truth.shape != other.shape or truth.dim() < 2:
        return None
    if all(_are_shares(x) for x in (truth, other)):
        mine, theirs = truth == 0, other == 0
    else:
        mine, theirs = _hidden(look, truth), _hidden(look, other)
    if not bool(mine.any()) or torch.equal(mine, theirs):
        return None
    if not bool(theirs.any()):
        fill = other[mine].double()
        if truth.dtype != torch.bool and fill.numel() > 1 and bool((fill == fill[0]).all()):
            return f"looks like a fill value that hides nothing: after fills {float(fill[0]):.3g} in where before masks"
        return f"looks like a missing mask: before hides {int(mine.sum())} of {mine.numel()} elements, after none"
    return _compared(mine, theirs)


def _are_shares(x: Tensor) -> bool:
    """Whether every row of a tensor is what a softmax makes."""
    if not x.is_floating_point() or bool((x < 0).any()):
        return False
    return bool(((x.double().sum(-1) - 1).abs() < 1e-6).all())


def reach(look: Look) -> str | None:
    """Compare which tokens see which, where attention is one operator."""
    region, result = look.region, look.raw[0]
    operations = [*region.operations("before"), *region.operations("after")]
    if result.dim() < 3 or not any("attention" in nodes.schema_name(n) for n in operations):
        return None
    best: tuple[int, Tensor, Tensor] | None = None
    for p, _ in region.frontier:
        value = look.replay.values.get(p)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 3:
            continue
        if not 1 < value.shape[-2] <= _MOST_TOKENS or result.shape[-2] < 2:
            continue
        mine, theirs = (_seen(look, side, p, value) for side in ("before", "after"))
        if mine is None or theirs is None:
            return None
        if not (bool(mine.any()) and bool(theirs.any())):  # one side does not read it at all: that is no mask's doing
            continue
        count = int(mine.sum() + theirs.sum())  # values show more than queries and keys do
        if not torch.equal(mine, theirs) and (best is None or count > best[0]):
            best = (count, ~mine, ~theirs)
    return _compared(best[1], best[2], "pairs of tokens") if best is not None else None


def _seen(look: Look, side: str, leaf: Node, value: Tensor) -> Tensor | None:
    """Return [tokens of the result, tokens of the leaf]: what moves when one token of the leaf is drawn anew."""
    try:
        plain = look.replay.exact(side, look.region)
        columns = []
        for token in range(value.shape[-2]):
            moved = value.double().clone()
            moved[..., token, :] = moved[..., token, :].flip(-1) + 0.5
            again = look.replay.exact(side, look.region, given={leaf: moved})
            changed = torch.nan_to_num(again - plain).abs().movedim(-2, 0).flatten(1).amax(1)
            columns.append(changed > 1e-12 * torch.nan_to_num(plain).abs().amax())
    except Exception:  # a leaf that is no tensor of tokens after all
        return None
    return torch.stack(columns, -1)


def _compared(mine: Tensor, theirs: Tensor, what: str = "elements") -> str:
    """Say how what after hides differs from what before hides."""
    opened, closed = int((mine & ~theirs).sum()), int((theirs & ~mine).sum())
    for shift in (1, -1):
        for dim in (-1, -2):
            if _shifted(mine, theirs, shift, dim):
                side = "more" if opened > closed else "less"
                return f"looks like a mask that is off by one: after sees one position {side} along dimension {dim}"
    if mine.shape[-1] == mine.shape[-2] and torch.equal(theirs, mine.transpose(-1, -2)):
        return "looks like a transposed mask: queries and keys are swapped in it"
    if torch.equal(theirs, ~mine):
        return "looks like an inverted mask: after hides what before shows"
    if opened and not closed:
        return f"looks like a missing or a wider mask: after sees {opened} {what} that before hides"
    if closed and not opened:
        return f"looks like a narrower mask: after hides {closed} {what} that before sees"
    return f"looks like another mask: after sees {opened} {what} that before hides, and hides {closed} that it sees"


def _shifted(mine: Tensor, theirs: Tensor, shift: int, dim: int) -> bool:
    """Whether one is the other moved by one along a dimension; the edge that moves in does not count."""
    size = mine.shape[dim]
    if size < 3:
        return False
    first, second = (0, 1) if shift > 0 else (1, 0)
    x, y = mine.narrow(dim, first, size - 1), theirs.narrow(dim, second, size - 1)
    return torch.equal(x, y) and bool(x.any()) and not bool(x.all())

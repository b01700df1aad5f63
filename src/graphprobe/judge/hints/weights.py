"""Hints about weights: zero, on the meta device, not tied, transposed, permuted, another layer's, merged otherwise.

A weight that is not what before has may be no mistake: another layout, a fold. So it is tried: what a hint says of it
stands only if the sides come nearer to each other with before's weight, or with two weights exchanged.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.judge.hints.look import EQUAL, Look, Tensor, close, dimension
from graphprobe.judge.hints.orders import permutation, words
from graphprobe.judge.hints.ratios import shown
from graphprobe.judge.same import rms
from graphprobe.provenance import weight_name as called

_LARGEST_RANK = 16
_MOST_PAIRS = 8  # each costs an evaluation of the region
_NEARER = 0.5  # of the difference: another mistake may stand in the same region
_MOST_NUMBERS = 1 << 22  # beyond that no singular values are asked for


def weight(look: Look) -> str | None:
    """Compare the weights of both pieces that stand in the same place and do not hold the same."""
    mine, theirs = look.weights("before"), look.weights("after")
    known = look.replay.plan.same_weight
    taken = {known[y] for y in theirs if known.get(y) in mine}
    left = [x for x in mine if x not in taken]
    open_ = {y: held for y, held in theirs.items() if known.get(y) not in mine and not _is_own(y, known.get(y))}
    for y, held in open_.items():
        if held.is_meta:
            return f"looks like a weight that was never loaded: {called(y)} is on the meta device"
        if held.numel() > 1 and not bool((held != 0).any()):
            return f"looks like a weight that was never loaded: {called(y)} is zero everywhere"
        wrong = int((~torch.isfinite(held)).sum())
        if wrong and held.dim() > 1 and (wrong < held.numel() / 4 or bool(held.isnan().any())):  # no mask
            return f"looks like a damaged weight: {wrong} of {held.numel()} numbers of {called(y)} are NaN or infinite"
    swapped = _exchanged(look, open_)
    if swapped:
        return swapped
    plain = look.distance(look.raw[1])
    for y, held in open_.items():
        alike = [x for x in left if mine[x].shape == held.shape]
        for x in sorted(alike, key=lambda x: str(x.target) != str(y.target))[:_MOST_PAIRS]:
            if _comes_nearer(look, {y: mine[x]}, plain):
                _read(look, y)
                return _compared(look, x, mine[x], y, held)
    return _adapted(left, mine, open_)


def _adapted(left: list[Node], mine: dict[Node, Tensor], theirs: dict[Node, Tensor]) -> str | None:
    """A weight differs by a matrix of low rank: an adapter is merged into it, though not as before adds it."""
    for y, held in theirs.items():
        x = next((x for x in left if mine[x].shape == held.shape), None)
        rank = _low_rank(held.double() - mine[x].double()) if x is not None else 0
        if rank:
            return _merged(y, rank)
    return None


def _is_own(y: Node, x: Node | None) -> bool:
    """Whether a weight holds what before has under its name: it is in its place, whoever else reads it."""
    return x is not None and str(x.target) == str(y.target)


def _read(look: Look, weight: Node) -> None:
    """Note which operation reads a weight that a trial has shown to be wrong, views of the weight aside."""
    level = [weight]
    while level:
        users = [u for n in level for u in n.users if u in look.region.after]
        look.proved.extend([u for u in users if not nodes.is_view(u)][:1])
        level = users if not look.proved else []


def _exchanged(look: Look, theirs: dict[Node, Tensor]) -> str | None:
    """Two weights of after's piece have changed places."""
    pairs = [(p, q) for p, q in itertools.combinations(theirs, 2) if theirs[p].shape == theirs[q].shape]
    for p, q in pairs[:_MOST_PAIRS]:
        if look.agrees(look.again({p: theirs[q], q: theirs[p]})):
            _read(look, p)
            both = f"{called(p)} and {called(q)}"
            return f"looks like two weights in each other's places: with {both} exchanged the sides agree"
    return None


def _comes_nearer(look: Look, override: dict[Node, Tensor], plain: float) -> bool:
    """Whether a trial leaves at most half of the difference; without a measure of it, whether the sides agree."""
    tried = look.again(override)
    if tried is None:
        return False
    left = look.distance(tried)
    return left < EQUAL or (math.isfinite(plain) and left <= _NEARER * plain)


def _compared(look: Look, x: Node, wanted: Tensor, y: Node, held: Tensor) -> str | None:
    tied = _tied_to(look, x, wanted)
    if tied:
        return f"looks like a weight that is not tied: in before {called(x)} is {tied}, in after it holds other numbers"
    double, other = wanted.double(), held.double()
    if double.dim() == 2 and double.shape[0] == double.shape[1] and close(other, double.t()):
        return f"looks like a transposed weight: {called(y)} holds before's with rows and columns swapped"
    for dim in range(double.dim()):
        order = (
            permutation(double.movedim(dim, 0).flatten(1), other.movedim(dim, 0).flatten(1))
            if double.dim() > 1
            else None
        )
        if order is not None:
            return f"looks like {words(order)} along {dimension(double, dim)} of the weight {called(y)}"
    owner = _owner(look, held, x)
    if owner:
        mine, theirs = (provenance.repeated(name.partition(",")[0])[1] for name in (owner, called(x)))
        which = "another weight of the layer" if mine == theirs != () else "another layer's weight"
        return f"looks like {which}: {called(y)} holds what before has as {owner}"
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
            return called(node)
    aliases = [str(n.target) for n in before.live if n.op == "get_attr" and str(n.target) == str(x.target)]
    uses = [u for n in before.live if n.op == "get_attr" and str(n.target) == str(x.target) for u in n.users]
    uses = [u for u in uses if not nodes.returns_nothing(u)]  # an assertion reads nothing
    return f"the weight of {look.label(uses[0])}" if len(aliases) > 0 and len(uses) > 1 else ""


def _owner(look: Look, held: Tensor, x: Node) -> str:
    before, ordered = look.replay.plan.before, ""
    for node in before.live:
        if node.op != "get_attr" or str(node.target) == str(x.target):
            continue
        value = before.attribute(node)
        if not isinstance(value, Tensor) or value.shape != held.shape or value.dtype != held.dtype:
            continue
        if torch.equal(value.detach(), held):
            return called(node)
        if not ordered and held.dim() > 1 and permutation(_rows(value.detach()), _rows(held)) is not None:
            ordered = f"{called(node)}, its rows in another order"
    return ordered


def _rows(weight: Tensor) -> Tensor:
    return weight.double().flatten(1)


def _numbers(y: Node, wanted: Tensor, held: Tensor) -> str | None:
    """Say in what two weights differ: a factor, a few rows, a matrix of low rank, everything."""
    change = held - wanted
    c = float((held * wanted).sum() / wanted.square().sum().clamp(min=1e-300))
    if rms(held - c * wanted) < 1e-6 * rms(held):
        return f"looks like another scale of a weight: {called(y)} is {shown(c)} times before's"
    if wanted.dim() > 1:
        for dim in (0, 1):
            rows = change.movedim(dim, 0).flatten(1).abs().amax(1) > 0
            count = int(rows.sum())
            if 0 < count <= max(1, rows.numel() // 4):
                first = int(rows.nonzero()[0])
                place = f"{dimension(wanted, dim)} of {called(y)}"
                return f"looks like wrong rows of a weight: {count} along {place}, first {first}"
    rank = _low_rank(change)
    if rank:
        return _merged(y, rank)
    cosine = float((held * wanted).sum() / (rms(held) * rms(wanted) * wanted.numel() or 1.0))
    if abs(cosine) < 0.5 and wanted.numel() >= 16:
        shares = f"{called(y)} has nothing in common with before's (cosine {cosine:.2f})"
        return f"looks like a weight that was never loaded: {shares}"
    return None


def _low_rank(change: Tensor) -> int:
    """Return the rank of a matrix if it is far below the largest that its shape allows, else 0."""
    if change.dim() != 2 or change.numel() > _MOST_NUMBERS or not bool(torch.isfinite(change).all()):
        return 0
    values = torch.linalg.svdvals(change)
    rank = int((values > 0.02 * values[0]).sum())
    return rank if rank <= min(_LARGEST_RANK, min(change.shape) // 4) else 0


def _merged(y: Node, rank: int) -> str:
    return f"looks like an adapter merged otherwise: {called(y)} differs from before's by a matrix of rank {rank}"

"""Signatures of order: the same values in another place. Channels, heads, blocks, views, transposes, slices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from graphprobe.judge.hints.look import EQUAL, Look, Tensor, as_float, close, dimension
from graphprobe.judge.same import rms

_MOST = 4096  # slices along one dimension that are matched with each other


def transposed(look: Look) -> str | None:
    """After is before with two equal dimensions swapped."""
    truth, other = look.truth, look.other
    for i in range(truth.dim()):
        for j in range(i + 1, truth.dim()):
            if truth.shape[i] == truth.shape[j] > 1 and close(other, truth.transpose(i, j)):
                return f"looks like a transpose: {dimension(truth, i)} and {dimension(truth, j)} are swapped"
    return None


def permuted(look: Look) -> str | None:
    """Along one dimension after holds before's slices in another order."""
    truth, other = look.truth, look.other
    for dim in range(truth.dim() - 1, -1, -1):
        size = truth.shape[dim]
        if 1 < size <= _MOST and truth.numel() > size:
            order = permutation(truth.movedim(dim, 0).flatten(1), other.movedim(dim, 0).flatten(1))
            if order is not None:
                return f"looks like {words(order)} along {dimension(truth, dim)}: the values are equal as a set"
    return None


def permutation(truth: Tensor, other: Tensor) -> Tensor | None:
    """Return `order` with other[i] = truth[order[i]], a permutation that is not the identity; else None."""
    # equal slices have equal projections; equal projections of a random direction mean equal slices almost surely
    generator = torch.Generator().manual_seed(0)
    ray = torch.randn(truth.shape[1], generator=generator, dtype=torch.float64).to(truth.device)
    mine, theirs = truth @ ray, other @ ray
    scale = float(mine.abs().amax())
    if scale == 0:
        return None
    rank_mine, rank_theirs = mine.argsort(stable=True), theirs.argsort(stable=True)
    if bool(((mine[rank_mine] - theirs[rank_theirs]).abs() > 1e-7 * scale).any()):
        return None
    order = torch.empty_like(rank_mine)
    order[rank_theirs] = rank_mine
    if not close(other, truth[order]) or close(other, truth):
        return None
    return order


def words(order: Tensor) -> str:
    """Name a permutation: a shift, blocks in another order, an interleaving, a reversal."""
    n = order.numel()
    places = torch.arange(n, device=order.device)
    shift = int(order[0])
    if torch.equal(order, (places + shift) % n):
        if shift == n // 2 and n % 2 == 0:
            return "two halves that are swapped"
        by = shift if shift <= n // 2 else shift - n
        return f"an order shifted by {by}" + (" (off by one)" if abs(by) == 1 else "")
    if torch.equal(order, places.flip(0)):
        return "a reversed order"
    for block in _divisors(n):
        grid = order.view(-1, block)
        whole = (grid - grid[:, :1] == torch.arange(block, device=order.device)).all() and (
            grid[:, 0] % block == 0
        ).all()
        if block > 1 and bool(whole):
            return f"blocks of {block} in the wrong order (split, joined or taken in another order)"
    for rows in _divisors(n):
        if 1 < rows < n and torch.equal(order, places.view(rows, -1).t().flatten()):
            return f"an interleaved order ({rows} by {n // rows}: neighbours for blocks, repeat for interleave)"
    return "permuted channels, heads or tokens"


def _divisors(n: int) -> list[int]:
    return [d for d in range(n - 1, 0, -1) if n % d == 0]


def rearranged(look: Look) -> str | None:
    """The same values altogether, in an order that is no permutation of slices."""
    truth, other = look.truth.flatten(), look.other.flatten()
    if truth.numel() < 4 or close(other, truth):
        return None
    if not close(other.sort().values, truth.sort().values) or float(truth.std()) == 0:
        return None
    return "looks like a view, reshape or transpose of the wrong dimensions: all values are there, in another order"


def halves(look: Look) -> str | None:
    """Both results are slices of one value, taken at different places."""
    found = elsewhere(look)
    if found is None:
        return None
    size = look.raw[0].shape[found.dim]
    what = "an off-by-one slice" if abs(found.mine - found.theirs) == 1 else "a wrong split order"
    return (
        f"looks like {what}: of {look.label(found.node)}, {dimension(found.whole, found.dim)}, after takes "
        f"{found.theirs}:{found.theirs + size} where before takes {found.mine}:{found.mine + size}"
    )


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """A value of which before takes the slice that begins at `mine`, and after the one that begins at `theirs`."""

    node: Node
    whole: Tensor
    dim: int
    mine: int
    theirs: int

    @property
    def places(self) -> tuple[float, float]:
        """Where the two slices begin, 0..1: what shards have in common, whatever they are a part of."""
        size = self.whole.shape[self.dim]
        return self.mine / size, self.theirs / size


def elsewhere(look: Look) -> Elsewhere | None:
    """Find the value that both results are slices of, at different places."""
    truth, other = look.raw
    if not truth.is_floating_point() or truth.shape != other.shape or truth.dim() == 0:
        return None
    for values in look.inside:
        for node, value in values.items():
            whole = as_float(value)
            if whole is None or whole.dim() != truth.dim() or whole.numel() <= truth.numel():
                continue
            dims = [d for d in range(whole.dim()) if whole.shape[d] != truth.shape[d]]
            if len(dims) != 1:
                continue
            mine, theirs = _start(whole, truth, dims[0]), _start(whole, other, dims[0])
            if mine is not None and theirs is not None and mine != theirs:
                return Elsewhere(node, whole, dims[0], mine, theirs)
    return None


def _start(whole: Tensor, part: Tensor, dim: int) -> int | None:
    """Return where a part lies in a whole along one dimension."""
    size = part.shape[dim]
    first = part.double().narrow(dim, 0, 1)
    scale = rms(part.double()) or 1.0
    near = ((whole - first).abs() <= EQUAL * scale).movedim(dim, 0).flatten(1).all(1).nonzero().flatten().tolist()
    for start in near:
        if start + size <= whole.shape[dim] and close(whole.narrow(dim, start, size), part.double()):
            return int(start)
    return None

"""Rule 4, gains: what a floating weight is multiplied with on its way through a region, and codes may be made of.

Before a convolution is quantised, the batch norm behind it is folded into it; before a linear layer is, the gain of the
norm in front of it (all of it, or the share that makes its columns equally large). The codes then stand for
``W' = rows W columns``. The factors are measured in exact arithmetic: what is affine behind the product is evaluated
where that is 0, 1 and 2. They are a guess, and need be no more: with the codes' value divided by them in the place of
``W``, rule 1 is asked again, and holds only where the floating side really multiplies by them.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.chains import CASTS
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

Tensor = torch.Tensor
_AFFINE = 1e-10  # relative: float64 rounding of a norm written out
_LONGEST = 12  # operations of a batch norm written out, and casts around it


@dataclass(frozen=True, eq=False)
class Gains:
    """Factors of the product that one weight is part of: [rows] behind it, [columns] in front of it, float64."""

    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass
class Passage:
    """Follows one weight of one side of a region into its product."""

    replay: Replay
    region: Region
    side: str
    constant: set[Node] = field(init=False)
    piece: set[Node] = field(init=False)

    def __post_init__(self) -> None:
        self.piece, self.constant = set(getattr(self.region, self.side)), self.region.constant(self.side)

    def product(self, weight: Node) -> Node | None:
        """Return the operation in which a weight meets what is not constant; None where there are several."""
        found: set[Node] = set()
        stack, seen = [weight], {weight}
        while stack:
            for user in stack.pop().users:
                if user in self.constant and user not in seen:
                    seen.add(user)
                    stack.append(user)
                elif user in self.piece and user not in self.constant:
                    found.add(user)
        return found.pop() if len(found) == 1 else None

    def gains(self, weight: Node) -> Gains:
        """Return the factors in front of and behind the product of a weight."""
        product = self.product(weight)
        if product is None or nodes.tensor_val(product) is None:
            return Gains()
        return Gains(self._behind(product), self._in_front(product))

    def _behind(self, product: Node) -> Tensor | None:
        chain = list(self._single_users(product))
        known = nodes.tensor_val(product)
        if not chain or known is None or not known.is_floating_point():
            return None
        at = [self._evaluated(product, chain, float(value)) for value in (0, 1, 2)]
        found: Tensor | None = None
        for node in chain:
            zero, one, two = (values.get(node) for values in at)
            if not (isinstance(zero, Tensor) and isinstance(one, Tensor) and isinstance(two, Tensor)):
                continue  # an operator with several results: the one that is read decides
            if zero.shape != known.shape or not torch.allclose(two - one, one - zero, rtol=_AFFINE, atol=1e-300):
                break
            vector = _along_one_dim(one - zero)
            if vector is None:
                break
            found = vector
        return found

    def _single_users(self, node: Node) -> Iterator[Node]:
        """Yield what follows a node, while nothing but constants joins in."""
        for _ in range(_LONGEST):
            users = [user for user in node.users if user in self.piece]
            if len(users) != 1 or not all(n is node or n in self.constant for n in users[0].all_input_nodes):
                return
            node = users[0]
            yield node

    def _evaluated(self, product: Node, chain: list[Node], value: float) -> dict[Node, object]:
        full = self._like(product, value)
        wanted = {product, *chain} | self.constant
        return self.replay.exact_values(self.side, self.region, override={product: full}, only=wanted)

    def _like(self, node: Node, value: float) -> Tensor:
        leaf = next(v for v in self.replay.values.values() if isinstance(v, Tensor))
        shape = self.replay.exact_values(self.side, self.region)[node].shape
        return torch.full(shape, value, dtype=torch.float64, device=leaf.device)

    def _in_front(self, product: Node) -> Tensor | None:
        """Return the factors of what meets the weight: those of a norm, and of multiplications behind that."""
        found: Tensor | None = None
        operands = [n for n in product.all_input_nodes if n not in self.constant]
        for _ in range(_LONGEST):
            if len(operands) != 1 or operands[0] not in self.piece:
                return found
            node = operands[0]
            operands = [n for n in node.all_input_nodes if n not in self.constant]
            factor = self._factor(node)
            if factor is not None:
                found = factor if found is None else found * factor
            elif not _hands_on(node):
                return found
        return found

    def _factor(self, node: Node) -> Tensor | None:
        """Return what a node multiplies its operand with along the last dimension: a gain, or a reciprocal divisor."""
        name = nodes.schema_name(node)
        if name in ("aten::mul", "aten::div"):
            operand = next((a for a in node.args if isinstance(a, Node) and a in self.constant), None)
            if operand is None or (name == "aten::div" and operand is not node.args[1]):
                return None
            value = self._constant_value(operand)
            return None if value is None else value.reciprocal() if name == "aten::div" else value
        gain = nodes.argument(node, "weight") if "norm" in name else None
        return self._constant_value(gain) if isinstance(gain, Node) and gain in self.constant else None

    def _constant_value(self, node: Node) -> Tensor | None:
        program = self.replay.plan.before if self.side == "before" else self.replay.plan.after
        if node.op == "get_attr":
            value: object = program.attribute(node).detach()
        else:
            value = self.replay.exact_values(self.side, self.region, only=self.constant)[node]
        if not isinstance(value, Tensor) or value.numel() != value.shape[-1:].numel():
            return None
        return value.double().reshape(-1)


def factors(value: Tensor, floating: Gains, codes: Gains) -> Iterator[Tensor]:
    """Yield factors in the shape of a weight with which its codes may be made: what the sides multiply it with
    differently, along each of its dimensions that is as long."""
    rows = _share(floating.rows, codes.rows)
    columns = _share(floating.columns, codes.columns)
    for vectors in ((rows,), (columns,), (rows, columns)):
        if any(v is None for v in vectors):
            continue
        known = [v for v in vectors if v is not None]
        for dims in itertools.permutations(range(value.dim()), len(known)):
            if all(v.numel() in (1, value.shape[d]) for v, d in zip(known, dims, strict=True)):
                factor = torch.ones_like(value, dtype=torch.float64)
                for v, d in zip(known, dims, strict=True):
                    factor = factor * v.reshape([-1 if i == d else 1 for i in range(value.dim())])
                yield factor


def _share(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    """Return mine / theirs; None where that is one, or no number."""
    if mine is None and theirs is None:
        return None
    one = torch.ones((), dtype=torch.float64)
    top, bottom = one if mine is None else mine, one if theirs is None else theirs
    if top.numel() != bottom.numel() and 1 not in (top.numel(), bottom.numel()):
        return None
    share = (top.to(bottom) if mine is None else top) / (bottom.to(top) if theirs is None else bottom)
    usable = bool((torch.isfinite(share) & (share != 0)).all()) and bool((share != 1).any())
    return share.reshape(-1) if usable else None


def _along_one_dim(gain: Tensor) -> Tensor | None:
    """Return a tensor that varies along one dimension at most as a vector; None where it varies along more."""
    if gain.numel() == 0:
        return None
    for dim in range(gain.dim()):
        rows = gain.movedim(dim, 0).flatten(1)
        if torch.allclose(rows, rows[:, :1], rtol=_AFFINE, atol=1e-300):
            vector = rows[:, 0]
            return vector[:1] if torch.allclose(vector, vector[:1], rtol=_AFFINE, atol=1e-300) else vector
    return None


def _hands_on(node: Node) -> bool:
    """Whether a node leaves the columns of its operand where they are: a cast, or one result of several."""
    return nodes.schema_name(node) in CASTS or node.target is operator.getitem

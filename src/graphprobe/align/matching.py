"""What all kinds of evidence share: the two programs, what is claimed so far, and what every node computes."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.claims import Claim
from graphprobe.align.moved import Moved, moved
from graphprobe.align.numbering import Numbering
from graphprobe.align.sketches import Observe, observed, sketches
from graphprobe.align.terms import Terms
from graphprobe.program import Program

if TYPE_CHECKING:
    from graphprobe.align.siblings import Siblings
    from graphprobe.align.views import View

CODES = {torch.int8, torch.uint8, torch.int16, torch.quint8, torch.qint8}
GUESSED = ("module", "sibling", "weight", "operand", "occurrence", "slot")  # a likely partner, seen in no value
PLACES = ("module", "operand", "occurrence", "slot")  # evidence that looks at where a value stands, not at what it is


@dataclass(frozen=True)
class Sliced:
    """Which slices of a value are claimed, and the node that it was put together in again."""

    cuts: tuple[Any, ...]  # of align.forms.Slice
    made: tuple[Node, ...]  # a node for each of them
    whole: Node


@dataclass(eq=False)
class Matching(Numbering):
    """The state of an alignment that is being made."""

    sliced: dict[Node, Sliced] = field(default_factory=dict)  # values of which slices are claimed
    reshaped: list[tuple[Node, Node]] = field(default_factory=list)  # equal in flat order, in no shape in common
    views: dict[Node, View] = field(default_factory=dict)  # what was inserted to be claimed -> how it shows a value

    def __post_init__(self) -> None:
        super().__post_init__()
        self._makers: dict[str, list[Node]] = {}
        self._shapes: dict[str, list[tuple[int | str, ...] | None]] = {}
        self._coarse: bool | None = None
        self._sketches: dict[str, dict[Node, torch.Tensor]] = {}
        self._moved: Moved | None = None
        self._forced: Mapping[Node, torch.Tensor] = {}
        self.asked: set[Node] = set()  # sums whose addends were looked at
        self.siblings: Siblings | None = None  # what repeated modules say, once it was asked

    def add(self, x: Node, y: Node, evidence: str, certain: bool = False) -> None:
        """Claim one pair, unless it is guessed from its place and could never be equal."""
        if evidence in PLACES and (x in self.counted or y in self.counted):
            return  # of other tokens: another number by right
        if evidence in GUESSED and self.apart(x, y):
            return
        if evidence not in PLACES or (_could_be_equal(x, y) and not self._siblings_against(x, y)):
            self.alignment.add(Claim(x, y, evidence, certain))

    def _siblings_against(self, x: Node, y: Node) -> bool:
        return self.siblings is not None and self.siblings.against(x, y)

    def forget(self, known: int) -> None:
        """Take back all claims but the first `known`, and what was concluded from them."""
        self.alignment.forget(known)
        self.reshaped.clear()
        self._after = None

    def unclaimed(self, side: str) -> list[Node]:
        """Return the value-making nodes of one side that nothing claims."""
        claimed = self.alignment.of(side)
        return [n for n in self.makers(side) if not claimed.get(n)]

    def unclaimed_before(self) -> list[Node]:
        """Return the value-making nodes of before that nothing claims."""
        return self.unclaimed("before")

    def unclaimed_after(self) -> list[Node]:
        """Return the value-making nodes of after that nothing claims."""
        return self.unclaimed("after")

    def makers(self, side: str) -> list[Node]:
        """Return the value-making nodes of one side, in graph order."""
        if side not in self._makers:
            self._makers[side] = [n for n in getattr(self, side).live if nodes.makes_values(n)]
        return self._makers[side]

    def shapes(self, side: str) -> list[tuple[int | str, ...] | None]:
        """Return the shapes of `makers`."""
        if side not in self._shapes:
            self._shapes[side] = [nodes.shape(n) for n in self.makers(side)]
        return self._shapes[side]

    def sketches(self, side: str) -> dict[Node, torch.Tensor]:
        """Run one side once and return the sketches of all that was unclaimed when first asked.

        A part of a fused value (a slice of q, k and v) may be what stands as a value of its own on the other side.
        """
        if side not in self._sketches:
            program: Program = getattr(self, side)
            claimed = self.alignment.of(side)
            wanted = [n for n in program.live if not claimed.get(n) and (nodes.makes_values(n) or is_part(n))]
            given = self._forced if side == "after" else None
            run = self.bound is not None and bool(wanted)
            self._sketches[side] = sketches(program, self.bound or {}, wanted, given) if run else {}
        return self._sketches[side]

    def observed(self, side: str, wanted: list[Node], observe: Observe) -> dict[Node, torch.Tensor]:
        """Run one side once and return what `observe` makes of the wanted values."""
        given = self._forced if side == "after" else None
        return {} if not wanted else observed(getattr(self, side), self.bound or {}, wanted, observe, given)

    def force(self, given: Mapping[Node, torch.Tensor]) -> None:
        """From now on let `after` go on with these values wherever it is run."""
        self._forced = given
        self._sketches.pop("after", None)

    def may_be_cut(self, side: str, node: Node) -> bool:
        """Whether slices of a value may be claimed: nothing claims all of it, but what is put together in the end."""
        claims = self.alignment.of(side).get(node, ())
        ends = [nodes.shown(c.after if side == "before" else c.before) for c in claims]
        return node in self.sliced or all(nodes.schema_name(end) == "aten::cat" for end in ends)

    def is_open(self, node: Node, cut: Any) -> bool:
        """Whether a slice of a value may be claimed beside those of it that are."""
        known = self.sliced.get(node)
        return known is None or not any(cut.meets(other) for other in known.cuts)

    def apart(self, x: Node, y: Node) -> bool:
        """Whether either node lies in a repeated module that the other side has not in this place."""
        return self.moved().apart(provenance.module_path(x), provenance.module_path(y))

    def moved(self) -> Moved:
        """Return which repeated modules of after stand under other numbers than in before."""
        if self._moved is None:
            self._moved = moved(self.leaves("before"), self.leaves("after"))
        return self._moved

    def is_coarse(self) -> bool:
        """Whether either side computes anything in 16 bits or less: equal values then differ by some percent."""
        if self._coarse is None:
            values = [nodes.tensor_val(n) for side in ("before", "after") for n in self.makers(side)]
            dtypes = {v.dtype for v in values if v is not None}
            self._coarse = any(d.is_floating_point and d.itemsize <= 2 for d in dtypes) or bool(dtypes & CODES)
        return self._coarse

    def changed(self) -> None:
        """Forget what was read of the graphs: nodes were inserted."""
        super().changed()
        self._makers.clear()
        self._shapes.clear()


def _could_be_equal(x: Node, y: Node) -> bool:
    """Whether two values are of one sort: a mask that is added (0, -inf) is not the boolean mask in its place."""
    mine, theirs = nodes.tensor_val(x), nodes.tensor_val(y)
    if mine is None or theirs is None:
        return True
    return mine.is_complex() == theirs.is_complex() and (mine.dtype == torch.bool) == (theirs.dtype == torch.bool)


def is_part(node: Node) -> bool:
    """Whether the node cuts a part out of another value: a slice, or one output of a split."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and nodes.is_view(node.args[0])
    return nodes.schema_name(node) in ("aten::slice", "aten::select", "aten::narrow")


def shown_as(node: Node, shape: tuple[int | str, ...] | None, terms: Terms) -> Node | None:
    """Return the node, or a view of it in flat order, that has the wanted shape."""
    if nodes.shape(node) == shape:
        return node
    stack, seen = list(node.users), set()
    while stack:
        user = stack.pop()
        term = terms.of.get(user)
        if user in seen or term is None or term.step != ():
            continue
        seen.add(user)
        if nodes.shape(user) == shape:
            return user
        stack.extend(user.users)
    return None

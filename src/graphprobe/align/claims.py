"""Claims: the statement that a node of `after` must equal a node of `before`, and the evidence for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from torch.fx import Node

#: Evidence, strongest first, and how far it is to be trusted when nothing else speaks.
CONFIDENCE = {
    "event": 1.0,
    "id": 1.0,
    "output": 1.0,
    "structure": 0.98,
    "value": 0.97,
    "layout": 0.97,
    "slice": 0.97,
    "cast": 0.97,
    "codes": 0.9,
    "module": 0.95,
    "sibling": 0.9,
    "weight": 0.9,
    "operand": 0.85,
    "occurrence": 0.8,
    "slot": 0.6,
}


@dataclass(frozen=True, eq=False)
class Claim:
    """Node `after` must equal node `before`. A claim that is not certain may be withdrawn when it fails."""

    before: Node
    after: Node
    evidence: str
    certain: bool = True
    output: str = ""  # the path of the graph output this pair is, if it is one
    cut: bool = True  # whether both graphs may be cut open here: False for views
    view: str = ""  # how the one is shown as the other, where they differ in layout: "permute [0, 2, 1, 3]"

    @property
    def confidence(self) -> float:
        """How far this kind of evidence is to be trusted, 0..1."""
        return CONFIDENCE.get(self.evidence, 0.5)


@dataclass(eq=False)
class Alignment:
    """All claims between two programs, in after's order, and quick ways to ask for a node's partners."""

    claims: list[Claim] = field(default_factory=list)
    of_before: dict[Node, list[Claim]] = field(default_factory=lambda: defaultdict(list))
    of_after: dict[Node, list[Claim]] = field(default_factory=lambda: defaultdict(list))

    def add(self, claim: Claim) -> None:
        """Add one claim; a pair that is already claimed keeps its first evidence."""
        if any(c.before is claim.before for c in self.of_after.get(claim.after, ())):
            return
        self.claims.append(claim)
        self.of_before[claim.before].append(claim)
        self.of_after[claim.after].append(claim)

    def of(self, side: str) -> dict[Node, list[Claim]]:
        """Return what is claimed of the nodes of one side, "before" or "after"."""
        return self.of_before if side == "before" else self.of_after

    def forget(self, known: int) -> None:
        """Take back all claims but the first `known`."""
        for claim in self.claims[known:]:
            self.of_before[claim.before].remove(claim)
            self.of_after[claim.after].remove(claim)
        del self.claims[known:]

    def move(self, claim: Claim, before: Node, after: Node) -> None:
        """Let a claim have other ends, in its place."""
        other = replace(claim, before=before, after=after)
        self.claims[self.claims.index(claim)] = other
        for mine, old, new in ((self.of_before, claim.before, other.before), (self.of_after, claim.after, other.after)):
            mine[old].remove(claim)
            mine[new].append(other)

    def without(self, withdrawn: set[Claim]) -> Alignment:
        """Return the alignment that is left when some claims are withdrawn."""
        left = [claim for claim in self.claims if claim not in withdrawn]
        return Alignment(left, remaining(self.of_before, withdrawn), remaining(self.of_after, withdrawn))

    def sort(self, order: dict[Node, int]) -> None:
        """Sort the claims by the position of their `after` node."""
        self.claims.sort(key=lambda c: order.get(c.after, -1))


def remaining(claims: dict[Node, list[Claim]], withdrawn: Collection[Claim]) -> dict[Node, list[Claim]]:
    """Return a copy of what is claimed of each node, without some claims; asked often, so only theirs is looked at."""
    left = claims.copy()
    for node in {node for claim in withdrawn for node in (claim.before, claim.after)}:
        if node in left:
            left[node] = [claim for claim in left[node] if claim not in withdrawn]
            if not left[node]:
                del left[node]
    return left

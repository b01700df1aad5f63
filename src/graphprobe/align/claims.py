"""Claims: the statement that a node of `after` must equal a node of `before`, and the evidence for it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch.fx import Node


@dataclass(frozen=True, eq=False)
class Claim:
    """Node `after` must equal node `before`. A claim that is not certain may be withdrawn when it fails."""

    before: Node
    after: Node
    evidence: str
    certain: bool = True
    output: str = ""  # the path of the graph output this pair is, if it is one
    cut: bool = True  # whether both graphs may be cut open here: False for views


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

    def without(self, withdrawn: set[Claim]) -> Alignment:
        """Return the alignment that is left when some claims are withdrawn."""
        left = Alignment()
        for claim in self.claims:
            if claim not in withdrawn:
                left.add(claim)
        return left

    def sort(self, order: dict[Node, int]) -> None:
        """Sort the claims by the position of their `after` node."""
        self.claims.sort(key=lambda c: order.get(c.after, -1))

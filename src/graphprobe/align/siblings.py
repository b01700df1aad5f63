"""Evidence 3, repeated modules: what a node claims in the other layers tells what it should claim in this one.

A model repeats a layer, and a defect mostly lies in one of them. Where the layers without it are claimed, they say
which operation of `before` became which of `after`, also where the two are written so differently that nothing but
their values shows it; and they speak against a guess that pairs what they pair otherwise.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.matching import Matching
from graphprobe.program import Program

Role = tuple[Any, ...]  # what a node is in its module: path with open indices, operator, shape, how many, which of them
Index = tuple[str, ...]  # which of the repeated modules: the numbers in its path


@dataclass(frozen=True)
class Siblings:
    """The repeated nodes of both sides, and which roles were claimed with which."""

    roles: Mapping[Node, tuple[Role, Index]]  # of both sides
    nodes_after: Mapping[tuple[Role, Index], Node]
    after_of: Mapping[Role, set[Role]] = field(default_factory=dict)
    before_of: Mapping[Role, set[Role]] = field(default_factory=dict)

    def partner(self, x: Node) -> Node | None:
        """Return the node of after that stands where all claimed siblings of a node of before have their partners."""
        role, index = self.roles.get(x, ((), ()))
        known = self.after_of.get(role, set())
        if len(known) != 1:
            return None
        (other,) = known
        return self.nodes_after.get((other, index)) if self.before_of[other] == {role} else None

    def against(self, x: Node, y: Node) -> bool:
        """Whether siblings of either node are claimed, and none of them with a sibling of the other."""
        mine, theirs = self.roles.get(x), self.roles.get(y)
        if mine is None or theirs is None:
            return False
        found = self.after_of.get(mine[0], set()), self.before_of.get(theirs[0], set())
        return bool(found[0] or found[1]) and theirs[0] not in found[0]


def claim(matching: Matching) -> None:
    """Claim what stands where the siblings of a node have their partners."""
    siblings = of(matching)
    for x in matching.unclaimed_before() if siblings.after_of else ():
        y = siblings.partner(x)
        if y is not None and not matching.alignment.of_after.get(y) and nodes.shape(x) == nodes.shape(y):
            matching.add(x, y, "sibling")


def of(matching: Matching) -> Siblings:
    """Return what the claims say that stood when this was first asked: before anything was guessed."""
    if matching.siblings is None:
        matching.siblings = _read(matching)
    return matching.siblings


def _read(matching: Matching) -> Siblings:
    before, after = _roles(matching.before), _roles(matching.after)
    after_of: dict[Role, set[Role]] = defaultdict(set)
    before_of: dict[Role, set[Role]] = defaultdict(set)
    for claim in matching.alignment.claims:
        x, y = before.get(claim.before), after.get(claim.after)
        if x is not None and y is not None and x[1] == y[1]:
            after_of[x[0]].add(y[0])
            before_of[y[0]].add(x[0])
    return Siblings(before | after, {place: node for node, place in after.items()}, dict(after_of), dict(before_of))


def _roles(program: Program) -> dict[Node, tuple[Role, Index]]:
    """Tell of each node in a repeated module what it is there, and which of the modules it is in."""
    groups: dict[tuple[str, str, Any], list[Node]] = defaultdict(list)
    for node in program.live:
        path = provenance.module_path(node)
        if node.op == "call_function" and provenance.repeated(path)[1]:
            groups[path, provenance.target_name(node), nodes.shape(node)].append(node)
    found: dict[Node, tuple[Role, Index]] = {}
    for (path, target, shape), group in groups.items():
        pattern, index = provenance.repeated(path)
        for place, node in enumerate(group):
            found[node] = (pattern, target, shape, len(group), place), index
    several = Counter(role for role, _ in found.values())
    return {node: place for node, place in found.items() if several[place[0]] > 1}

"""Evidence 3, repeated modules: what a node claims in the other layers tells what it should claim in this one.

A model repeats a layer, and a defect mostly lies in one of them. Where the layers without it are claimed, they say
which operation of `before` became which of `after`, also where the two are written so differently that nothing but
their values shows it; and they speak against a guess that pairs what they pair otherwise. Where module paths do not
tell the layers of both sides, they are read off what repeats in the graphs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align import layouts
from graphprobe.align.matching import Matching
from graphprobe.align.moved import Moved
from graphprobe.align.periods import repeats, same_row
from graphprobe.align.views import View
from graphprobe.program import Program

Role = tuple[Any, ...]  # what a node is in its module: path with open indices, operator, shape, how many, which of them
Index = tuple[str, ...]  # which of the repeated modules: the numbers in its path
Places = dict[Node, tuple[Role, Index]]


@dataclass(frozen=True)
class Siblings:
    """The repeated nodes of both sides, and which roles were claimed with which."""

    roles: Mapping[Node, tuple[Role, Index]]  # of both sides
    nodes_after: Mapping[tuple[Role, Index], Node]
    after_of: Mapping[Role, set[Role]] = field(default_factory=dict)
    before_of: Mapping[Role, set[Role]] = field(default_factory=dict)
    shown: Mapping[tuple[Role, Role], set[View | None]] = field(default_factory=dict)  # how, in another layout

    def partner(self, x: Node) -> tuple[Node, View | None] | None:
        """Return the node of after that stands where all claimed siblings of a node of before have their partners.

        With it comes the view in which they are claimed, if they are.
        """
        role, index = self.roles.get(x, ((), ()))
        known = self.after_of.get(role, set())
        if len(known) != 1:
            return None
        (other,) = known
        y, how = self.nodes_after.get((other, index)), self.shown[role, other]
        if y is None or self.before_of[other] != {role} or len(how) != 1:
            return None
        (view,) = how
        return y, view

    def against(self, x: Node, y: Node) -> bool:
        """Whether siblings of either node are claimed, and none of them with a sibling of the other."""
        mine, theirs = self.roles.get(x), self.roles.get(y)
        if mine is None or theirs is None:
            return False
        found = self.after_of.get(mine[0], set()), self.before_of.get(theirs[0], set())
        return bool(found[0] or found[1]) and theirs[0] not in found[0]


def claim(matching: Matching) -> None:
    """Claim what stands where the siblings of a node have their partners."""
    siblings, inserted = of(matching), False
    orders = layouts.orders_known(matching)
    for x in matching.unclaimed_before() if siblings.after_of else ():
        y, view = siblings.partner(x) or (None, None)
        if y is None or matching.alignment.of_after.get(y):
            continue
        if view is not None:
            if not all(len(orders[view.joined[dim]][index]) > 1 for dim, index in view.moves):
                continue  # every layer has an order of its own
            layouts.claim_shown(matching, x, y, view, "sibling")
            inserted = True
        elif nodes.shape(x) == nodes.shape(y):
            matching.add(x, y, "sibling")
    if inserted:
        matching.after.refresh()
        matching.changed()


def of(matching: Matching) -> Siblings:
    """Return what the claims say that stood when this was first asked: before anything was guessed."""
    if matching.siblings is None:
        matching.siblings = _read(matching)
    return matching.siblings


def _read(matching: Matching) -> Siblings:
    before, after = _by_path(matching.before, Moved()), _by_path(matching.after, matching.moved())
    found = _told(matching, before, after)
    if found.after_of:
        return found
    before, after = _by_period(matching)
    return _told(matching, before, after)


def _told(matching: Matching, before: Places, after: Places) -> Siblings:
    """Note which roles are claimed with which, by nodes of equal index."""
    after_of: dict[Role, set[Role]] = defaultdict(set)
    before_of: dict[Role, set[Role]] = defaultdict(set)
    shown: dict[tuple[Role, Role], set[View | None]] = defaultdict(set)
    for claim in matching.alignment.claims if before and after else ():
        view = matching.views.get(claim.after)
        x, y = before.get(claim.before), after.get(nodes.shown(claim.after) if view else claim.after)
        if x is not None and y is not None and x[1] == y[1]:
            after_of[x[0]].add(y[0])
            before_of[y[0]].add(x[0])
            shown[x[0], y[0]].add(view)
    places = {place: node for node, place in after.items()}
    return Siblings(before | after, places, dict(after_of), dict(before_of), dict(shown))


def _by_path(program: Program, moved: Moved) -> Places:
    """Tell of each node in a repeated module what it is there, and which of the modules it is in."""
    paths = {n: moved.path(provenance.module_path(n)) for n in program.live}
    return _places({n: path for n, path in paths.items() if path is not None and provenance.repeated(path)[1]})


def _by_period(matching: Matching) -> tuple[Places, Places]:
    """Tell the same of what repeats in the graphs, where a row of nodes is claimed that marks the layers of both."""
    before, after = (repeats(list(p.outputs.values())) for p in (matching.before, matching.after))
    if before is None or after is None:
        return {}, {}
    partners = {c.before: nodes.shown(c.after) for c in matching.alignment.claims if c.cut}
    rows = same_row(before, after, partners)
    if rows is None:
        return {}, {}
    left, right = before.layers(rows[0]), after.layers(rows[1])
    return _places({n: str(i) for n, i in left.items()}), _places({n: str(i) for n, i in right.items()})


def _places(paths: Mapping[Node, str]) -> Places:
    groups: dict[tuple[str, str, Any], list[Node]] = defaultdict(list)
    for node, path in paths.items():
        if node.op == "call_function" and nodes.INSERTED not in node.meta:
            groups[path, provenance.target_name(node), nodes.shape(node)].append(node)
    found: Places = {}
    for (path, target, shape), group in groups.items():
        pattern, index = provenance.repeated(path)
        for place, node in enumerate(group):
            found[node] = (pattern, target, shape, len(group), place), index
    several = Counter(role for role, _ in found.values())
    return {node: place for node, place in found.items() if several[place[0]] > 1}

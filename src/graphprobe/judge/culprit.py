"""Which operation of a guilty region to name: the first, views included, without an equal partner on the other side."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align.steps import FLAT, step_of
from graphprobe.judge.unlike import unlike_siblings
from graphprobe.lanes.regions import Region
from graphprobe.lanes.same import Weights, same_arguments

Pairs = dict[Node, Node]  # after -> before


@dataclass(frozen=True, eq=False)
class Culprit:
    """The operation to name, the side it lives on, and all operations of the region that have no partner."""

    side: str
    node: Node
    lone: frozenset[Node]


def culprit(region: Region, weights: Weights) -> Culprit:
    """Name the first operation of `after` without partner, else the last of `before` without one (where what was
    dropped ended), else one with another weight, else one wired otherwise, else the output."""
    same = _same_from_the_frontier(region, weights)
    known = _same_elsewhere(region, same, weights)
    rest_before = [x for x in _own(region, "before") if x not in set(same.values()) and x not in known]
    rest_after = [y for y in _own(region, "after") if y not in same and y not in known]
    alike = _alike(rest_before, rest_after, (region.claim.before, region.claim.after), weights)
    lone_after = _doing([y for y in rest_after if y not in alike])
    lone_before = _doing([x for x in rest_before if x not in set(alike.values())])
    lone = frozenset(lone_after + lone_before)
    if lone_after:
        return _added(region, weights, (rest_before, rest_after), lone_after, alike, lone)
    dropped = [x for x in lone_before if step_of(x) != FLAT]  # what only casts or joins dimensions may be left out
    if dropped and (not alike or any(_carries_data(x) for x in dropped)):
        return Culprit("before", _makers(_at_home(dropped, region))[-1], lone)
    paired = [y for y in rest_after if y in alike]
    for y in paired:
        if _other_weights(alike[y], y, weights):
            return Culprit("after", y, frozenset([y]))
    first = paired[0] if paired else nodes.shown(region.claim.after)
    return Culprit("after", first, frozenset([first]))


def rounding(guilty: Culprit, region: Region) -> Culprit:
    """Name for a difference of rounding what can round: no view does."""
    if not nodes.is_view(guilty.node) and guilty.node.all_input_nodes:
        return guilty
    makers = [n for n in _own(region, guilty.side) if not nodes.is_view(n) and n.all_input_nodes]
    shown = nodes.shown(getattr(region.claim, guilty.side))
    return replace(guilty, node=next((n for n in [*makers, shown] if n in guilty.lone), shown))


def _added(
    region: Region, weights: Weights, rest: tuple[list[Node], list[Node]], lone: list[Node], alike: Pairs,
    every: frozenset[Node],
) -> Culprit:  # fmt: skip
    """Name one of what after alone does: what no other layer does; what reads another weight or takes another number,
    for a view may honestly be written otherwise; what is fed as in no other layer; else the first."""
    unlike = _unlike(rest[1], alike)
    named = (unlike or _at_home(lone, region))[0]
    if named in alike and named not in _unlike(rest[1], alike, radius=0):
        named = next((n for n in named.all_input_nodes if n in lone), named)  # it only differs by what it is fed
    if not unlike and not _takes_another_part(named, every):
        changed = _changed(*rest, alike, weights) if nodes.is_view(named) else None
        fed = [y for radius in (2, 3) for y in _unlike(rest[1], alike, radius)[:1]]
        named = changed or next(iter(fed), named)
    if not unlike or named not in unlike or set(lone) <= set(unlike):  # no other layer tells what is to blame
        named = _beyond_shapes(named, [y for y in _at_home(lone, region) if not unlike or y in unlike], every)
    return Culprit("after", named, every | {named})


def _takes_another_part(y: Node, lone: frozenset[Node]) -> bool:
    """Whether an operation takes another part of a value than one of the other piece: that is the mistake itself."""
    return _selects(y) and any(x is not y and x.target is y.target and differing(x, y) for x in lone)


def _unlike(rest_after: list[Node], alike: Pairs, radius: int = 1) -> list[Node]:
    """Return what the module does in none of the other layers, unless before does the same in this layer alone, too."""
    known = set(unlike_siblings(list(alike.values()), radius))
    found = [y for y in unlike_siblings(rest_after, radius) if alike.get(y) not in known]
    # which of its results is taken is no operation of its own
    makers = {y: y.all_input_nodes[0] for y in found if y.target is operator.getitem}
    return [makers[y] if makers.get(y) in rest_after else y for y in found]


def _changed(before: list[Node], after: list[Node], alike: Pairs, weights: Weights) -> Node | None:
    """Return the first operation of after, views aside, that reads a weight of other content or takes another number
    than the only operation of before it can stand for."""
    open_before = [x for x in before if x not in set(alike.values())]
    for y in after:
        if y in alike:
            if _other_content(alike[y], y, weights):
                return y
        elif not nodes.is_view(y):
            same = [x for x in open_before if x.target is y.target]
            if len(same) == 1 and differing(same[0], y):
                return y
    return None


def _beyond_shapes(named: Node, lone: list[Node], every: frozenset[Node]) -> Node:
    """Pass over what only joins and splits dimensions, or makes constants, where both sides were written anew: other
    operations need other shapes. A permutation or a slice stays named."""
    anew = any(n.op == "call_function" and not nodes.is_view(n) for n in every if n.graph is not named.graph)
    if not anew or not _only_shapes(named):
        return named
    return next((n for n in lone if not _only_shapes(n)), named)


def _only_shapes(node: Node) -> bool:
    return step_of(node) == FLAT or (node.op == "call_function" and not node.all_input_nodes)


_HANDS_ON = ("contiguous", "clone", "detach", "alias", "lift_fresh_copy", "type_as", "to", "_to_copy", "dropout")


def _doing(lone: list[Node]) -> list[Node]:
    """Pass over operations that hand on what they take, as a copy or a dropout in evaluation, if any does more."""
    return [n for n in lone if not _hands_on(n)]


def _hands_on(node: Node) -> bool:
    name = nodes.schema_name(node).removeprefix("aten::")
    taken = nodes.tensor_val(node.all_input_nodes[0]) if node.all_input_nodes else None
    made = nodes.tensor_val(node)
    if name not in _HANDS_ON or taken is None or made is None or taken.dtype != made.dtype:
        return False
    return name != "dropout" or not nodes.argument(node, "train") or nodes.argument(node, "p") == 0


def _own(region: Region, side: str) -> list[Node]:
    """Return a piece's operations without the views that alignment has put there."""
    return [n for n in region.operations(side) if nodes.INSERTED not in n.meta]


def renumbered(region: Region, guilty: Culprit) -> tuple[tuple[object, object], ...] | None:
    """Return (before's, after's) numbers where the two pieces differ in numbers of one operation, and only there."""
    lone = sorted(guilty.lone, key=lambda n: n in region.after)
    if len(lone) != 2 or lone[0] in region.after or lone[1] not in region.after or lone[0].target is not lone[1].target:
        return None
    changed = tuple((mine, theirs) for _, mine, theirs in differing(*lone))
    plain = all(isinstance(v, (int, float)) and not isinstance(v, bool) for pair in changed for v in pair)
    return changed if changed and plain else None


def differing(x: Node, y: Node) -> list[tuple[str, Any, Any]]:
    """Return (argument, before's, after's) for every plain argument in which two uses of one operator differ."""
    if len(x.all_input_nodes) != len(y.all_input_nodes):
        return []
    schema = y.target._schema.arguments if isinstance(y.target, torch._ops.OpOverload) else []
    names = [a.name for a in schema]

    def given(node: Node) -> dict[str, Any]:
        out = {a.name: a.default_value for a in schema if a.has_default_value()}
        positional = [names[i] if i < len(names) else str(i) for i in range(len(node.args))]
        return {**out, **dict(zip(positional, node.args, strict=True)), **node.kwargs}

    left, right = given(x), given(y)
    found = []
    for name in dict.fromkeys([*left, *right]):
        p, q = left.get(name), right.get(name)
        if not _has_nodes(p) and not _has_nodes(q) and repr(p) != repr(q):
            found.append((name, p, q))
    return found


def _has_nodes(value: Any) -> bool:
    found: list[Node] = []
    torch.fx.map_arg((value,), lambda n: found.append(n))
    return bool(found)


def _at_home(lone: list[Node], region: Region) -> list[Node]:
    """Pass over operations far above the region's module: a mask made once for all layers is seldom to blame."""
    home = provenance.module_path(region.claim.after) or provenance.module_path(region.claim.before)
    return [n for n in lone if not _far_above(provenance.module_path(n), home)] or lone


def _makers(lone: list[Node]) -> list[Node]:
    """Pass over views behind the operation that was dropped."""
    return [n for n in lone if not nodes.is_view(n)] or lone


def _carries_data(x: Node) -> bool:
    """Whether a node depends on an input or a weight; a mask made of positions that after does not need does not."""
    stack, seen = [x], {x}
    while stack:
        node = stack.pop()
        if node.op in ("placeholder", "get_attr"):
            return True
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        stack.extend(new)
    return False


def _far_above(path: str, home: str) -> bool:
    inside = home.startswith(path + ".") if path else bool(home)
    return inside and home.count(".") - path.count(".") >= 3


def _same_from_the_frontier(region: Region, weights: Weights) -> Pairs:
    """Pair operations that do the same to the same: equal operator, constants, weights and partnered operands."""
    leaves = set(region.frontier)
    pairs: Pairs = {}
    for y in region.operations("after"):
        for x in region.operations("before"):
            if x not in pairs.values() and _does_the_same(x, y, leaves, pairs, weights):
                pairs[y] = x
                break
    return pairs


def _same_elsewhere(region: Region, same: Pairs, weights: Weights) -> set[Node]:
    """Return the operations of either piece that the other *graph* does, too, outside the piece: it is their user that
    is wired otherwise, as where sines are taken for cosines."""
    leaves = set(region.frontier)
    pairs = dict(same)
    partners: dict[Node, list[Node]] = {}
    for p, q in (*leaves, *((x, y) for y, x in same.items())):
        partners.setdefault(p, []).append(q)
        partners.setdefault(q, []).append(p)
    found: set[Node] = set()
    for side in ("after", "before"):
        for node in region.operations(side):
            if node in same or node in set(same.values()) or node is getattr(region.claim, side) or _selects(node):
                continue
            first = next((n for n in node.all_input_nodes if n in partners), None)
            for other in [u for p in partners[first] for u in p.users] if first is not None else []:
                x, y = (other, node) if side == "after" else (node, other)
                if _does_the_same(x, y, leaves, pairs, weights):
                    pairs[y] = x
                    partners.setdefault(node, []).append(other)
                    found.add(node)
                    break
    return found


def _selects(node: Node) -> bool:
    """Whether the operation takes a part of its operand: taking another part is the mistake itself."""
    name = getattr(node.target, "__name__", "").split(".")[0]
    return name in ("getitem", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind")


def share_a_split(x: Node, y: Node) -> bool:
    """Whether two operations take parts, or views, of one value."""
    both = all(_selects(n) or nodes.is_view(n) for n in (x, y))
    return both and x.all_input_nodes[:1] == y.all_input_nodes[:1]


def _does_the_same(x: Node, y: Node, leaves: set[tuple[Node, Node]], pairs: Pairs, weights: Weights) -> bool:
    if x.op != y.op or x.target is not y.target or len(x.all_input_nodes) != len(y.all_input_nodes):
        return False
    operands = zip(x.all_input_nodes, y.all_input_nodes, strict=True)
    return same_arguments(x, y) and all(_same_operand(p, q, leaves, pairs, weights) for p, q in operands)


def _same_operand(p: Node, q: Node, leaves: set[tuple[Node, Node]], pairs: Pairs, weights: Weights) -> bool:
    if p.op == "get_attr" and q.op == "get_attr":
        return weights.stands_for(p, q)
    return (p, q) in leaves or pairs.get(q) is p


def _alike(rest_before: list[Node], rest_after: list[Node], claimed: tuple[Node, Node], weights: Weights) -> Pairs:
    """Pair what is left by operator and constants alone: from the claimed pair upwards, then what reads the same
    weights and upwards from there, then in graph order."""
    open_before, open_after = dict.fromkeys(rest_before), dict.fromkeys(rest_after)
    pairs: Pairs = {}

    def pair(x: Node, y: Node) -> None:
        stack = [(x, y)]
        while stack:
            p, q = stack.pop()
            if p in open_before and q in open_after and same_kind(p, q):
                del open_before[p], open_after[q]
                pairs[q] = p
                stack.extend(zip(p.all_input_nodes, q.all_input_nodes, strict=True))

    pair(*claimed)
    for by_weights in (True, False):
        for y in rest_after:
            for x in list(open_before) if y in open_after else ():
                if same_kind(x, y) and (not by_weights or _reads_same(x, y, weights)):
                    pair(x, y)
                    break
    return pairs


def _reads_same(x: Node, y: Node, weights: Weights) -> bool:
    return any(n.op == "get_attr" for n in y.all_input_nodes) and not _other_weights(x, y, weights)


def same_kind(x: Node, y: Node) -> bool:
    """Whether two nodes are one operator with equal constants, whatever they are fed."""
    return x.target is y.target and len(x.all_input_nodes) == len(y.all_input_nodes) and same_arguments(x, y)


def other_weights(region: Region, weights: Weights) -> bool:
    """Whether the claimed pair is one operator that reads other weights."""
    x, y = region.claim.before, region.claim.after
    return x.target is y.target and _other_weights(x, y, weights)


def _other_content(x: Node, y: Node, weights: Weights) -> bool:
    """Whether two operations read as many weights, of the same shapes, but not the same numbers."""
    mine, theirs = ([n for n in node.all_input_nodes if n.op == "get_attr"] for node in (x, y))
    pairs = list(zip(mine, theirs, strict=False)) if len(mine) == len(theirs) else []
    return any(nodes.shape(p) == nodes.shape(q) and not weights.stands_for(p, q) for p, q in pairs)


def _other_weights(x: Node, y: Node, weights: Weights) -> bool:
    mine = [n for n in x.all_input_nodes if n.op == "get_attr"]
    theirs = [n for n in y.all_input_nodes if n.op == "get_attr"]
    return len(mine) != len(theirs) or not all(weights.stands_for(p, q) for p, q in zip(mine, theirs, strict=True))

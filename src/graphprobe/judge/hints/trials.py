"""Hints by trial: a piece is evaluated again with one thing as the other side has it; what then agrees is named."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.judge.culprit import differing
from graphprobe.judge.hints.look import EQUAL, Look, Tensor, relative
from graphprobe.judge.hints.ratios import shown
from graphprobe.judge.same import difference, rms
from graphprobe.lanes import exact

_MOST_PAIRS = 8
_LONGEST, _MOST_PATHS = 4, 24  # operations that are bypassed at once, and ways that are tried
_MOST_WORK, _MOST_TRIALS = 20_000, 4  # operations that are run for one hint; about so many trials an operation
_CLEARLY = 0.25  # a trial among quantised values must leave no more than this share of the difference


def other_argument(look: Look) -> str | None:
    """One operator stands on both sides with another number: a scale, an epsilon, an axis."""
    mine, theirs = (look.region.operations(side) for side in ("before", "after"))
    lone = look.culprit.lone
    for y in theirs:
        for x in mine:
            if x.target is not y.target or x not in lone or y not in lone:
                continue
            changed = differing(x, y)
            if not changed:
                continue
            value = _evaluated(look, y, x)
            if isinstance(value, Tensor) and look.agrees(look.again({y: value})):
                look.proved.append(y)
                return _said(look, y, changed)
    return None


def _evaluated(look: Look, y: Node, x: Node) -> Any:
    """Evaluate y on after's values with the plain arguments of x."""
    values = look.inside[1]
    operands = iter(y.all_input_nodes)
    pairs = dict(zip(x.all_input_nodes, operands, strict=True))

    def operand(n: Node) -> Any:
        mine = pairs[n]
        if mine.op == "get_attr":
            return exact.lift(look.replay.plan.after.attribute(mine))
        return values[mine]

    try:
        args, kwargs = torch.fx.map_arg(x.args, operand), torch.fx.map_arg(dict(x.kwargs), operand)
        target, args, kwargs = exact.lifted_call(x, args, kwargs)
        with torch.no_grad():
            return target(*args, **kwargs)
    except Exception:  # other arguments may not fit after's operands
        return None


def _said(look: Look, y: Node, changed: list[tuple[str, Any, Any]]) -> str:
    name, before, after = changed[0]
    where = f"{look.label(y)} takes {_plain(after)} where before has {_plain(before)}; with before's the sides agree"
    if name == "eps" or _feeds_a_root(y, after):
        return f"looks like a wrong epsilon: {where}"
    if name in ("dim", "dims", "axis"):
        return f"looks like a wrong axis: {where}"
    kind = nodes.schema_name(y).removeprefix("aten::")
    whole = type(before) is int and type(after) is int
    if kind in ("ge", "gt", "le", "lt", "triu", "tril") and whole and abs(after - before) == 1:
        return f"looks like a mask that is off by one: {where}"
    if y.target is operator.getitem or kind in ("slice", "select", "narrow", "split", "split_with_sizes", "chunk"):
        off = " (off by one)" if whole and kind in ("slice", "narrow") and abs(after - before) == 1 else ""
        return f"looks like a wrong split order or slice{off}: {where}"
    if kind == "arange" and whole:
        return f"looks like positions that are off by {abs(after - before)}: {where}"
    if kind == "masked_fill" and _hides(before) != _hides(after):
        return f"looks like a fill value that hides {'everything' if _hides(after) else 'nothing'}: {where}"
    if isinstance(after, (int, float)) and isinstance(before, (int, float)) and before and kind in _SCALING:
        return f"looks like {scaling(before, after)}: {where}"
    return f"looks like another argument ({name}): {where}"


_SCALING = {"mul", "div", "scaled_dot_product_attention", "add", "sub", "pow", "group_norm", "clamp"}


def _hides(fill: object) -> bool:
    return isinstance(fill, (int, float)) and fill < -1e3


def scaling(before: float, after: float) -> str:
    """Name what a number has become: 1, its inverse, its square, its root."""

    def is_(x: float) -> bool:
        return abs(after - x) <= 1e-6 * abs(x)

    if is_(1.0):
        return "a missing scale"
    if before > 0 and is_(1 / before):
        return "an inverted scale"
    if is_(before * before):
        return "a scale where its root was meant (d for sqrt d)"
    if before > 0 and is_(before**0.5):
        return "the root of a scale in its place (sqrt d for d)"
    if is_(-before):
        return "a flipped sign"
    return f"another constant ({shown(after / before)} times)"


def _plain(value: Any) -> str:
    return shown(value) if isinstance(value, float) else "its default" if value is None else str(value)


def _feeds_a_root(node: Node, value: Any) -> bool:
    if nodes.schema_name(node) != "aten::add" or not isinstance(value, float) or not 0 <= value < 0.1:
        return False
    return any(nodes.schema_name(u) in ("aten::rsqrt", "aten::sqrt", "aten::pow") for u in node.users)


def swapped(look: Look) -> str | None:
    """Two inputs of one shape have changed places."""
    values = look.replay.values
    leaves = [p for p, _ in look.region.frontier if isinstance(values.get(p), Tensor)]
    pairs = [(p, q) for i, p in enumerate(leaves) for q in leaves[i + 1 :] if values[p].shape == values[q].shape]
    for p, q in pairs[:_MOST_PAIRS]:
        if look.agrees(look.again(given={p: values[q], q: values[p]})):
            return f"looks like swapped operands: with {look.label(p)} and {look.label(q)} exchanged the sides agree"
    return None


def cast_for_view(look: Look) -> str | None:
    """Bytes are converted as numbers where they should be read as another dtype, or the reverse."""
    values = look.inside[1]
    plain = look.distance(look.raw[1])
    for node in look.region.operations("after"):
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        mine = nodes.tensor_val(node)
        if source is None or mine is None:
            continue
        given = look.replay.plan.after.attribute(source) if source.op == "get_attr" else values.get(source)
        if (
            not isinstance(given, Tensor)
            or given.dtype == mine.dtype
            or 1 not in (given.dtype.itemsize, mine.dtype.itemsize)
        ):
            continue
        cast = nodes.schema_name(node) in ("aten::to", "aten::_to_copy")
        view = nodes.schema_name(node) == "aten::view" and given.dtype.itemsize == mine.dtype.itemsize
        if not (cast and given.dtype.itemsize == mine.dtype.itemsize) and not view:
            continue
        tried = look.again({node: given.view(mine.dtype) if cast else given.to(mine.dtype)})
        left = look.distance(tried) if tried is not None else plain
        if left < _CLEARLY * plain or (plain == float("inf") and left < 1):
            names = (".to()", ".view()") if cast else (".view()", ".to()")
            both = f"{str(given.dtype).removeprefix('torch.')} as {str(mine.dtype).removeprefix('torch.')}"
            return (
                f"looks like {names[0]} where {names[1]} was meant: {look.label(node)} takes {both}; "
                f"with {names[1]} the difference falls from {shown(plain)} to {shown(left)}"
            )
    return None


def dropped(look: Look) -> str | None:
    """One side has operations that the other lacks, and without them the sides agree."""
    for side, other in (("before", look.raw[1]), ("after", look.raw[0])):
        values = look.inside[side == "after"]
        lone = [n for n in look.region.operations(side) if n in look.culprit.lone]
        # every trial runs the whole piece: of one of hundreds of operations only the last are tried
        affordable = _MOST_WORK // (_MOST_TRIALS * len(look.region.operations(side)) or 1) + 1
        for last in lone[: -affordable - 1 : -1]:
            found = _bypassed(look, side, last, set(lone), values, other)
            if found is not None:
                found = _tightened(*found, values)
                doing = [n for n in found[1] if not nodes.is_view(n)]
                look.proved.extend(doing[-1:])
                names = ", ".join(f"{look.label(n)} ({provenance.target_name(n)})" for n in found[1])
                return f"looks like {_kind_of(side, *found, values)}: without {names} of {side} the sides agree"
    return None


def _tightened(source: Node, passed: list[Node], values: dict[Node, Any]) -> tuple[Node, list[Node]]:
    """Leave out what hands its operand on as it is, at either end: a copy, a collective of one rank."""

    def same(x: Node, y: Node) -> bool:
        mine, theirs = values.get(x), values.get(y)
        return isinstance(mine, Tensor) and isinstance(theirs, Tensor) and torch.equal(mine, theirs)

    while len(passed) > 1 and same(passed[-1], passed[-2]):
        passed = passed[:-1]
    while len(passed) > 1 and same(source, passed[0]):
        source, passed = passed[0], passed[1:]
    return source, passed


def _kind_of(side: str, source: Node, passed: list[Node], values: dict[Node, Any]) -> str:
    """Name what was dropped or is too much by what it does to a value: a factor, a sum, a sign."""
    x, y = values[source].double(), values[passed[-1]].double()
    c = float((x * y).sum() / x.square().sum().clamp(min=1e-300))
    if c and rms(y - c * x) <= EQUAL * rms(y):
        if abs(c + 1) < EQUAL:
            return "a flipped sign"
        if side == "after" and c >= 2 and abs(c - round(c)) < 1e-6:
            return f"a doubled sum ({round(c)} times: as often as there are ranks, or added twice)"
        return f"a missing scale ({shown(c)})" if side == "before" else f"a superfluous scale ({shown(c)})"
    kinds = {nodes.schema_name(n) for n in passed if not nodes.is_view(n) and nodes.schema_name(n) not in _CASTS}
    if kinds <= {"aten::add", "aten::sub"}:
        return "a missing addend (a residual, a bias)" if side == "before" else "a superfluous addend"
    if kinds <= {"aten::mul", "aten::div"}:
        return "a missing scale" if side == "before" else "a superfluous scale"
    return "a dropped operation" if side == "before" else "a superfluous operation"


_CASTS = {"aten::to", "aten::_to_copy"}


def _bypassed(
    look: Look, side: str, last: Node, lone: set[Node], values: dict[Node, Any], other: Tensor
) -> tuple[Node, list[Node]] | None:
    """Return an ancestor and the operations from it to `last` if handing it through makes the sides agree."""
    mine = values.get(last)
    if not isinstance(mine, Tensor):
        return None
    paths: list[tuple[Node, list[Node]]] = [(n, [last]) for n in last.all_input_nodes]
    for source, passed in paths:  # grows while it is walked
        given = values.get(source)
        if isinstance(given, Tensor) and given.shape == mine.shape and given.dtype == mine.dtype:
            try:
                tried = look.replay.exact(side, look.region, override={last: given})
            except Exception:  # what stands in its place does not fit below
                tried = None
            if isinstance(tried, Tensor) and _equal(look, tried, other):
                return source, passed[::-1]
        if source in lone and len(passed) < _LONGEST and len(paths) < _MOST_PATHS:
            paths.extend((n, [*passed, source]) for n in source.all_input_nodes)
    return None


def _equal(look: Look, tried: Tensor, other: Tensor) -> bool:
    if tried.shape != other.shape:
        return False
    change, kept, wrong = difference(look.replay, look.region, other, tried)
    return not bool(wrong.any()) and relative(rms(change), rms(kept)) < EQUAL


def wired(look: Look) -> str | None:
    """The named operation does what one of before does, with other operands."""
    y = look.culprit.node
    if look.culprit.side != "after" or y.op != "call_function":
        return None
    partner = {q: p for p, q in look.region.frontier}
    for x in look.region.operations("before"):
        mine, theirs = _operands(x), _operands(y)
        if x.target is not y.target or len(mine) != len(theirs) or differing(x, y):
            continue
        other = [(p, q) for p, q in zip(mine, theirs, strict=True) if not _stands_for(p, q, partner)]
        if len(other) == 1 and all(n.op != "get_attr" for n in other[0]):
            p, q = other[0]
            return (
                f"looks like a wrong operand: {look.label(y)} takes {look.label(q)} where before takes {look.label(p)}"
            )
    return None


def _operands(node: Node) -> list[Node]:
    """Return what a node takes, in order, and twice what it takes twice."""
    found: list[Node] = []
    torch.fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _stands_for(p: Node, q: Node, partner: dict[Node, Node]) -> bool:
    """Whether two operands are a claimed pair, one weight, or the same made of such: a head that is split off."""
    if q in partner or p.op == "get_attr" or p.op != q.op or p.op != "call_function":
        return partner.get(q) is p or (p.op == q.op == "get_attr" and str(p.target) == str(q.target))
    mine, theirs = p.all_input_nodes, q.all_input_nodes
    alike = p.target is q.target and len(mine) == len(theirs) and not differing(p, q)
    return alike and all(_stands_for(x, y, partner) for x, y in zip(mine, theirs, strict=True))

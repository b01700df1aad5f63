"""Numbers that differ without a trace: a threshold, a bound or a slope that no element of these inputs comes near."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from graphprobe import nodes
from graphprobe.judge.culprit import differing
from graphprobe.judge.judging import Judged, Judgement
from graphprobe.lanes.regions import SMALL, Region

_NAMED = 3  # so many are listed
_DECISIONS = {f"aten::{name}" for name in ("gt", "ge", "lt", "le", "eq", "ne", "clamp", "clamp_min", "clamp_max")}
_HIDES = -1e4  # below that a number masks, and one that masks as well is no other one


def note(judgement: Judgement, judged: Sequence[Judged]) -> str:
    """Say which operations take another number in after though both sides agree; '' where none does."""
    label = judgement.replay.plan.after.label
    found: dict[str, str] = {}
    for j in judged:
        if j.kind in ("identical", "rounding") and not j.measured.isomorphic:  # in one program no number differs
            for y, mine, theirs in _numbers(j.region):
                found.setdefault(label(y), f"{label(y)} takes {theirs:.6g} where before has {mine:.6g}")
    if not found:
        return ""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{'; '.join([*found.values()][:_NAMED])}{more}; on these inputs that makes no difference, on others it may"


def _numbers(region: Region) -> list[tuple[Node, float, float]]:
    """Return (operation, before's number, after's) for operators that stand on both sides as often, one for one."""
    sides = [[n for n in region.operations(side) if _decides(n)] for side in ("before", "after")]
    if len(sides[0]) != len(sides[1]) or max(region.size("before"), region.size("after")) > SMALL:
        return []
    return [
        (y, float(mine), float(theirs))
        for x, y in zip(*sides, strict=True)
        if x.target is y.target
        for _, mine, theirs in differing(x, y)
        if _is_number(mine) and _is_number(theirs) and mine != theirs and max(mine, theirs) > _HIDES
        if float in (type(mine), type(theirs)) or nodes.schema_name(y) in _DECISIONS
    ]


def _decides(node: Node) -> bool:
    return bool(node.all_input_nodes) and not nodes.is_view(node) and nodes.schema_name(node) not in _IDLE


_IDLE = {"aten::dropout", "aten::native_dropout", "aten::alpha_dropout", "aten::feature_dropout"}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

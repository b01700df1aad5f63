"""Rule 7, fully masked rows: where a query may look at nothing, what it sees is an accident of the mask's number.

-65504 added in float16 gives the mean of all values, -1e4 added in float32 a softmax of the scores, a boolean mask
zeros. Nobody means any of it, so those rows are left out and counted. They are found by drawing them anew: elements of
the claimed value that move on *both* sides. A row that is fully masked in one version alone is a defect and stays, and
so does what is not finite natively.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.execute import Values
from graphprobe.judge.same import Sameness, ask
from graphprobe.lanes import exact
from graphprobe.lanes.references import MASKED
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

NOTE = "{} elements of fully masked rows are left out"
_ATTENTION = "scaled_dot_product"
_SHARE = 1.001  # times the share of queries that see nothing: if more moves, they reach what others see


def without_masked_rows(replay: Replay, region: Region, plain: Sameness) -> Sameness:
    """Ask rule 1 again with fully masked rows left out, if there are any; else return `plain`."""
    try:
        found = [_moved(replay, side, region) for side in ("before", "after")]
    except Exception:  # no arithmetic for it: nothing is left out
        return plain
    if found[0] is None or found[1] is None or found[0].shape != found[1].shape:
        return plain
    left_out = found[0] & found[1]
    if not bool(left_out.any()):
        return plain
    replay.leave_out(region.claim.before, region.claim.after, left_out)
    again = ask(replay, region)
    count = int(left_out.sum())
    return dataclasses.replace(again, note=NOTE.format(count), left_out=count)


def _moved(replay: Replay, side: str, region: Region) -> torch.Tensor | None:
    """Return which elements of the claimed value move when fully masked rows are drawn anew; None where none are."""
    piece = [n for n in getattr(region, side) if _is_softmax(n) or _mask_of(n) is not None]
    if not piece:
        return None
    values = replay.exact_values(side, region)
    redrawn: dict[Node, torch.Tensor] = {}
    share = 0.0
    for node in piece:
        rows = _full_rows(replay, side, node, values)
        if rows is None or not bool(rows.any()) or not isinstance(values.get(node), torch.Tensor):
            continue
        noise = torch.rand(values[node].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        redrawn[node] = torch.where(rows.unsqueeze(-1), noise.to(values[node].device), values[node])
        some = rows.flatten(1, -2).any(1) if rows.dim() > 2 else rows  # [batch, queries]: of any head
        share = max(share, float(some.double().mean()))
    if not redrawn or share == 1.0:
        return None
    plain = replay.result(side, region, values)
    moved = _changed(plain, replay.exact(side, region, override=redrawn))
    return moved if float(moved.double().mean()) <= _SHARE * share else None


def _changed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ~((x == y) | (x.isnan() & y.isnan()))


def _is_softmax(node: Node) -> bool:
    return nodes.schema_name(node) in exact.SOFTMAXES


def _mask_of(node: Node) -> Any:
    """Return the mask that an attention operator takes; None for all else. Only those that return one value."""
    if _ATTENTION not in nodes.schema_name(node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    return node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)


def _full_rows(replay: Replay, side: str, node: Node, values: Values) -> torch.Tensor | None:
    """Return [batch, ..., queries] bool: where a row of scores is masked as a whole; None where that is no row."""
    result = values.get(node)
    if not isinstance(result, torch.Tensor) or result.dim() < 2:
        return None
    operand = node.args[0] if _is_softmax(node) else _mask_of(node)
    if not isinstance(operand, Node):
        return None
    last = node.args[1] if _is_softmax(node) and len(node.args) > 1 else -1
    scores = values.get(operand)
    if scores is None or last not in (-1, result.dim() - 1):
        return None
    hidden = ~scores if scores.dtype == torch.bool else scores <= MASKED
    full: torch.Tensor = hidden.all(-1).expand(result.shape[:-1])
    return full

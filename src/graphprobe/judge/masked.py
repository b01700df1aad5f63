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
from graphprobe.chains import CASTS
from graphprobe.execute import Values
from graphprobe.judge.same import Sameness, ask
from graphprobe.lanes import exact
from graphprobe.lanes.references import MASKED
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

NOTE = "{} elements of fully masked rows are left out"
_ATTENTION = "scaled_dot_product"
_SCALES = {"aten::mul", "aten::div", *CASTS}
_MASKS = ("attn_mask", "attn_bias")
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


def hides(node: Node) -> bool:
    """Whether what a node computes may hide scores: a softmax reads it, or attention takes it for its mask."""
    if exact.feeds_softmax(node):
        return True
    level = [node]
    for _ in range(exact.NEAR):
        if any(_mask_of(user) is one for one in level for user in one.users):
            return True
        level = [user for one in level for user in one.users][: exact.NEAR]
    return False


def _moved(replay: Replay, side: str, region: Region) -> torch.Tensor | None:
    """Return which elements of the claimed value move when fully masked rows are drawn anew; None where none are."""
    piece = [n for n in getattr(region, side) if _is_softmax(n) or _mask_of(n) is not None]
    if not piece:
        return None
    values = replay.exact_values(side, region)
    redrawn: dict[Node, Any] = {}
    share = 0.0
    for node in piece:
        rows = _full_rows(replay, side, node, values)
        result = _first(values.get(node))
        if rows is None or not bool(rows.any()) or result is None:
            continue
        noise = torch.rand(result.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        drawn = torch.where(rows.unsqueeze(-1), noise.to(result.device), result)
        redrawn[node] = drawn if values[node] is result else (drawn, *values[node][1:])
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


def _mask_of(node: Node) -> Node | None:
    """Return the mask that an attention operator takes; None for all else."""
    if _ATTENTION not in nodes.schema_name(node):
        return None
    found = next((m for name in _MASKS if (m := nodes.argument(node, name)) is not None), None)
    return found if isinstance(found, Node) else None


def _full_rows(replay: Replay, side: str, node: Node, values: Values) -> torch.Tensor | None:
    """Return [batch, ..., queries] bool: where a row of scores is masked as a whole; None where that is no row."""
    result = _first(values.get(node))
    if result is None or result.dim() < 2:
        return None
    operand = node.args[0] if _is_softmax(node) else _mask_of(node)
    last = node.args[1] if _is_softmax(node) and len(node.args) > 1 else -1
    if not isinstance(operand, Node) or values.get(operand) is None or last not in (-1, result.dim() - 1):
        return None
    hidden = _hidden(operand, values)
    if not _is_softmax(node) and nodes.argument(node, "is_causal") is True:
        hidden = hidden | ~torch.ones(hidden.shape[-2:], dtype=torch.bool, device=hidden.device).tril()
    full: torch.Tensor = hidden.all(-1).expand(result.shape[:-1])
    return full


def _hidden(scores: Node, values: Values) -> torch.Tensor:
    """Return where scores, or the mask itself, say that nothing may be looked at: also before they were scaled."""
    value = values[scores]
    if value.dtype == torch.bool:
        return ~value  # type: ignore[no-any-return]
    hidden: torch.Tensor = value <= MASKED
    node = scores
    while nodes.schema_name(node) in _SCALES:
        node = next((n for n in node.all_input_nodes if _has_shape(values.get(n), value.shape)), scores)
        if node is scores:
            return hidden
        hidden = hidden | ((values[node] <= MASKED) & (value < 0))
    return hidden


def _has_shape(value: object, shape: torch.Size) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == shape


def _first(value: object) -> torch.Tensor | None:
    """Return what an operator makes of its values: the first of several results (the others are sums of the scores)."""
    found = value[0] if isinstance(value, (tuple, list)) and value else value
    return found if isinstance(found, torch.Tensor) else None

"""Determinism: an operation that differs from itself when a run is repeated is no finding.

Asked only where it matters: something stands against a region, or one program on the same values made other bits. Both
pieces of it are run twice then, and every operation whose value changes although its operands do not is marked. A
region that holds one is judged against what it differs from itself: a difference of that size is nobody's defect.
Atomics and autotuning change the order of a sum, so that is rounding; what changes by more (numbers of a generator of
its own, memory that nobody wrote) is unknown: nothing can be said of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from graphprobe import provenance
from graphprobe.judge.same import difference, rms
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

RULE = "nondeterministic"
_TIMES = 8.0  # a difference up to so many times what the region differs from itself is its own unsteadiness
_REPEATS = 3
_AN_ORDER = 2.0**-7  # relative: what another order of a sum may change, in bf16
_PARTS = 64
_CHUNK = 64  # regions whose frontier values are held at once
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def unsteady(replay: Replay, regions: Sequence[Region]) -> list[tuple[str, Node]]:
    """Return (side, operation) of every operation in these regions that differs from itself on equal operands."""
    found: dict[tuple[str, Node], None] = {}
    for start in range(0, len(regions), _CHUNK):
        chunk = regions[start : start + _CHUNK]
        if start:
            replay.forget()
        replay.fetch_frontiers(chunk)
        for region in chunk:
            for side in ("before", "after"):
                found |= dict.fromkeys((side, n) for n in _changed(replay, side, region))
    return list(found)


def _changed(replay: Replay, side: str, region: Region) -> list[Node]:
    try:
        first, again = (
            {n: _fingerprint(v) for n, v in replay.native(side, region).items() if n.op == "call_function"}
            for _ in range(2)
        )
    except Exception:  # what raises is told elsewhere
        return []
    changed = {n for n, print_ in first.items() if not _equal(print_, again[n])}
    return [n for n in first if n in changed and not any(o in changed for o in n.all_input_nodes)]


def _fingerprint(value: Any) -> Any:
    """Return sums over the bits of parts of a tensor, [parts + 1] int64 on its device; a tuple of them for tuples."""
    if isinstance(value, (tuple, list)):
        return tuple(_fingerprint(v) for v in value)
    if not isinstance(value, torch.Tensor) or value.is_meta or value.numel() == 0:
        return None
    flat = (torch.view_as_real(value) if value.is_complex() else value).detach().reshape(-1).contiguous()
    bits = flat.view(_BITS[flat.dtype.itemsize])  # summed where they are: a copy in int64 could be four times the value
    whole = bits.numel() // _PARTS * _PARTS
    parts = bits[:whole].view(_PARTS, -1).sum(1, dtype=torch.int64)
    return torch.cat([parts, bits[whole:].sum(dtype=torch.int64).reshape(1)])


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, tuple):
        return all(_equal(p, q) for p, q in zip(x, y, strict=True))
    return x is None or torch.equal(x, y)


def excused(replay: Replay, region: Region, marked: Sequence[tuple[str, Node]]) -> tuple[str, str] | None:
    """Return (rounding or unknown, why) if marked operations explain the region's difference; None otherwise."""
    mine = [(side, n) for side, n in marked if n in getattr(region, side)]
    if not mine:
        return None
    replay.fetch_frontiers([region])
    try:
        own, between, size = _unsteadiness(replay, region)
    except Exception:  # no arithmetic for it: the marks alone excuse nothing
        return None
    if between > _TIMES * own:
        return None
    if own > _AN_ORDER * size:
        return "unknown", f"{words(mine)}, by more than another order of summation explains: nothing can be said of it"
    return "rounding", f"{words(mine)}; the sides differ by no more than that"


def words(marked: Sequence[tuple[str, Node]]) -> str:
    """Name operations that differ from themselves."""
    names = [f"{provenance.target_name(n)} in {side}" for side, n in marked]
    shown = ", ".join(dict.fromkeys(names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"nondeterministic: {shown} differs from itself when the run is repeated"


def _unsteadiness(replay: Replay, region: Region) -> tuple[float, float, float]:
    """Return the largest rms between runs of one side, the smallest between the sides, and the rms itself, natively."""
    runs: dict[str, list[torch.Tensor]] = {
        side: [replay.native(side, region)[getattr(region.claim, side)] for _ in range(_REPEATS)]
        for side in ("before", "after")
    }

    def distance(x: torch.Tensor, y: torch.Tensor) -> float:
        change, _, wrong = difference(replay, region, x, y)
        return float("inf") if bool(wrong.any()) else rms(change)

    own = max(distance(r[0], again) for r in runs.values() for again in r[1:])
    between = min(distance(x, y) for x in runs["before"] for y in runs["after"])
    return own, between, distance(torch.zeros_like(runs["before"][0]), runs["before"][0])

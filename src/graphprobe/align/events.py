"""Evidence 1, replacement events: while a transform was watched, it replaced all uses of one node by another."""

from __future__ import annotations

from collections.abc import Sequence

from graphprobe import nodes
from graphprobe.align.matching import Matching
from graphprobe.records import Replacement


def claim(matching: Matching, events: Sequence[Replacement]) -> None:
    """Claim what the events say: by id where the replaced node had one, else by name."""
    before, after = matching.before, matching.after
    left = {before.label(n): n for n in before.live}
    right = {after.label(n): n for n in after.live}
    for event in resolve(events):
        x, y = left.get(event.old), right.get(event.new)
        if x is None or y is None or nodes.is_view(y) or nodes.tensor_val(y) is None:
            continue
        if nodes.shape(x) == nodes.shape(y) and not matching.alignment.of_after.get(y):
            matching.add(x, y, "event", certain=True)


def resolve(events: Sequence[Replacement]) -> list[Replacement]:
    """Follow chains: a replaced by b, b replaced by c in a later transform, means that c stands for a."""
    stands_for: dict[str, str] = {}
    out: dict[str, Replacement] = {}
    for event in events:
        origin = stands_for.get(event.old, event.old)
        stands_for[event.new] = origin
        out.pop(event.old, None)
        out[event.new] = Replacement(origin, event.new, event.transform)
    return list(out.values())

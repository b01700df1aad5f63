"""A claim that carries a layout says that `after` holds a value transposed and turns it back where it is used.

Where what uses it takes it as it stands, and then agrees with before, nobody meant the other layout: something above
transposed the value by mistake, and the claim hides where.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Claim
from graphprobe.judge.same import Variant, ask
from graphprobe.lanes import exact
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

EVIDENCE = "layout"


def denied(replay: Replay, region: Region, claims: Iterable[Claim]) -> list[Claim]:
    """Return the layouts a failing region starts from, if it agrees with before without turning them back."""
    frontier = set(region.frontier)
    layouts = [c for c in claims if c.evidence == EVIDENCE and (c.before, c.after) in frontier]
    if not layouts:
        return []
    as_they_stand: dict[Node, torch.Tensor] = {}
    replay.fetch_frontiers([region])
    for claim in layouts:
        for node in region.after:
            turned_back = claim.after in node.all_input_nodes and nodes.is_view(node)
            if turned_back and nodes.shape(node) == nodes.shape(claim.after):
                as_they_stand[node] = exact.lift(replay.values[claim.before])
    if not as_they_stand or not ask(replay, region, Variant(as_they_stand)).same:
        return []
    return layouts

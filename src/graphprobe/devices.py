"""Move a graph to another device: its weights, and every ``device=`` written into its nodes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphprobe.capturing import quiet


def moved(gm: torch.fx.GraphModule, device: torch.device) -> torch.fx.GraphModule:
    """Return a copy of the graph on `device`; the original stays where it is."""
    with quiet():
        there = copy.deepcopy(gm).to(device)

    def swap(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    def is_leaf(value: Any) -> bool:
        return isinstance(value, (torch.fx.Node, torch.device))

    for node in there.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(swap, (node.args, dict(node.kwargs)), is_leaf=is_leaf)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    there.recompile()
    return there

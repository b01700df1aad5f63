"""Exact values that regions share: what a node holds follows from the frontier pairs that it is computed from."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from graphprobe.execute import Values
from graphprobe.lanes.regions import Origin, Region, origins

LIMIT = 256 * 2**20  # bytes that are kept at most
_Key = tuple[str, Node, Origin]


class Remembered:
    """The float64 values of nodes by side and by what they start from."""

    def __init__(self) -> None:
        self._values: dict[_Key, Any] = {}
        self._bytes = 0

    def of(self, side: str, region: Region) -> Values:
        """Return what is known of the nodes of one piece."""
        return {key[1]: self._values[key] for key in _keys(side, region) if key in self._values}

    def keep(self, side: str, region: Region, env: Values) -> None:
        """Remember the values of one piece, until there are too many."""
        for key in _keys(side, region):
            value = env.get(key[1])
            if key in self._values or not isinstance(value, torch.Tensor):
                continue
            self._bytes += value.numel() * value.element_size()
            if self._bytes > LIMIT:
                return
            self._values[key] = value


def _keys(side: str, region: Region) -> list[_Key]:
    found = origins(side, region)
    piece: tuple[Node, ...] = getattr(region, side)
    return [(side, node, found[node]) for node in piece if node.op != "get_attr"]

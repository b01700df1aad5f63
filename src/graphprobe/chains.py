"""Chains: the nodes that turn floating values into codes: they clip, round, add a zero point, cast to a narrow type."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.quantizers import FAKE_QUANTIZERS, QUANTIZERS

FP8 = {getattr(torch, n) for n in dir(torch) if n.startswith("float8_")}
NARROW = {torch.int8, torch.uint8, torch.int16, torch.int32, *FP8}
_ROUNDS = {"aten::round", "aten::floor"}
_CLAMPS = {"aten::clamp", "aten::clip", "aten::clamp_min", "aten::clamp_max", "aten::hardtanh", "aten::minimum"}
_CLAMPS |= {"aten::maximum"}
CASTS = {"aten::to", "aten::_to_copy", "prims::convert_element_type"}
_SHIFTS = {"aten::add", "aten::sub"}


@dataclass
class Chain:
    """The nodes that make one tensor of codes, and what lies between them."""

    source: Node  # what is turned into codes
    members: list[Node] = field(default_factory=list)  # relaxed: rounding, clipping, casts, quantisers
    path: list[Node] = field(default_factory=list)  # members, and the views and shifts between them, in order

    @property
    def last(self) -> Node:
        """The node that holds the codes (for a fake quantiser: what they stand for)."""
        return self.members[-1]

    @property
    def fake(self) -> bool:
        """Whether the last node holds what the codes stand for, not the codes."""
        return nodes.schema_name(self.last) in FAKE_QUANTIZERS

    def bounds(self) -> tuple[float, float] | None:
        """Return the smallest and the largest code, as clipped or as the dtype has it; None where nothing clips."""
        for node in self.members:
            name = nodes.schema_name(node)
            if name in QUANTIZERS or name in FAKE_QUANTIZERS:
                found = [
                    a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int) and not isinstance(a, bool)
                ]
                if len(found) >= 2:
                    return float(found[-2]), float(found[-1])
            if name in ("aten::clamp", "aten::clip", "aten::hardtanh"):
                numbers = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, (int, float))]
                if len(numbers) == 2:
                    return float(numbers[0]), float(numbers[1])
        value = nodes.tensor_val(self.last)
        if value is None or value.dtype not in (torch.int8, torch.uint8):
            return None
        return float(torch.iinfo(value.dtype).min), float(torch.iinfo(value.dtype).max)

    def dtype(self) -> torch.dtype | None:
        """Return the 8-bit floating dtype of the codes, or None for integers."""
        for node in self.members:
            value = nodes.tensor_val(node)
            if value is not None and value.dtype in FP8:
                return value.dtype
        return None


def chains(piece: Iterable[Node]) -> list[Chain]:
    """Find the chains of a piece, in graph order."""
    of: dict[Node, Chain] = {}
    between: dict[Node, list[Node]] = {}  # nodes that a chain may pass through, since its last member
    found: list[Chain] = []
    for node in piece:
        operand = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if node.op != "call_function" or operand is None:
            continue
        if _is_step(node):
            chain = of.get(operand) or Chain(operand)
            if not chain.members:
                found.append(chain)
            chain.path += [*between.get(operand, ()), node]
            chain.members.append(node)
            of[node] = chain
        elif operand in of and (nodes.is_view(node) or nodes.schema_name(node) in (_SHIFTS | CASTS)):
            of[node], between[node] = of[operand], [*between.get(operand, ()), node]
    return [chain for chain in found if _makes_codes(chain)]


def _is_step(node: Node) -> bool:
    name = nodes.schema_name(node)
    if name in QUANTIZERS or name in FAKE_QUANTIZERS:
        return True
    if name in _ROUNDS or name in _CLAMPS:
        return nodes.tensor_val(node) is not None
    return name in CASTS and _narrows(node)


def _narrows(node: Node) -> bool:
    mine = nodes.tensor_val(node)
    theirs = nodes.tensor_val(node.all_input_nodes[0])
    if mine is None or theirs is None or mine.dtype not in NARROW:
        return False
    return theirs.dtype.is_floating_point and theirs.dtype not in FP8


def _makes_codes(chain: Chain) -> bool:
    names = {nodes.schema_name(n) for n in chain.members}
    if names & (QUANTIZERS.keys() | FAKE_QUANTIZERS.keys()):
        return True
    value = nodes.tensor_val(chain.last)
    if value is None or not names & (_ROUNDS | CASTS):
        return False
    return value.dtype in (torch.int8, torch.uint8, *FP8) or (chain.bounds() is not None and bool(names & _ROUNDS))

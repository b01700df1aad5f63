"""Rounding to codes, found in a piece of graph and taken out of it.

A *chain* turns floating values into codes: it clips and rounds them, adds a zero point, casts them to a narrow type.
With its members relaxed the piece computes what it would with infinitely many codes, so that scales and zero points
that are right cancel exactly, also where they are applied after an integer product.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.lanes import exact
from graphprobe.lanes.quantized import FAKE_QUANTIZERS, QUANTIZERS

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

FP8 = {getattr(torch, n) for n in dir(torch) if n.startswith("float8_")}
NARROW = {torch.int8, torch.uint8, torch.int16, torch.int32, *FP8}
_ROUNDS = {"aten::round", "aten::floor"}
_CLAMPS = {"aten::clamp", "aten::clip", "aten::clamp_min", "aten::clamp_max", "aten::hardtanh", "aten::minimum"}
_CLAMPS |= {"aten::maximum"}
_CASTS = {"aten::to", "aten::_to_copy", "prims::convert_element_type"}
_SHIFTS = {"aten::add", "aten::sub"}
_PRODUCTS = {"aten::mm", "aten::bmm", "aten::matmul", "aten::linear", "aten::addmm", "aten::baddbmm", "aten::mv"}
_PRODUCTS |= {"aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution", "aten::einsum", "aten::_int_mm"}


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
        elif operand in of and (nodes.is_view(node) or nodes.schema_name(node) in (_SHIFTS | _CASTS)):
            of[node], between[node] = of[operand], [*between.get(operand, ()), node]
    return [chain for chain in found if _makes_codes(chain)]


def _is_step(node: Node) -> bool:
    name = nodes.schema_name(node)
    if name in QUANTIZERS or name in FAKE_QUANTIZERS:
        return True
    if name in _ROUNDS or name in _CLAMPS:
        return nodes.tensor_val(node) is not None
    return name in _CASTS and _narrows(node)


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
    if value is None or not names & (_ROUNDS | _CASTS):
        return False
    return value.dtype in (torch.int8, torch.uint8, *FP8) or (chain.bounds() is not None and bool(names & _ROUNDS))


def relaxed_call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], member: bool) -> Call:
    """Return what evaluates a node where codes may be numbers between the codes; `member`s of chains do not round."""
    name = nodes.schema_name(node)
    if member and name in QUANTIZERS:
        return QUANTIZERS[name](*args, **kwargs).relaxed, (), {}
    if member:
        shift = -0.5 if name == "aten::floor" else 0.0
        return operator.add, (args[0], shift), {}
    if name in _CASTS and _is_double(args[0]) and _casts_codes(node):
        return operator.add, (args[0], 0.0), {}
    if name in _PRODUCTS and any(_is_double(a) for a in args):
        args = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)
        if name == "aten::_int_mm":
            return torch.matmul, args, {}
    return exact.lifted_call(node, args, kwargs)


def _is_double(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float64


def _casts_codes(node: Node) -> bool:
    mine, theirs = nodes.tensor_val(node), nodes.tensor_val(node.all_input_nodes[0])
    return (
        mine is not None
        and theirs is not None
        and (mine.dtype in NARROW or mine.dtype == torch.int64)
        and (not theirs.dtype.is_floating_point or theirs.dtype in FP8)
    )

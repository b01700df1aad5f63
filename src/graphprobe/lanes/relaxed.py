"""A piece of graph without its rounding to codes.

With the members of its chains relaxed a piece computes what it would with infinitely many codes, so that scales and
zero points that are right cancel exactly, also where they are applied after an integer product.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.chains import CASTS, FP8, NARROW
from graphprobe.lanes import exact
from graphprobe.quantizers import QUANTIZERS

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

_PRODUCTS = {"aten::mm", "aten::bmm", "aten::matmul", "aten::linear", "aten::addmm", "aten::baddbmm", "aten::mv"}
_PRODUCTS |= {"aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution", "aten::einsum", "aten::_int_mm"}


def relaxed_call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], member: bool) -> Call:
    """Return what evaluates a node where codes may be numbers between the codes; `member`s of chains do not round."""
    name = nodes.schema_name(node)
    if member and name in QUANTIZERS:
        return QUANTIZERS[name](*args, **kwargs).relaxed, (), {}
    if member:
        shift = -0.5 if name == "aten::floor" else 0.0
        return operator.add, (args[0], shift), {}
    if name in CASTS and _is_double(args[0]) and _casts_codes(node):
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

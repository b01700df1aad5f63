"""Operators that compute in fewer bits than they are given: a kernel that casts to float32 inside has no float64 form.

It takes float64 tensors and gives float64 back, but its result is as coarse as float32, and held against the other
side's 1e-16 it would look like another function. Arguments with all 53 bits tell: a result that is a float32 number in
every element, and that mostly does not move when the arguments move by less than float32 can see, was computed there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Node

from graphprobe import nodes
from graphprobe.lanes import exact

_STEP = 2.0**-34  # far below float32's roundoff of 2^-24, far above float64's
_STILL = 0.9  # share of the numbers that such a step must leave as they are
#: Torch's own operators compute in the dtype that they are given.
_TORCH = ("aten", "prims", "prim", "quantized_decomposed", "higher_order")


def may_be_narrow(node: Node) -> bool:
    """Whether a node is somebody's own operator that exact arithmetic has no definition of."""
    name = nodes.schema_name(node)
    return "::" in name and name.partition("::")[0] not in _TORCH and name not in exact.RULES


def is_narrow(node: Node, values: Mapping[Node, Any]) -> bool:
    """Whether the node computes in fewer bits than float64; `values` are its float64 operands."""
    given: Any = torch.fx.map_arg((node.args, node.kwargs), lambda n: values[n])
    target, args, kwargs = exact.lifted_call(node, *given)
    once, twice = (_floats(_moved_call(target, args, kwargs, step)) for step in (_STEP, 2 * _STEP))
    counted = [x != 0 for x in once]
    if not any(bool(c.any()) for c in counted):
        return False
    still = sum(int((c & (x == y)).sum()) for c, x, y in zip(counted, once, twice, strict=True))
    whole = all(torch.equal(x.nan_to_num(), x.nan_to_num().float().double()) for x in once)
    return whole and still >= _STILL * sum(int(c.sum()) for c in counted)


def _moved_call(target: Callable[..., Any], args: Any, kwargs: Any, step: float) -> Any:
    generator = torch.Generator().manual_seed(0)

    def moved(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if x.dtype != torch.float64:
            return x.clone()
        # one offset for both calls gives all 53 bits, the step is what should be seen
        xi = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        return x * (1 + 2.0**-26 * xi + step)

    with torch.no_grad():
        return target(*pytree.tree_map(moved, args), **pytree.tree_map(moved, kwargs))


def _floats(value: Any) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(value) if isinstance(v, torch.Tensor) and v.dtype == torch.float64]

"""How far a captured graph is from the model it was captured from, without disturbing either."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.utils._pytree as pytree


def run_aside(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what the model returns, leaving its buffers, the inputs (caches) and the random state as they were."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cuda = {tensor.device.index for tensor in (*model.parameters(), *buffers.values()) if tensor.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=sorted(cuda)):
        return torch.func.functional_call(model, buffers, args, kwargs)


def distance(expected: Any, found: Any) -> float:
    """Return the relative L2 distance over all tensors of two outputs; inf where they do not correspond.

    Equal elements count as no difference, NaN beside NaN and equal infinities included.
    """
    before = [leaf for leaf in pytree.tree_leaves(expected) if isinstance(leaf, torch.Tensor)]
    after = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    if [leaf.shape for leaf in before] != [leaf.shape for leaf in after]:
        return math.inf
    difference, norm = 0.0, 0.0
    for x, y in zip(before, after, strict=True):
        if torch.equal(x, y):
            if x.numel():
                norm = math.hypot(norm, torch.linalg.vector_norm(_wide(x)).item())
            continue
        x, y = _wide(x), _wide(y)
        same = (x == y) | (x.isnan() & y.isnan())
        difference = math.hypot(difference, torch.linalg.vector_norm(torch.where(same, 0.0, y - x)).item())
        norm = math.hypot(norm, torch.linalg.vector_norm(torch.where(same & ~x.isfinite(), 0.0, x)).item())
    if difference == 0.0:
        return 0.0
    return difference / norm if norm > 0 and math.isfinite(difference) else math.inf


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)

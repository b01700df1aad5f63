"""Copies of values that a call may change, and what a caller sees of a call."""

from __future__ import annotations

import copy
from typing import Any

import torch

Seen = dict[str, Any]  # what a caller sees of a call: by path, outputs, arguments and buffers after it


def cloned(values: Any) -> tuple[Any, ...]:
    """Return copies of tensors with their strides; all else as it is."""
    return tuple(clone(value) for value in values)


def clone(value: Any) -> Any:
    """Return a copy of a tensor with its strides; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    plain = value.detach()
    if plain.layout is not torch.strided or plain.is_quantized:
        return plain.clone()
    if any(stride == 0 and size > 1 for stride, size in zip(plain.stride(), plain.shape, strict=True)):
        return plain.clone()  # what shares memory with itself cannot be copied into
    return torch.empty_strided(plain.shape, plain.stride(), dtype=plain.dtype, device=plain.device).copy_(plain)


def outputs_of(seen: Seen) -> list[Any]:
    """Return the leaves of what was returned, without what was written."""
    return [value for path, value in seen.items() if path.startswith("output")]


def own(leaf: Any) -> Any:
    """Return a copy that a call may change: a tensor, or an object such as a cache that is no pytree."""
    if isinstance(leaf, torch.Tensor):
        return clone(leaf)
    try:
        return copy.deepcopy(leaf)
    except Exception:  # a handle of something outside: calls share it
        return leaf

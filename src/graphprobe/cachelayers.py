"""Key-value caches whose layers hold other states than keys and values: those of mamba, jamba and the like.

transformers registers its `DynamicCache` with torch's pytrees for layers of keys and values. Any other layer becomes a
dict of its tensors here, and what else it holds (flags and sizes) is part of the structure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

_MARK = "layers"  # the first entry of a context that was made here
_PLAIN = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}  # what transformers' own registration takes
_MADE_ANEW = {"device", "dtype", "cumulative_length"}  # follows from the tensors
_GIVEN = ("sliding_window", "number_of_states")  # what constructors of layers take


@dataclass(frozen=True, eq=False)
class Known:
    """What torch is told of a cache class; transformers' own functions serve where they can."""

    kind: Any
    theirs: Any  # the entry of torch.utils._pytree
    by_spec: Any  # the entry of torch.fx._pytree

    def flatten(self, cache: Any) -> tuple[list[Any], Any]:
        """Return the cache's parts and what its structure is."""
        if _is_plain(cache):
            return self.theirs.flatten_fn(cache)  # type: ignore[no-any-return]
        parts = [_parts(layer) for layer in cache.layers]
        return [tensors for tensors, _ in parts], _context(cache, parts)

    def flatten_with_keys(self, cache: Any) -> tuple[list[Any], Any]:
        """Do as `flatten`, with a key for each part."""
        if _is_plain(cache):
            return self.theirs.flatten_with_keys_fn(cache)  # type: ignore[no-any-return]
        parts, context = self.flatten(cache)
        return [(_Layer(place), part) for place, part in enumerate(parts)], context

    def flatten_by_spec(self, cache: Any, spec: Any) -> list[Any]:
        """Return the parts of a cache that a graph is called with; `spec` is what it was captured with."""
        if _is_plain(cache):
            return self.by_spec(cache, spec)  # type: ignore[no-any-return]
        parts, context = self.flatten(cache)
        if context != spec.context:
            raise ValueError(
                "the cache has other layers than the one the graph was captured with, or is filled otherwise"
            )
        return parts

    def unflatten(self, parts: Any, context: Any) -> Any:
        """Rebuild the cache."""
        if not (isinstance(context, (list, tuple)) and context and context[0] == _MARK):
            return self.theirs.unflatten_fn(parts, context)
        cache = self.kind()
        cache.layers = [_layer(name, rest, tensors) for (name, rest), tensors in zip(context[1], parts, strict=True)]
        return cache


class _Layer(pytree.SequenceKey[Any]):
    """The place of a layer in the path of a value."""

    def get(self, cache: Any) -> Any:
        """Return the layer's tensors."""
        return _parts(cache.layers[self.idx])[0]


def _is_plain(cache: Any) -> bool:
    return all(type(layer).__name__ in _PLAIN for layer in cache.layers)


def _context(cache: Any, parts: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Any]:
    return [_MARK, [[type(layer).__name__, rest] for layer, (_, rest) in zip(cache.layers, parts, strict=True)]]


def _parts(layer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split what a layer holds into its tensors and the rest, which can be written as JSON."""
    tensors: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in sorted(vars(layer).items()):
        if name in _MADE_ANEW or (name.startswith("_") and isinstance(value, torch.Tensor)):
            continue
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            held = {k: v for k, v in value.items() if isinstance(v, torch.Tensor)}
            if held:
                tensors[name] = held
            rest[name] = {"pairs": [[k, None if k in held else _checked(layer, name, v)] for k, v in value.items()]}
        else:
            rest[name] = _checked(layer, name, value)
    return tensors, rest


def _checked(layer: Any, name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(layer).__name__}.{name} of the cache is a {type(value).__name__}, which cannot be captured")


def _class(name: str) -> Any:
    """Return a class of layers by its name; a file may name anything."""
    kind = getattr(sys.modules["transformers.cache_utils"], name, None)
    if not isinstance(kind, type) or not any(base.__name__.endswith("LayerMixin") for base in kind.__mro__):
        raise ValueError(f"transformers has no layer of caches that is called {name!r}")
    return kind


def _layer(name: str, rest: dict[str, Any], tensors: Any) -> Any:
    kind = _class(name)
    layer = kind(**{key: rest[key] for key in _GIVEN if rest.get(key) is not None})
    for key, value in rest.items():
        setattr(layer, key, dict(value["pairs"]) if isinstance(value, dict) else value)
    for key, value in dict(tensors).items():
        setattr(layer, key, {**getattr(layer, key), **value} if isinstance(value, dict) else value)
    first = next((v for v in pytree.tree_leaves(dict(tensors)) if isinstance(v, torch.Tensor)), None)
    if first is not None:
        layer.dtype, layer.device = first.dtype, first.device
    if hasattr(layer, "cumulative_length") and isinstance(keys := getattr(layer, "keys", None), torch.Tensor):
        layer.cumulative_length = keys.shape[-2]
    return layer

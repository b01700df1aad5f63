"""The key-value caches of transformers as torch pytrees, so that a model may take and return them."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphprobe import cachelayers


def register_caches() -> None:
    """Teach torch's pytrees the caches of transformers, if transformers is loaded; those that they know stay."""
    if "transformers" not in sys.modules:
        return
    try:
        from transformers.integrations.executorch import register_dynamic_cache_export_support
    except ImportError:
        return
    register_dynamic_cache_export_support()
    _register_layers()
    _register_pair()


def _register_layers() -> None:
    """Let caches with recurrent layers through: what transformers registers knows layers of keys and values alone."""
    from transformers.cache_utils import DynamicCache

    theirs = pytree.SUPPORTED_NODES[DynamicCache]
    if isinstance(getattr(theirs.flatten_fn, "__self__", None), cachelayers.Known):
        return
    mine = cachelayers.Known(DynamicCache, theirs, torch.fx._pytree.SUPPORTED_NODES[DynamicCache])
    pytree.SUPPORTED_NODES[DynamicCache] = theirs._replace(
        flatten_fn=mine.flatten, unflatten_fn=mine.unflatten, flatten_with_keys_fn=mine.flatten_with_keys
    )
    torch.fx._pytree.register_pytree_flatten_spec(DynamicCache, mine.flatten_by_spec)


def _register_pair() -> None:
    """Register the cache of models with an encoder and a decoder: one cache for each of its attentions."""
    try:
        from transformers.cache_utils import EncoderDecoderCache
    except ImportError:
        return
    if EncoderDecoderCache in pytree.SUPPORTED_NODES:
        return
    pytree.register_pytree_node(
        EncoderDecoderCache,
        lambda cache: (_parts(cache), None),
        lambda parts, _: _paired(EncoderDecoderCache, list(parts)),
        serialized_type_name=f"{EncoderDecoderCache.__module__}.{EncoderDecoderCache.__name__}",
        to_dumpable_context=lambda context: context,
        from_dumpable_context=lambda context: context,
        flatten_with_keys_fn=lambda cache: (
            list(zip(map(pytree.GetAttrKey, _NAMES), _parts(cache), strict=True)),
            None,
        ),
    )
    torch.fx._pytree.register_pytree_flatten_spec(EncoderDecoderCache, lambda cache, spec: _parts(cache))


_NAMES = ("self_attention_cache", "cross_attention_cache")


def _parts(cache: Any) -> list[Any]:
    return [getattr(cache, name) for name in _NAMES]


def _paired(kind: Any, parts: list[Any]) -> Any:
    made = object.__new__(kind)  # while torch counts leaves, the parts are no caches, which the constructor refuses
    for name, part in zip(_NAMES, parts, strict=True):
        setattr(made, name, part)
    layers = getattr(parts[1], "layers", ())
    made.is_updated = {i: getattr(layer, "keys", None) is not None for i, layer in enumerate(layers)}
    return made

"""What the tests of ``.fx`` files share: captured models, and files changed behind graphprobe's back."""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import graphprobe
from models import tiny

Graph = dict[str, Any]


@functools.cache
def captured(name: str, dynamic: bool = False) -> torch.fx.GraphModule:
    """Return a model of the corpus as a graph; do not change it."""
    model, args, kwargs = tiny(name)
    free = {key: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for key in kwargs if key != "use_cache"}
    shapes = {**free, **({"use_cache": None} if "use_cache" in kwargs else {})} if dynamic else None
    return graphprobe.capture(model, args, kwargs, dynamic_shapes=shapes)


def outputs(model: Callable[..., Any], args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Run without gradients and return the tensors that come out."""
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]


def bitwise_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors have equal dtypes, shapes and bits."""
    return len(one) == len(other) > 0 and all(same_bits(a, b) for a, b in zip(one, other, strict=True))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have equal dtype, shape and bits (NaN included)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [t.detach().resolve_conj().contiguous().view(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*flat)


def read_graph(path: Path) -> Graph:
    """Return the content of graph.json."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("graph.json"))  # type: ignore[no-any-return]


def edit(path: Path, change: Callable[[Graph], Any]) -> Path:
    """Apply `change` to graph.json in place (or replace it by what `change` returns); return the path."""
    with zipfile.ZipFile(path) as archive:
        graph = json.loads(archive.read("graph.json"))
        tensors = archive.read("tensors.safetensors")
    graph = change(graph) or graph
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("graph.json", json.dumps(graph))
        archive.writestr("tensors.safetensors", tensors)
    return path


def node_row(graph: Graph, target: str) -> Graph:
    """Return the first node of the root graph with that target."""
    return next(row for row in graph["graphs"][0]["nodes"] if row["target"] == target)  # type: ignore[no-any-return]

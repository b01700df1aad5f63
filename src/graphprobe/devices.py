"""Move a graph to another device, weights and every ``device=`` in its nodes; record runs as CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphprobe.capturing import quiet
from graphprobe.errors import InputError


def moved(gm: torch.fx.GraphModule, device: torch.device) -> torch.fx.GraphModule:
    """Return a copy of the graph on `device`; the original stays where it is."""
    with quiet():
        there = copy.deepcopy(gm).to(device)
    redirect(there, device)
    return there


def redirect(there: torch.fx.GraphModule, device: torch.device) -> None:
    """Let a graph compute on `device`, wherever its weights are: every ``device=`` in its nodes changes."""

    def swap(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    def is_leaf(value: Any) -> bool:
        return isinstance(value, (torch.fx.Node, torch.device))

    for node in there.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(swap, (node.args, dict(node.kwargs)), is_leaf=is_leaf)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    there.recompile()


def recorded(
    run: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Record ``run(*args, **kwargs)`` as a CUDA graph, without gradients; launching it costs the host next to nothing.

    The callable that is returned takes inputs of the same structure, shapes and dtypes. What it returns is overwritten
    by its next call. `run` is called three times first, so what it writes into (buffers of a module) must bear that.
    Raises InputError without a CUDA device or for inputs of another kind.
    """
    if not torch.cuda.is_available():
        raise InputError("a CUDA graph needs a CUDA device, and torch sees none")
    leaves, spec = pytree.tree_flatten((args, kwargs or {}))
    static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    def once() -> Any:
        given, named = pytree.tree_unflatten(static, spec)
        with torch.no_grad():
            return run(*given, **named)

    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries set themselves up and kernels are compiled outside of the recording
        once()
        once()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = once()

    def replay(*args: Any, **kwargs: Any) -> Any:
        given, structure = pytree.tree_flatten((args, kwargs))
        if structure != spec or any(not _alike(x, y) for x, y in zip(given, static, strict=True)):
            raise InputError("a recorded run takes inputs of the structure, shapes and dtypes it was recorded with")
        for x, y in zip(given, static, strict=True):
            if isinstance(x, torch.Tensor):
                y.copy_(x)
        graph.replay()
        return result

    return replay


def _alike(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return isinstance(y, torch.Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype)
    return bool(x == y)

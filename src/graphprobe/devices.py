"""Move a graph to another device, weights and every ``device=`` in its nodes; record runs as CUDA graphs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree

from graphprobe.capturing import quiet
from graphprobe.errors import InputError, OperatorError


@contextlib.contextmanager
def faults() -> Iterator[None]:
    """Say what it means when a GPU gives up: no operator can be named, and nothing runs there any more."""
    try:
        yield
    except torch.AcceleratorError as error:
        said = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise OperatorError(
            f"the GPU gave up while the graphs ran: {said}. An index that is out of range does this; after it nothing "
            "runs on that device in this process. Compare once more, in a new process and with device='cpu' (--device "
            "cpu): there the operator that raises is named"
        ) from error


def moved(gm: torch.fx.GraphModule, device: torch.device) -> torch.fx.GraphModule:
    """Return a copy of the graph on `device`; the original stays where it is."""
    with quiet():
        there = copy.deepcopy(gm).to(device)
    redirect(there, device)
    return there


def redirect(there: torch.fx.GraphModule, device: torch.device) -> None:
    """Let a graph compute on `device`, wherever its weights are: constants, and every ``device=`` in its nodes.

    What makes a tensor from nothing and names no device would make it on the default one; it is given the device, too.
    """

    def swap(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    def is_leaf(value: Any) -> bool:
        return isinstance(value, (torch.fx.Node, torch.device))

    for part in [m for m in there.modules() if isinstance(m, torch.fx.GraphModule)]:  # bodies of control flow, too
        for node in part.graph.nodes:
            node.args, node.kwargs = pytree.tree_map(swap, (node.args, dict(node.kwargs)), is_leaf=is_leaf)
            if _makes_from_nothing(node):
                node.kwargs = {**node.kwargs, "device": device}
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            if node.op == "get_attr":
                _move_constant(part, str(node.target), device)
        part.recompile()


def _makes_from_nothing(node: torch.fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or "device" in node.kwargs:
        return False
    arguments = node.target._schema.arguments
    takes_tensors = any("Tensor" in str(a.type) for a in arguments)
    return not takes_tensors and any(a.name == "device" and a.kwarg_only for a in arguments)


def _move_constant(part: torch.nn.Module, target: str, device: torch.device) -> None:
    """Move a tensor that is neither a parameter nor a buffer: ``Module.to`` leaves it where it is."""
    path, _, name = target.rpartition(".")
    owner = part.get_submodule(path)
    value = vars(owner).get(name)
    if isinstance(value, torch.Tensor) and value.device != device:
        setattr(owner, name, value.to(device))


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

"""What a graph's placeholders stand for in one call, and shapes and dtypes for graphs that carry none."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Interpreter, Node

from graphprobe import calling, inputs, nodes
from graphprobe.errors import InputError, nearest


def placeholder_values(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Node, Any]:
    """Map placeholders to what they receive when `gm` is called with these arguments.

    Raises InputError where arguments are missing, unknown, given twice or of another structure than the graph takes.
    """
    names = inputs.parameter_names(gm)
    unknown = [name for name in kwargs if name not in names]
    if len(args) > len(names) or unknown:
        what = f"{unknown[0]!r}{nearest(unknown[0], names)}" if unknown else f"{len(args)} inputs by position"
        raise InputError(f"the graph takes the inputs {', '.join(names)}, not {what}")
    twice = [name for name in names[: len(args)] if name in kwargs]
    if twice:
        raise InputError(f"the input {twice[0]!r} of the graph was given twice: by position and by name")
    placeholders = {str(node.target): node for node in gm.graph.nodes if node.op == "placeholder"}
    defaults = {name for name, node in placeholders.items() if node.args}
    missing = [name for name in names[len(args) :] if name not in kwargs and name not in defaults]
    if missing:
        raise InputError(f"the graph needs the input {missing[0]!r}, which was not given. It takes {', '.join(names)}")
    given = calling.placeholder_values(gm, args, kwargs)
    return {node: given[node] if node in given else node.args[0] for node in placeholders.values()}


def check(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise InputError where the arguments do not fit the shapes that `gm` was captured for."""
    for node, value in placeholder_values(gm, args, kwargs).items():
        wanted = nodes.tensor_val(node)
        if wanted is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise InputError(f"the input {node.name!r} of the graph must be a tensor, not a {type(value).__name__}")
        fits = value.dim() == wanted.dim() and all(
            not isinstance(want, int) or want == have for want, have in zip(wanted.shape, value.shape, strict=True)
        )
        if not fits:
            raise InputError(
                f"the input {node.name!r} has shape {tuple(value.shape)}, but the graph was captured with "
                f"{nodes.shape(node)}. Capture it again with inputs of this shape, or with dynamic_shapes"
            )


def misfit(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Name the first argument of another dtype than `gm` was captured for, or on another device than its weights."""
    home = inputs.device_of(gm)
    for node, value in placeholder_values(gm, args, kwargs).items():
        wanted = nodes.tensor_val(node)
        if wanted is None or not isinstance(value, torch.Tensor):
            continue
        if home is not None and value.device.type != home.type:
            return f"the input {node.name!r} is on {value.device}, but the weights of the graph are on {home}"
        if value.dtype != wanted.dtype:
            have, want = nodes.dtype_name(value.dtype), nodes.dtype_name(wanted.dtype)
            return f"the input {node.name!r} has dtype {have}, but the graph was captured with {want}"
    return ""


def is_complete(gm: GraphModule) -> bool:
    """Whether every node that makes values tells what it makes."""
    return all("val" in node.meta for node in gm.graph.nodes if nodes.makes_values(node) or node.op == "placeholder")


def fill(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set the missing ``meta["val"]`` of `gm` for inputs of these shapes, by a run on fake tensors.

    Where an operation cannot run on those, the graph runs once on copies of the inputs and buffers. An operation that
    fails there, too, and those that need what it returns, stay without.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = placeholder_values(gm, args, kwargs)
    fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, given)
    for node, value in fakes.items():
        node.meta.setdefault("val", value)
    with mode, torch.no_grad():
        _Filler(gm).run(initial_env=fakes)
    if is_complete(gm):
        return
    cuda = {value.device.index for value in given.values() if isinstance(value, torch.Tensor) and value.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=sorted(cuda)):
        _RealFiller(gm, mode).run(initial_env=pytree.tree_map_only(torch.Tensor, torch.clone, given))


_UNKNOWN = object()


class _Filler(Interpreter):
    """Runs a graph, writes down what every node returns, and goes on where one fails."""

    def run_node(self, n: Node) -> Any:
        if n.op in ("placeholder", "output") or any(self.env[source] is _UNKNOWN for source in n.all_input_nodes):
            return _UNKNOWN
        try:
            value = super().run_node(n)
        except Exception:
            return _UNKNOWN
        n.meta.setdefault("val", self.described(value))
        return value

    def described(self, value: Any) -> Any:
        """Return what is written down of a value."""
        return value


class _RealFiller(_Filler):
    """The same on real tensors, leaving those of the module as they were."""

    def __init__(self, gm: GraphModule, mode: Any) -> None:
        super().__init__(gm)
        self._mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Fetch a copy."""
        return pytree.tree_map_only(torch.Tensor, torch.clone, super().get_attr(target, args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call with copies of the buffers."""
        module = self.fetch_attr(target)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(module, buffers, args, kwargs)

    def described(self, value: Any) -> Any:
        """Return fake tensors in place of real ones."""
        return pytree.tree_map_only(torch.Tensor, self._mode.from_tensor, value)

"""What the transforms share: asking about nodes, inserting calls with their metadata, replacing, cleaning up."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from graphprobe import nodes
from graphprobe.errors import PipelineError
from graphprobe.provenance import module_path

aten = torch.ops.aten
Target = Callable[..., Any]

#: Where a node came from; what it is (val, tensor_meta) and who it is (custom) are not copied.
_PLACE = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


# --- questions -------------------------------------------------------------------------------------------------------


def arg(node: Node, index: int) -> Any:
    """Return a positional argument, None where the call has fewer."""
    return node.args[index] if index < len(node.args) else None


def is_call(value: Any, *targets: Target) -> TypeGuard[Node]:
    """Whether `value` is a node that calls one of `targets`."""
    return isinstance(value, Node) and value.op == "call_function" and value.target in targets


def is_assertion(node: Node) -> bool:
    """Whether the node only checks another one and makes no value."""
    return is_call(node, aten._assert_tensor_metadata.default)


def users(node: Node) -> list[Node]:
    """Return the nodes that use the value, assertions left out."""
    return [user for user in node.users if not is_assertion(user)]


def only_user(node: Node, *targets: Target) -> Node | None:
    """Return the one user of `node` if it calls one of `targets`, else None."""
    found = users(node)
    return found[0] if len(found) == 1 and is_call(found[0], *targets) else None


def tensor(node: Any) -> torch.Tensor | None:
    """Return the fake tensor of a node, or None."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def written(gm: GraphModule) -> set[Node]:
    """Return the nodes whose memory something writes into, as far as views lead to them."""
    return {node for found in writers(gm).values() for node in found}


def writers(gm: GraphModule) -> dict[Node, set[Node]]:
    """Map each node that writes in place to those whose memory it may write into."""
    return {node: _reached(node.all_input_nodes) for node in gm.graph.nodes if nodes.is_mutating(node)}


def _reached(stack: list[Node]) -> set[Node]:
    """Return the nodes that share memory with those on the stack."""
    found: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes if nodes.is_view(node) or nodes.is_mutating(node) else []
            stack += [user for user in node.users if nodes.is_view(user)]
    return found


def place(node: Node) -> str:
    """Return what a match at the node is called: its module's path, its own name where it is in none."""
    return module_path(node) or node.name


def known(node: Node) -> torch.Tensor:
    """Return the fake tensor of a node. Raises PipelineError where it has none."""
    value = tensor(node)
    if value is None:
        raise PipelineError(f"the shape and dtype of {node.name} are not known: it has no meta['val']")
    return value


def is_at(path: str, where: str) -> bool:
    """Whether a module path matches the glob `where`."""
    return fnmatch.fnmatchcase(path, where)


def shape(node: Any) -> torch.Size | None:
    """Return the shape of a node's fake tensor, or None."""
    value = tensor(node)
    return None if value is None else value.shape


def same_kind(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    """Whether two fake tensors have the same shape and dtype."""
    return x is not None and y is not None and x.shape == y.shape and x.dtype == y.dtype


def sizes(place: Node, node: Node) -> list[Any]:
    """Return a value's sizes as arguments for a call before `place`; symbolic ones are read where the graph runs."""
    value = tensor(node)
    if value is None:
        raise PipelineError(f"the sizes of {node.name} are not known: it has no meta['val']")
    return [
        size if isinstance(size, int) else insert(place, aten.sym_size.int, (node, dim), like=place)
        for dim, size in enumerate(value.shape)
    ]


# --- changes ---------------------------------------------------------------------------------------------------------


def insert(
    place: Node,
    target: Target,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    like: Node,
    outer: bool = False,
) -> Node:
    """Insert a call before `place`; it is said to come from where `like` came from, and knows its ``val``.

    With `outer` it belongs to the module around that of `like`: what serves several modules at once.
    """
    with place.graph.inserting_before(place):
        node = place.graph.call_function(target, args, kwargs or {})
    node.meta = {key: like.meta[key] for key in _PLACE if key in like.meta}
    if outer:
        _step_out(node.meta)
    node.meta["val"] = evaluate(node)
    return node


def _step_out(meta: dict[str, Any]) -> None:
    """Leave out the innermost module and the innermost source line."""
    if "nn_module_stack" in meta:
        meta["nn_module_stack"] = dict(list(meta["nn_module_stack"].items())[:-1])
    if frames := re.split(r'\n(?=\s*File ")', meta.get("stack_trace") or "")[:-1]:
        meta["stack_trace"] = "\n".join(frames)


def insert_weight(gm: GraphModule, place: Node, path: str, value: torch.Tensor, *, like: Node) -> Node:
    """Register a parameter under `path` (numbered on if that is taken) and read it before `place`.

    `like` is the ``get_attr`` node of a weight that went into it.
    """
    parameter = torch.nn.Parameter(value, requires_grad=False)
    owner, path = _owner(gm, path)
    owner.register_parameter(path.rpartition(".")[2], parameter)
    return _read(place, path, parameter, like)


def insert_buffer(gm: GraphModule, place: Node, path: str, value: torch.Tensor, *, like: Node) -> Node:
    """Register a buffer under `path` (numbered on if that is taken) and read it before `place`: codes, constants."""
    owner, path = _owner(gm, path)
    owner.register_buffer(path.rpartition(".")[2], value)
    return _read(place, path, value, like)


def put_weight(gm: GraphModule, node: Node, value: torch.Tensor) -> None:
    """Put another parameter where the ``get_attr`` node reads, under the same path, and bring ``val`` up to date."""
    owner, _, name = str(node.target).rpartition(".")
    setattr(gm.get_submodule(owner), name, value)
    mode = _fake_mode(node.graph.nodes)
    if mode is not None:
        node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    node.meta.pop("tensor_meta", None)
    for assertion in [user for user in node.users if is_assertion(user)]:
        node.graph.erase_node(assertion)


def _owner(gm: GraphModule, path: str) -> tuple[torch.nn.Module, str]:
    """Return the module that is to hold `path`, made where it is not there, and the path with a free name."""
    path = _free_path(gm, path)
    owner: torch.nn.Module = gm
    for part in path.split(".")[:-1]:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    return owner, path


def _read(place: Node, path: str, value: torch.Tensor, like: Node) -> Node:
    with place.graph.inserting_before(place):
        node = place.graph.get_attr(path)
    node.meta = {key: like.meta[key] for key in _PLACE if key in like.meta}
    mode = _fake_mode(place.graph.nodes)
    if mode is not None:
        node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    return node


def _fake_mode(among: Iterable[Node]) -> Any:
    """Return the mode of the graph's fake tensors, None where it has none."""
    values = (leaf for node in among for leaf in torch.utils._pytree.tree_leaves(node.meta.get("val")))
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


def _free_path(gm: GraphModule, path: str) -> str:
    parent, _, name = path.rpartition(".")
    number = 0
    while _is_taken(gm, path):
        number += 1
        path = f"{parent}_{number}.{name}".lstrip(".") if parent else f"{name}_{number}"
    return path


def _is_taken(gm: GraphModule, path: str) -> bool:
    owner: object = gm
    for part in path.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def weight(gm: GraphModule, node: Node) -> torch.Tensor:
    """Return the tensor that a ``get_attr`` node reads."""
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, torch.Tensor):
        raise PipelineError(f"{node.name} reads {node.target}, which is a {type(value).__name__} and no tensor")
    return value


def replace(old: Node, new: Node) -> None:
    """Say that `new` equals `old`: move all uses, hand on the id and other marks in ``custom``, erase `old`."""
    if "custom" in old.meta:
        new.meta["custom"] = dict(old.meta["custom"])
    for assertion in [user for user in old.users if is_assertion(user)]:
        old.graph.erase_node(assertion)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def merge(node: Node, other: Node) -> None:
    """Let `other`, which has the same value and keeps its id, take the place of `node`."""
    for assertion in [user for user in node.users if is_assertion(user)]:
        node.graph.erase_node(assertion)
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def erase_unused(candidates: Iterable[Node]) -> None:
    """Erase those of `candidates` that are still there and that nothing but assertions uses any more."""
    left = {node for node in candidates if not node._erased}
    while unused := [node for node in left if not users(node)]:
        for node in unused:
            for assertion in list(node.users):
                node.graph.erase_node(assertion)
            node.graph.erase_node(node)
        left.difference_update(unused)


def tidy(gm: GraphModule, touched: Iterable[Node]) -> None:
    """Finish a transform: drop weights nobody reads, and bring ``val`` up to date below the nodes that are new."""
    for node in [n for n in gm.graph.nodes if n.op == "get_attr" and not n.users]:
        gm.graph.erase_node(node)
    _drop_unread_weights(gm)
    gm.delete_all_unused_submodules()
    stale = set(touched)
    for node in gm.graph.nodes:
        if node.op != "call_function" or not any(source in stale for source in node.all_input_nodes):
            continue
        if tensor(node) is not None and _restride(node):
            stale.add(node)


def _drop_unread_weights(gm: GraphModule) -> None:
    read: set[int] = set()
    for one in gm.modules():
        for node in one.graph.nodes if isinstance(one, GraphModule) else ():
            if node.op in ("get_attr", "call_module"):
                value: Any = one
                for part in str(node.target).split("."):
                    value = getattr(value, part)
                read.update(map(id, value.parameters() if isinstance(value, torch.nn.Module) else (value,)))
    for module in list(gm.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in read:
                delattr(module, name)


def _restride(node: Node) -> bool:
    """Compute ``val`` anew; whether it changed."""
    was, now = tensor(node), evaluate(node)
    if was is None or not isinstance(now, torch.Tensor):
        return False
    if same_kind(was, now) and was.stride() == now.stride():
        return False
    node.meta["val"] = now
    node.meta.pop("tensor_meta", None)
    return True


def evaluate(node: Node) -> Any:
    """Return what the node's call gives on fake tensors. Raises PipelineError where an input has no ``val``."""

    def fake(source: Node) -> Any:
        if "val" not in source.meta:
            raise PipelineError(f"the metadata of {node.name} needs that of {source.name}, which has no meta['val']")
        return source.meta["val"]

    args: Any = map_arg(node.args, fake)
    kwargs: Any = map_arg(node.kwargs, fake)
    if not callable(node.target):
        raise PipelineError(f"{node.name} does not call a function")
    if node.target is operator.getitem:
        return args[0][args[1]]
    mode = _fake_mode(node.all_input_nodes or node.graph.nodes)
    if mode is None:
        raise PipelineError(f"no input of {node.name} is a fake tensor: its meta['val'] cannot be computed")
    with mode, torch.no_grad():
        return node.target(*args, **kwargs)

"""The calling convention of a graph: what its inputs and outputs are called, and which value goes to which."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from graphprobe.capturing import quiet
from graphprobe.errors import InputError


def input_paths(gm: GraphModule) -> dict[str, Node]:
    """Map 'input_ids', 'past.key_cache[0]', ... to placeholders; without a calling convention, their names."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is None or info.in_spec is None:
        return {str(n.target): n for n in placeholders}
    paths = spec_paths(info.in_spec, list(info.orig_args))
    if len(paths) != len(placeholders):
        return {str(n.target): n for n in placeholders}
    return dict(zip(paths, placeholders, strict=True))


def spec_paths(in_spec: Any, names: list[str]) -> list[str]:
    """Name every leaf of (args, kwargs): positional ones by the parameter they bind to."""
    out = []
    path: Any
    for path in leaf_paths(in_spec):
        if len(path) < 2:
            out.append(f"input[{path[0].idx}]")
            continue
        first = names[path[1].idx] if path[0].idx == 0 else str(path[1].key)
        out.append(first + suffix(path[2:]))
    return out


def leaf_paths(spec: Any) -> list[Any]:
    """Return the key path of every leaf of a tree spec; its classes are built from small tensors for that.

    A class that cannot be built so (a cache that checks its tensors) leaves plain positions.
    """
    try:
        with quiet():
            tree = pytree.tree_unflatten([torch.zeros(1, 1, 1, 1) for _ in range(spec.num_leaves)], spec)
            found = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    except Exception:
        found = []
    if len(found) == spec.num_leaves:
        return found
    return [(pytree.SequenceKey(i),) for i in range(spec.num_leaves)]


def output_paths(gm: GraphModule) -> dict[str, Node]:
    """Map 'logits', '[0]', 'past_key_values.layers[0]', ... to the nodes that are returned."""
    names, leaves = returned(gm)
    return {name: leaf for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Node)}


def constants(gm: GraphModule) -> dict[str, Any]:
    """Map the paths of what is returned and is no node to what it is: numbers, strings, None."""
    names, leaves = returned(gm)
    return {name: leaf for name, leaf in zip(names, leaves, strict=True) if not isinstance(leaf, Node)}


def returned(gm: GraphModule) -> tuple[list[str], list[Any]]:
    """Return the path of every leaf that the graph returns, and the leaves: nodes, and constants such as None."""
    output = next(n for n in gm.graph.nodes if n.op == "output")
    info = getattr(gm.graph._codegen, "pytree_info", None)
    returned = output.args[0]
    flat = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    if info is not None and info.out_spec is not None and info.out_spec.num_leaves == len(flat):
        paths = leaf_paths(info.out_spec)
    else:
        found, _ = pytree.tree_flatten_with_path(returned)
        paths, flat = [path for path, _ in found], [leaf for _, leaf in found]
    return [suffix(path).lstrip(".") or "output" for path in paths], flat


def placeholder_values(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Node, Any]:
    """Map placeholders to what they receive when the graph is called with these arguments; those left out are left out.

    Raises InputError where lists, dictionaries or caches among them have other numbers of entries than captured.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    info = getattr(gm.graph._codegen, "pytree_info", None)
    names = [str(n.target) for n in placeholders] if info is None else list(info.orig_args)
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    if info is None or info.in_spec is None:
        return {n: call[str(n.target)] for n in placeholders if str(n.target) in call}
    given = [call[name] for name in names if name in call]
    if len(given) < len(names):  # by path, for what is left out may have had several entries
        paths = {name + suffix(path): leaf for name in names if name in call
                 for path, leaf in pytree.tree_flatten_with_path(call[name])[0]}  # fmt: skip
        return {node: paths[path] for path, node in input_paths(gm).items() if path in paths}
    leaves = [leaf for value in given for leaf in pytree.tree_leaves(value)]
    if len(leaves) != len(placeholders):
        raise InputError(
            f"the graph takes {len(placeholders)} values in {', '.join(names)}, but {len(leaves)} were given: lists, "
            "dictionaries and caches must have as many entries as when it was captured"
        )
    return dict(zip(placeholders, leaves, strict=True))


def suffix(path: tuple[Any, ...]) -> str:
    """Show the path of a leaf below an argument: ``.layers[3]``."""
    out = ""
    for key in path:
        name = getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
        out += f".{name}" if isinstance(name, str) and name.isidentifier() else f"[{name!r}]"
    return out

"""The names by which whole values are kept: what a module returned, and the values inside it."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from graphprobe import nodes, provenance
from graphprobe.errors import InputError, nearest


def kept_names(gm: GraphModule, keep: str | Sequence[str]) -> dict[str, Node]:
    """Map every name that matches one of the globs `keep` to its node. Raises InputError for a glob without a match.

    Names are "model.layers.3.mlp.down_proj" (what the module returned) and "model.layers.3.mlp.down_proj/linear_21".
    """
    known = value_names(gm)
    found: dict[str, Node] = {}
    for glob in [keep] if isinstance(keep, str) else keep:
        matching = [name for name in known if name == glob or fnmatch.fnmatchcase(name, glob)]
        if not matching:
            raise InputError(
                f"keep={glob!r} matches nothing; names are like 'model.layers.0.mlp' (what a module returned) and "
                f"'model.layers.0.mlp/mul_3' (a value inside){nearest(glob, known)}"
            )
        found.update((name, known[name]) for name in matching)
    return found


def value_names(gm: GraphModule) -> dict[str, Node]:
    """Map all names to nodes: modules first, then every value as "module.path/node_name"."""
    names = module_outputs(gm)
    for node in gm.graph.nodes:
        if _is_value(node):
            path = provenance.module_path(node)
            names[f"{path}/{node.name}" if path else node.name] = node
    return names


@dataclass
class _Call:
    """One call of one module, and the values that leave it."""

    path: str
    number: str
    used: list[Node] = field(default_factory=list)  # by operations of other modules
    unclear: list[Node] = field(default_factory=list)  # by operations without a module
    output: list[Node] = field(default_factory=list)  # only by the graph's output


def module_outputs(gm: GraphModule) -> dict[str, Node]:
    """Map "module.path" to the node that this module returned, from the module stacks that export recorded.

    A value leaves a module where an operation outside uses it. Where several do, they are "path[0]", "path[1]" in the
    order of computation; a second call of the same module is "path@1". A module without operations has no entry.
    """
    calls: dict[str, _Call] = {}
    for node in gm.graph.nodes:
        if not _is_value(node):
            continue
        users = [(user.op == "output", {key for key, _ in provenance.module_calls(user)}) for user in node.users]
        for key, path in provenance.module_calls(node):
            outside = [(is_output, keys) for is_output, keys in users if key not in keys]
            if not path or not outside:
                continue
            call = calls.setdefault(key, _Call(path, key.partition("@")[2]))
            if any(keys for _, keys in outside):
                call.used.append(node)
            elif any(is_output for is_output, _ in outside):
                call.output.append(node)
            else:
                call.unclear.append(node)
    found: dict[str, Node] = {}
    for call in calls.values():
        name = f"{call.path}@{call.number}" if call.number else call.path
        values = call.used or call.unclear or call.output
        values = [node for node in values if not _is_input_again(node)] or values
        if len(values) == 1:
            found[name] = values[0]
        else:
            found.update((f"{name}[{index}]", node) for index, node in enumerate(values))
    return found


def _is_input_again(node: Node) -> bool:
    """Whether the node only passes a tensor on: ``x.float()`` of a float32 is x itself."""
    source = node.args[0] if node.args else None
    if not nodes.is_view(node) or not isinstance(source, Node):
        return False
    return nodes.shape(node) == nodes.shape(source)


def _is_value(node: Node) -> bool:
    if node.op not in ("call_function", "call_method", "call_module") or nodes.returns_nothing(node):
        return False
    if nodes.schema_name(node) in nodes.UNDEFINED:  # reserved memory: whatever was there before
        return False
    return nodes.tensor_val(node) is not None or nodes.makes_values(node)

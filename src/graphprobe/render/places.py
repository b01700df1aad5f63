"""In which module every operation of a graph lies, also where the graph itself does not say."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from graphprobe.records import GraphView, NodeView

#: The outermost numbered component of a module path: model.layers.3, transformer.h.11, or 0 in an nn.Sequential.
_NUMBERED = re.compile(r"^(?:(?P<stack>.*?)\.)?(?P<number>\d+)(?=\.|$)")
_FLAT = re.compile(r"^(?P<head>\w*?)_?(?P<stack>layers|layer|blocks|block|h)_(?P<number>\d+)_(?P<tail>\w+)$")
_BLOCKS = re.compile(r"^(self_attn|self_attention|attention|attn|mlp|ffn|feed_forward|experts|moe)_(?=\w)")


def layer_prefix(path: str) -> str:
    """Return the outermost numbered module a path lies in: 'model.layers.3'; '' where there is none."""
    found = _NUMBERED.match(path)
    return found.group(0) if found else ""


def inside(path: str, module: str) -> bool:
    """Whether a module path is `module` or lies in it; everything lies in the root ''."""
    return not module or path == module or path.startswith(module + ".")


_ELSEWHERE = ""  # neither in a block nor in a module
_SOME = 4  # more blocks than these around an operation say no more than these


def is_getitem(node: NodeView) -> bool:
    """Whether the operation takes one of the several results of another."""
    return node.op == "call_function" and node.target.rpartition(".")[2] == "getitem" and bool(node.inputs)


def places(graph: GraphView, weights: Collection[str]) -> dict[str, str]:
    """Give every operation a module path.

    A graph read from a text dump, or a node that a transform made, may carry none. Then the module of its weights
    counts; else the block of a layer (its attention, its MLP) that the values around it lie in; else the furthest
    layer among its inputs.
    """
    place: dict[str, str] = {}
    guessed: dict[str, NodeView] = {}
    by_name = graph.by_name
    for node in graph.nodes:
        known = node.module_path
        if is_getitem(node) and node.inputs[0] in place:
            known = place[node.inputs[0]]  # one of several results lies where they are made
            if node.inputs[0] in guessed:
                guessed[node.name] = node
        elif not known and not node.module_type and node.op.startswith("call_"):
            owners = [weight_module(by_name[i].target) for i in node.inputs if i in weights]
            known = next((o for o in owners if o), "")
            if not known:
                known = _furthest(place.get(i, "") for i in node.inputs)
                guessed[node.name] = node
        place[node.name] = known
    if guessed:
        _settle(graph, place, guessed)
    return place


def _settle(graph: GraphView, place: dict[str, str], guessed: dict[str, NodeView]) -> None:
    """Move each guessed operation into the block that lies both above and below it, or into the only one below it."""
    users: dict[str, list[str]] = {}
    for node in graph.nodes:
        for source in node.inputs:
            users.setdefault(source, []).append(node.name)
    above: dict[str, set[str]] = {}
    for name, node in guessed.items():
        above[name] = _blocks(node.inputs, above, place)
    below: dict[str, set[str]] = {}
    for name in reversed(guessed):
        below[name] = _blocks(users.get(name, ()), below, place)
    for name, node in guessed.items():
        both = (above[name] & below[name]) - {_ELSEWHERE}
        alone = below[name] - {_ELSEWHERE} if len(below[name]) == 1 else set()
        if is_getitem(node):
            place[name] = place[node.inputs[0]]
        elif len(both or alone) == 1:
            place[name] = (both or alone).pop()


def _blocks(names: Iterable[str], reached: dict[str, set[str]], place: dict[str, str]) -> set[str]:
    """Return the blocks that neighbours lie in, or that are `reached` through those of unsure place; some suffice."""
    found: set[str] = set()
    for name in names:
        found |= reached.get(name) or {_block(place.get(name, ""))}
        if len(found) > _SOME:
            return set(sorted(found)[:_SOME])
    return found


def _block(path: str) -> str:
    """Return the part of a layer that a path lies in: 'model.layers.3.mlp'; outside layers the module itself."""
    layer = layer_prefix(path)
    if not layer:
        return path or _ELSEWHERE
    return ".".join(path.split(".")[: layer.count(".") + 2]) if path != layer else _ELSEWHERE


def _furthest(paths: Iterable[str]) -> str:
    def depth(prefix: str) -> int:
        return int(prefix.rsplit(".", 1)[-1])

    return max((p for p in map(layer_prefix, paths) if p), key=depth, default="")


def weight_module(target: str) -> str:
    """Return the module that owns a weight: 'model.layers.0.self_attn.q_proj' for '….q_proj.weight'; '' if unclear.

    Names in which dots became underscores are split at the words that transformers use.
    """
    if "." in target:
        return target.rsplit(".", 1)[0]
    found = _FLAT.match(re.sub(r"^[pbc]_", "", target))
    if not found:
        return ""
    tail = re.sub(r"_(weight|bias)$", "", found["tail"])
    tail = _BLOCKS.sub(r"\1.", tail)
    return ".".join(part for part in (found["head"], found["stack"], found["number"], tail) if part)

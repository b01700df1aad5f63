"""The lint rules: each looks at one graph and yields its defects."""

from __future__ import annotations

import functools
import operator
import types
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.graphview import lacks_val
from graphprobe.linting.scope import Scope, attribute
from graphprobe.records import Lint

#: A recipe that works on any graph with recorded inputs; a test runs it.
_PROPAGATE = (
    "mode = inputs[0].fake_mode; mode.allow_non_fake_inputs = True; "
    "FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs), "
    'where inputs = [p.meta["val"] for p in gm.graph.find_nodes(op="placeholder")]'
)


def missing_val(scope: Scope) -> Iterator[Lint]:
    """Nodes that make a value and have no ``meta["val"]``."""
    for node in scope.gm.graph.nodes:
        if lacks_val(scope.gm, node):
            state = "is None" if "val" in node.meta else "is missing"
            found = scope.recomputed.values.get(node)
            known = f" (it is {describe(found)})" if found is not None else ""
            message = f'meta["val"] {state}: later transforms cannot know the shape and dtype{known}'
            yield scope.issue("missing-val", node, message, _how_to_set(scope, node))


def _how_to_set(scope: Scope, node: Node) -> str:
    if node.op == "placeholder":
        return 'node.meta["val"] = fake_mode.from_tensor(example), in the fake mode of the other inputs'
    if node.op == "get_attr":
        return f'node.meta["val"] = fake_mode.from_tensor(gm.{node.target}), in the fake mode of the inputs'
    why = scope.recomputed.failed.get(node, "")
    if "fake impl" in why or "UnsupportedOperator" in why or "DynamicOutputShape" in why:
        name = nodes.schema_name(node) or provenance.target_name(node)
        return f'give the operator a shape function with @torch.library.register_fake("{name}"), then {_PROPAGATE}'
    if scope.recomputed.values.get(node) is None:
        return 'mend its inputs first, then run the node on their meta["val"] under fake_mode'
    return (
        'set it where the transform makes the node, by running node.target on the meta["val"] of its inputs; or, for '
        f"the whole graph, {_PROPAGATE}"
    )


def stale_val(scope: Scope) -> Iterator[Lint]:
    """Nodes whose ``meta["val"]`` is not what the operator gives on its inputs."""
    again = scope.recomputed
    followers = len(again.stale - again.roots)
    for node in scope.gm.graph.nodes:
        if node in again.roots:
            more = f"; {followers} nodes after it follow from such values" if followers else ""
            message = f'meta["val"] says {describe(node.meta["val"])}, but it is {describe(again.values[node])}{more}'
            fix = f"set it whenever a transform changes target, args or weights; or, for the whole graph, {_PROPAGATE}"
            yield scope.issue("stale-val", node, message, fix)


def python_closure(scope: Scope) -> Iterator[Lint]:
    """Nodes that call a lambda, a closure or a partial: they have no name by which another process could find them."""
    for node in scope.gm.graph.nodes:
        kind = _nameless(node.target) if node.op == "call_function" else ""
        if kind:
            yield scope.issue(
                "python-closure",
                node,
                f"its target is {kind}: the graph cannot be saved and run elsewhere, exported, or compared by operator",
                "use operators in its place, or register it with @torch.library.custom_op and register_fake",
            )


def _nameless(target: Any) -> str:
    if isinstance(target, functools.partial):
        return "a functools.partial"
    if not isinstance(target, types.FunctionType):
        return ""
    if target.__name__ == "<lambda>":
        return "a lambda"
    return "a function defined inside another" if "<locals>" in target.__qualname__ else ""


def dead_node(scope: Scope) -> Iterator[Lint]:
    """Operations on data whose value reaches no output and changes nothing.

    Views, weights and small constants (an unused ``arange`` is left in every export of a language model) cost nothing
    and are left out.
    """
    live: set[Node] = set()
    for node in reversed(scope.gm.graph.nodes):
        keeps = node.op in ("output", "placeholder") or nodes.returns_nothing(node) or _has_effect(node)
        if keeps or any(user in live for user in node.users):
            live.add(node)
    data: set[Node] = set()
    for node in scope.gm.graph.nodes:
        if node.op in ("placeholder", "get_attr") or any(source in data for source in node.all_input_nodes):
            data.add(node)
        if node not in live and node in data and nodes.makes_values(node):
            message = "its value reaches no output: it is computed for nothing"
            yield scope.issue("dead-node", node, message, "gm.graph.eliminate_dead_code(); gm.recompile()")


def _has_effect(node: Node) -> bool:
    return nodes.is_mutating(node) or bool(node.is_impure())


def copied_id(scope: Scope) -> Iterator[Lint]:
    """Nodes that carry one id although they are not one operation taken apart: alignment takes them for the same.

    A decomposition gives its parts the id of the whole; such parts feed one another. Two equal operators of one shape
    and one id of which neither feeds the other come from copied metadata.
    """
    groups: dict[tuple[str, int], list[Node]] = defaultdict(list)
    for node in scope.gm.graph.nodes:
        found = provenance.node_id(node)
        if found is not None and (nodes.makes_values(node) or node.op in ("placeholder", "get_attr")):
            groups[found].append(node)
    for group in groups.values():
        first: dict[Any, Node] = {}
        for node in _ends(group) if len(group) > 1 else ():
            twin = first.setdefault(_sort(node), node)
            if twin is not node and not _same_read(twin, node):
                message = f"it carries the same graphprobe id as {twin.name}, but is another operation"
                fix = 'copy metadata without the id: drop "graphprobe" from meta["custom"] of the copy'
                yield scope.issue("copied-id", node, message, fix)


def _sort(node: Node) -> Any:
    """Return what two nodes share when one may be taken for the other."""
    if node.op in ("placeholder", "get_attr"):
        return node.op
    output = node.args[1] if node.target is operator.getitem else None
    return (node.target, output, nodes.shape(node))


def _ends(group: list[Node]) -> list[Node]:
    """Return the nodes of the group that feed, directly or through others without an id of their own, no other one."""
    members = set(group)
    return [node for node in group if not any(_reaches(user, members, 8) for user in node.users)]


def _reaches(node: Node, members: set[Node], steps: int) -> bool:
    if node in members:
        return True
    passes = nodes.is_view(node) or provenance.node_id(node) is None
    return steps > 0 and passes and any(_reaches(user, members, steps - 1) for user in node.users)


def _same_read(one: Node, other: Node) -> bool:
    return one.op == other.op and one.op in ("get_attr", "placeholder") and one.target == other.target


def orphaned_parameter(scope: Scope) -> Iterator[Lint]:
    """Parameters that no node reads: memory that is loaded, moved and kept for nothing."""
    if scope.path:
        return  # the root owns them all
    read = _tensors_read(scope.root)
    for path, parameter in scope.root.named_parameters():
        if id(parameter) not in read:
            size = parameter.numel() * parameter.element_size()
            home, _, name = path.rpartition(".")
            owner = f"gm.get_submodule({home!r})" if home else "gm"
            yield Lint(
                rule="orphaned-parameter",
                node=path,
                message=f"no node reads this parameter ({describe(parameter)}, {size:,} bytes)",
                fix=f"delattr({owner}, {name!r}) after the last reader is erased",
                target=path,
                module_path=home,
            )


def _tensors_read(root: torch.nn.Module) -> set[int]:
    read: set[int] = set()
    for _, gm in root.named_modules():
        for node in gm.graph.nodes if isinstance(gm, torch.fx.GraphModule) else ():
            if node.op == "get_attr":
                read.add(id(attribute(gm, str(node.target))))
            if node.op == "call_module":
                inner = attribute(gm, str(node.target))
                read |= {id(p) for p in inner.parameters()} if isinstance(inner, torch.nn.Module) else set()
    return read


def describe(value: Any) -> str:
    """Return 'bfloat16[2, 16, 64]' for a tensor, with strides where they are not the usual ones."""
    if isinstance(value, torch.Tensor):
        text = f"{nodes.dtype_name(value.dtype)}[{', '.join(str(d) for d in value.shape)}]"
        strides = tuple(str(s) for s in value.stride())
        return text if strides == _usual(value) else f"{text} with strides ({', '.join(strides)})"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(describe(part) for part in value)})"
    return str(value) if isinstance(value, (int, float, bool, torch.SymInt)) else type(value).__name__


def _usual(value: torch.Tensor) -> tuple[str, ...]:
    steps: list[Any] = []
    step: Any = 1
    for size in reversed(value.shape):
        steps.append(step)
        step = step * size
    return tuple(str(s) for s in reversed(steps))

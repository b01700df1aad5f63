"""What the changes are made with: copying a graph, asking a node, inserting and replacing nodes, new weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten
Change = Callable[[GraphModule, Node], "Node | None"]
Build = Callable[[Callable[..., Node]], Node]
END = 9223372036854775807


def fork(gm: GraphModule) -> GraphModule:
    """Copy the graph; the weights stay shared, ids and metadata are kept."""
    graph = torch.fx.Graph()
    made: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].meta = dict(node.meta)
        made[node].name = node.name
    graph._codegen = copy.copy(gm.graph._codegen)
    return GraphModule(gm, graph)


def schema(node: object) -> str:
    """Return 'aten::add.Tensor' or ''."""
    target = node.target if isinstance(node, Node) else None
    if isinstance(target, torch._ops.OpOverload):
        return f"{target._schema.name}.{target._overloadname}"
    return ""


def tensor(node: object) -> torch.Tensor | None:
    """Return the node's fake value where it is a tensor of known shape."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) and all(isinstance(d, int) for d in value.shape) else None


def shape(node: object) -> tuple[int, ...]:
    """Return the node's shape, () where it has none."""
    value = tensor(node)
    return tuple(value.shape) if value is not None else ()


def is_float(node: object) -> bool:
    """Whether a node makes a floating tensor."""
    value = tensor(node)
    return value is not None and value.is_floating_point()


def alike(x: object, y: object) -> bool:
    """Whether two nodes hold tensors of one shape and dtype."""
    mine, theirs = tensor(x), tensor(y)
    return mine is not None and theirs is not None and mine.shape == theirs.shape and mine.dtype == theirs.dtype


def computed(target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return the fake value of a call whose operands are nodes, or None where one has none."""
    missing = []

    def fake(node: Node) -> Any:
        if node.meta.get("val") is None:
            missing.append(node)
        return node.meta.get("val")

    given, named = torch.fx.map_arg(args, fake), torch.fx.map_arg(kwargs, fake)
    if missing:
        return None
    modes = [leaf.fake_mode for leaf in torch.utils._pytree.tree_leaves((given, named)) if hasattr(leaf, "fake_mode")]
    with modes[0] if modes else torch.device("meta"):
        return target(*given, **named)


def make(gm: GraphModule, like: Node, target: Callable[..., Any], args: Any, kwargs: Any) -> Node:
    """Add a call at the insertion point, with like's metadata but its id, and its own value."""
    made = gm.graph.call_function(target, args, kwargs)
    made.meta = {k: v for k, v in like.meta.items() if k not in ("custom", "val", "tensor_meta")}
    value = computed(target, args, kwargs)
    if value is not None:
        made.meta["val"] = value
    return made


def insert(gm: GraphModule, node: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Insert `target(node, *args)` after a node, for all its users."""
    users = list(node.users)
    with gm.graph.inserting_after(node):
        new = make(gm, node, target, (node, *args), kwargs)
    for user in users:
        user.replace_input_with(node, new)
    return new


def insert_before(gm: GraphModule, node: Node, operand: Node, target: Callable[..., Any], *args: Any) -> Node:
    """Insert `target(operand, *args)` before a node, for this node alone."""
    with gm.graph.inserting_before(node):
        new = make(gm, operand if operand.op == "call_function" else node, target, (operand, *args), {})
    node.replace_input_with(operand, new)
    return new


def substitute(gm: GraphModule, node: Node, build: Build) -> Node:
    """Replace a node by what `build(call)` makes; the new nodes carry no id."""
    with gm.graph.inserting_before(node):

        def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
            return make(gm, node, target, args, kwargs)

        new = build(call)
    new.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return new


def weight(gm: GraphModule, node: object) -> torch.Tensor | None:
    """Return the content of a weight that is read directly, or None."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, torch.Tensor) else None


def read(gm: GraphModule, node: Node, value: torch.Tensor, hint: str) -> Node:
    """Register a weight and read it before a node."""
    name = f"{hint}_{node.name}"
    gm.register_buffer(name, value)
    with gm.graph.inserting_before(node):
        made = gm.graph.get_attr(name)
    known = tensor(node)
    mode = getattr(known, "fake_mode", None)
    made.meta = {"val": mode.from_tensor(value) if mode is not None else value.to("meta")}
    return made


def replace_operand(node: Node, old: Node, new: Node) -> None:
    """Put another node in the place of an operand, of this node alone."""
    node.replace_input_with(old, new)


def weight_of(node: Node) -> Node | None:
    """Return the weight operand of a linear operation."""
    place = {"aten::linear.default": 1, "aten::addmm.default": 2, "aten::mm.default": 1, "aten::conv2d.default": 1,
             "aten::conv1d.default": 1}  # fmt: skip
    at = place.get(schema(node))
    operand = node.args[at] if at is not None else None
    return operand if isinstance(operand, Node) and operand.op == "get_attr" else None


def earlier(gm: GraphModule, node: Node) -> list[Node]:
    """Return the nodes before this one, the nearest first."""
    found: list[Node] = []
    for other in gm.graph.nodes:
        if other is node:
            break
        found.append(other)
    return found[::-1]

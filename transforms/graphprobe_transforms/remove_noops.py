"""Operations that change nothing, and values that nobody uses, go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from graphprobe import nodes
from graphprobe.pipeline import Applied, NotApplied, Outcome
from graphprobe_transforms import graphs
from graphprobe_transforms.graphs import Target, arg, aten


def _always(node: Node) -> bool:
    return True


def _same_kind(node: Node) -> bool:
    return graphs.same_kind(graphs.tensor(arg(node, 0)), graphs.tensor(node))


def _keeps_memory(node: Node) -> bool:
    was, now = graphs.tensor(arg(node, 0)), graphs.tensor(node)
    return _same_kind(node) and was is not None and now is not None and was.stride() == now.stride()


def _is_contiguous(node: Node) -> bool:
    value = graphs.tensor(arg(node, 0))
    return value is not None and not node.kwargs and len(node.args) == 1 and value.is_contiguous()


def _is_off(node: Node) -> bool:
    return arg(node, 2) is False or arg(node, 1) == 0.0


def _times_one(node: Node) -> bool:
    return arg(node, 1) == 1 and not isinstance(arg(node, 1), Node) and not node.kwargs and _keeps_memory(node)


def _plus_zero(node: Node) -> bool:
    value = graphs.tensor(node)  # of floating numbers, -0.0 + 0 is 0.0
    integral = value is not None and not value.is_floating_point()
    return integral and arg(node, 1) == 0 and not isinstance(arg(node, 1), Node) and _keeps_memory(node)


#: Operator -> whether a call of it gives its first argument back.
NOOPS: dict[Target, Callable[[Node], bool]] = {
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.to.dtype: _keeps_memory,
    aten.to.dtype_layout: _keeps_memory,
    aten.to.device: _keeps_memory,
    aten._to_copy.default: _keeps_memory,
    aten.clone.default: _keeps_memory,
    aten.contiguous.default: _is_contiguous,
    aten.view.default: _same_kind,
    aten.reshape.default: _same_kind,
    aten.expand.default: _same_kind,
    aten.slice.Tensor: _same_kind,
    aten.dropout.default: _is_off,
    aten.mul.Tensor: _times_one,
    aten.div.Tensor: _times_one,
    aten.add.Tensor: _plus_zero,
    aten.sub.Tensor: _plus_zero,
}


@dataclass(frozen=True)
class RemoveNoops:
    """Remove casts, views, dropouts and arithmetic that change nothing, transposes there and back, and dead nodes.

    Values that something writes into are left alone. Tried on llama, qwen2, qwen3, mistral, gpt2 and bert.
    """

    name: ClassVar[str] = "remove_noops"
    stage: ClassVar[str] = "post_export"

    def apply(self, gm: GraphModule) -> Outcome:
        """Remove every such node from `gm`."""
        written = graphs.written(gm)
        removed: list[str] = []
        touched: list[Node] = []
        for node in list(gm.graph.nodes):
            source = stands_for(node)
            if source is None or node in written or source in written or _is_own_output(node, source):
                continue
            removed.append(node.name)
            touched.append(source)
            graphs.merge(node, source)
        removed += _drop_dead(gm)
        if not removed:
            return NotApplied("every operation changes something, and every value is used")
        graphs.tidy(gm, touched)
        return Applied(tuple(removed))


def stands_for(node: Node) -> Node | None:
    """Return the node whose value `node` gives back unchanged, or None."""
    if graphs.is_call(node, aten.transpose.int):
        return _transposed_twice(node)
    changes_nothing = NOOPS.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]
    source = arg(node, 0)
    if changes_nothing is None or not isinstance(source, Node) or not changes_nothing(node):
        return None
    was, now = graphs.tensor(source), graphs.tensor(node)
    return source if was is not None and now is not None and was.device == now.device else None


def _transposed_twice(node: Node) -> Node | None:
    inner = arg(node, 0)
    if not graphs.is_call(inner, aten.transpose.int):
        return None
    value = graphs.tensor(node)
    if value is None:
        return None
    pairs = [{arg(n, i) % value.dim() for i in (1, 2)} for n in (node, inner)]
    source: Any = arg(inner, 0)
    return source if pairs[0] == pairs[1] else None


def _is_own_output(node: Node, source: Node) -> bool:
    # without the node the graph would hand out its input or weight itself, or one tensor twice
    held = source.op in ("placeholder", "get_attr") or any(user.op == "output" for user in source.users)
    return held and any(user.op == "output" for user in node.users)


def _drop_dead(gm: GraphModule) -> list[str]:
    names = []
    for node in reversed(list(gm.graph.nodes)):
        unused = node.op == "call_function" and not node.users and not node.is_impure()
        if unused and not nodes.is_mutating(node) and not nodes.returns_nothing(node):
            names.append(node.name)
            gm.graph.erase_node(node)
    return names[::-1]

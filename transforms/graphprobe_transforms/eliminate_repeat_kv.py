"""Keys and values repeated for groups of query heads are no longer repeated: the attention operator shares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from graphprobe.pipeline import NotApplied, Outcome
from graphprobe_transforms import graphs, matching
from graphprobe_transforms.graphs import arg, aten, is_call


@dataclass(frozen=True)
class _Match:
    """attention(query, repeat(key), repeat(value))."""

    attention: Node
    key: Node
    value: Node
    inside: tuple[Node, ...]


@dataclass(frozen=True)
class EliminateRepeatKv:
    """Drop repeat_kv before attention and let the operator group heads; `where` is a glob on the attention's path.

    It wants attention in one operator: run eager_attention_to_sdpa before it, or capture with sdpa. Tried on llama,
    qwen2, qwen3 and mistral with fewer key than query heads; gpt2 and bert have as many.
    """

    where: str = "*"
    name: ClassVar[str] = "eliminate_repeat_kv"
    stage: ClassVar[str] = "pattern_matcher"

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        nothing = (
            f"there is no scaled_dot_product_attention in a module that matches {self.where!r}: "
            "run eager_attention_to_sdpa before this"
        )
        found = matching.anchors(gm, self.where, aten.scaled_dot_product_attention.default)
        return matching.rewrite(gm, found, match, _fuse, nothing)


def match(attention: Node) -> _Match | NotApplied:
    """Match the repetitions above one attention, or say what is in the way."""
    if attention.kwargs.get("enable_gqa") or len(attention.args) > 7:
        return NotApplied("the attention groups its heads already", attention.name)
    if lost := matching.unknown(*attention.args[:3]):
        return lost
    query = graphs.tensor(arg(attention, 0))
    sides = [_repeated(arg(attention, i)) for i in (1, 2)]
    if query is None or any(side is None for side in sides):
        return NotApplied("keys and values are not both repeated", attention.name)
    (key, above_key), (value, above_value) = (side for side in sides if side is not None)
    shapes = [graphs.tensor(n) for n in (key, value)]
    heads = {s.shape[1] for s in shapes if s is not None and s.dim() == 4}
    if len(heads) != 1 or query.dim() != 4 or query.shape[1] % heads.pop():
        return NotApplied("the heads of queries are no multiple of those of keys and values", attention.name)
    return _Match(attention, key, value, (*above_key, *above_value))


def _repeated(result: Any) -> tuple[Node, tuple[Node, ...]] | None:
    """Return (x, nodes between) where the value is x with every head repeated: unsqueeze(2), expand, reshape."""
    if not is_call(result, aten.reshape.default, aten.view.default):
        return None
    clone = arg(result, 0)
    expanded = arg(clone, 0) if is_call(clone, aten.clone.default) else clone
    inserted = arg(expanded, 0) if is_call(expanded, aten.expand.default) else None
    if not is_call(inserted, aten.unsqueeze.default) or arg(inserted, 1) != 2:
        return None
    x = arg(inserted, 0)
    was, wide, now = (graphs.tensor(n) for n in (x, expanded, result))
    if was is None or wide is None or now is None or was.dim() != 4 or wide.dim() != 5 or now.dim() != 4:
        return None
    repeats_heads = wide.shape[:2] == was.shape[:2] and wide.shape[3:] == was.shape[2:]
    if not repeats_heads or now.shape[1] != was.shape[1] * wide.shape[2] or now.shape[2:] != was.shape[2:]:
        return None
    between = (inserted, expanded, clone, result) if clone is not expanded else (inserted, expanded, result)
    return x, between


def _fuse(gm: GraphModule, m: _Match) -> list[Node]:
    args = (arg(m.attention, 0), m.key, m.value, *m.attention.args[3:])
    options = {**m.attention.kwargs, "enable_gqa": True}
    fused = graphs.insert(m.attention, aten.scaled_dot_product_attention.default, args, options, like=m.attention)
    graphs.replace(m.attention, fused)
    graphs.erase_unused(m.inside)
    return [fused]

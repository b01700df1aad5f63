"""Attention written out (scores, scale, mask, softmax, weighted sum) becomes one ``scaled_dot_product_attention``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from graphprobe.pipeline import NotApplied, Outcome
from graphprobe_transforms import graphs, matching
from graphprobe_transforms.graphs import arg, aten, is_call


@dataclass(frozen=True)
class _Match:
    """y = dropout(cast(softmax(q k^T * scale + mask))) v, with a dropout that is switched off."""

    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float
    softmax: Node
    result: Node
    inside: tuple[Node, ...]  # in graph order, without the result


@dataclass(frozen=True)
class EagerAttentionToSdpa:
    """Replace eager attention of transformers by the fused operator; `where` is a glob on the module path."""

    where: str = "*"
    name: ClassVar[str] = "eager_attention_to_sdpa"
    stage: ClassVar[str] = "pattern_matcher"
    makes: ClassVar[tuple[str, ...]] = ("aten.scaled_dot_product_attention.default",)

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        softmaxes = matching.anchors(gm, self.where, aten.softmax.int)
        nothing = f"there is no aten.softmax in a module that matches {self.where!r}"
        return matching.rewrite(gm, softmaxes, match, _fuse, nothing)


def match(softmax: Node) -> _Match | NotApplied:
    """Match the attention around one softmax, or say what is in the way."""
    above = _scores(softmax)
    if isinstance(above, NotApplied):
        return above
    product, mask, scale, upper = above
    below = _weighted_sum(softmax)
    if isinstance(below, NotApplied):
        return below
    result, lower = below
    transposed = arg(product, 1)
    if not is_call(transposed, aten.transpose.int) or not _swaps_last_two(transposed):
        return NotApplied("the keys are not transposed in the last two dimensions", product.name)
    m = _Match(
        query=arg(product, 0),
        key=arg(transposed, 0),
        value=arg(result, 1),
        mask=mask,
        scale=scale,
        softmax=softmax,
        result=result,
        inside=(transposed, product, *upper, softmax, *lower),
    )
    return _checked(m)


def _scores(softmax: Node) -> tuple[Node, Node | None, float, list[Node]] | NotApplied:
    """Walk up from the softmax: (q k^T, mask, scale, the nodes between)."""
    if arg(softmax, 1) not in (-1, _rank(softmax) - 1):
        return NotApplied("softmax is not over the last dimension", softmax.name)
    node, mask, scale = arg(softmax, 0), None, 1.0
    between: list[Node] = []
    if is_call(node, aten.add.Tensor) and isinstance(arg(node, 1), Node) and not node.kwargs:
        between.insert(0, node)
        node, mask = arg(node, 0), arg(node, 1)
    if is_call(node, aten.mul.Tensor, aten.div.Tensor) and isinstance(arg(node, 1), (int, float)):
        between.insert(0, node)
        scale = float(arg(node, 1)) if node.target is aten.mul.Tensor else 1.0 / float(arg(node, 1))
        node = arg(node, 0)
    if not is_call(node, aten.matmul.default):
        return NotApplied("above the softmax is no product of queries and keys", softmax.name)
    return node, mask, scale, between


def _weighted_sum(softmax: Node) -> tuple[Node, list[Node]] | NotApplied:
    """Walk down from the softmax: (the product with the values, the nodes between)."""
    node, between = softmax, []
    while (user := graphs.only_user(node, aten.to.dtype, aten.dropout.default)) is not None:
        if user.target is aten.dropout.default and arg(user, 1) != 0.0 and arg(user, 2):
            return NotApplied("dropout is switched on", user.name)
        between.append(user)
        node = user
    result = graphs.only_user(node, aten.matmul.default)
    if result is None or arg(result, 0) is not node:
        return NotApplied("the probabilities are not multiplied with values alone", node.name)
    return result, between


def _checked(m: _Match) -> _Match | NotApplied:
    if lost := matching.unknown(m.query, m.key, m.value, m.mask, m.softmax, m.result):
        return lost
    query, result = graphs.tensor(m.query), graphs.tensor(m.result)
    if query is None or result is None or query.dim() != 4:
        return NotApplied("queries are not [batch, heads, tokens, size]", m.result.name)
    if any(value is None or value.shape[:-2] != query.shape[:-2] for value in map(graphs.tensor, (m.key, m.value))):
        return NotApplied("keys or values have another batch size or number of heads than queries", m.result.name)
    if graphs.shape(m.inside[1]) != graphs.shape(m.softmax):
        return NotApplied("the mask makes the scores larger", m.softmax.name)
    if m.value in m.inside:
        return NotApplied("the values are made of the scores", m.result.name)
    shared = [n for n in m.inside[1:] if len(graphs.users(n)) != 1]
    if shared:
        return NotApplied("an intermediate value is used elsewhere", shared[0].name)
    if any(value is None or value.dtype != query.dtype for value in map(graphs.tensor, (m.key, m.value, m.result))):
        return NotApplied("queries, keys, values and result have different dtypes", m.result.name)
    mask = graphs.tensor(m.mask)
    if m.mask is not None and (mask is None or mask.dtype != query.dtype or mask.dim() > 4):
        return NotApplied("the mask is not of the dtype of the queries", m.mask.name)
    return m


def _fuse(gm: GraphModule, m: _Match) -> list[Node]:
    options: dict[str, Any] = {"attn_mask": m.mask, "scale": m.scale}
    target = aten.scaled_dot_product_attention.default
    fused = graphs.insert(m.result, target, (m.query, m.key, m.value), options, like=m.result)
    graphs.replace(m.result, fused)
    graphs.erase_unused(m.inside)
    return [fused]


def _rank(node: Node) -> int:
    value = graphs.tensor(node)
    return value.dim() if value is not None else 4


def _swaps_last_two(transposed: Node) -> bool:
    rank = _rank(transposed)
    return {arg(transposed, 1) % rank, arg(transposed, 2) % rank} == {rank - 1, rank - 2}

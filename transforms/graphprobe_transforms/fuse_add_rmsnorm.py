"""A residual addition and the RMSNorm of its sum become one operator with two results."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from graphprobe.pipeline import NotApplied, Outcome
from graphprobe_transforms import graphs, matching, ops
from graphprobe_transforms.graphs import arg, aten, is_call

assert ops.NAMESPACE  # importing it registers the operators


@dataclass(frozen=True)
class _Match:
    """norm = rms_norm(total), total = x + residual."""

    x: Node
    residual: Node
    weight: Node
    eps: float
    total: Node
    norm: Node


@dataclass(frozen=True)
class FuseAddRmsNorm:
    """Fuse a residual addition with the norm that follows; `where` is a glob on the module path of the norm.

    It wants norms in one operator: run fuse_rmsnorm before it. Tried on llama, qwen2, qwen3 and mistral; gpt2 and bert
    have layer norms.
    """

    where: str = "*"
    name: ClassVar[str] = "fuse_add_rmsnorm"
    stage: ClassVar[str] = "post_load_fusion"
    makes: ClassVar[tuple[str, ...]] = ("graphprobe_transforms.add_rms_norm.default",)

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        norms = matching.anchors(gm, self.where, aten.rms_norm.default)
        nothing = f"there is no aten.rms_norm in a module that matches {self.where!r}: run fuse_rmsnorm before this"
        return matching.rewrite(gm, norms, match, _fuse, nothing)


def match(norm: Node) -> _Match | NotApplied:
    """Match the sum above one norm, or say what is in the way."""
    total, weight, eps = arg(norm, 0), arg(norm, 2), arg(norm, 3)
    if not isinstance(weight, Node) or not isinstance(eps, float) or len(arg(norm, 1)) != 1:
        return NotApplied("the norm has no weight or no eps, or is over several dimensions", norm.name)
    if not is_call(total, aten.add.Tensor) or total.kwargs or not all(isinstance(a, Node) for a in total.args[:2]):
        return NotApplied("what is normalised is not the sum of two values", norm.name)
    x, residual = arg(total, 0), arg(total, 1)
    if lost := matching.unknown(x, residual, total):
        return lost
    values = [graphs.tensor(n) for n in (x, residual, total)]
    if not all(graphs.same_kind(value, values[0]) for value in values):
        return NotApplied("the sum broadcasts or changes the dtype", total.name)
    if any(is_call(user, aten.rms_norm.default) and user is not norm for user in total.users):
        return NotApplied("the sum is normalised twice", total.name)
    if weight.op != "get_attr" and not weight < total:
        return NotApplied("the weight is computed after the sum", weight.name)
    return _Match(x, residual, weight, eps, total, norm)


def _fuse(gm: GraphModule, m: _Match) -> list[Node]:
    target = torch.ops.graphprobe_transforms.add_rms_norm.default
    if not m.weight < m.total:
        m.total.prepend(m.weight)  # a weight is read anywhere
    # where the sum was made: others may use it before it is normalised
    both = graphs.insert(m.total, target, (m.x, m.residual, m.weight, m.eps), like=m.norm)
    norm = graphs.insert(m.total, operator.getitem, (both, 0), like=m.norm)
    total = graphs.insert(m.total, operator.getitem, (both, 1), like=m.total)
    graphs.replace(m.norm, norm)
    graphs.replace(m.total, total)
    return [norm, total]

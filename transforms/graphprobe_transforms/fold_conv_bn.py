"""A batch norm behind a convolution is folded into the convolution's weight and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from graphprobe.pipeline import NotApplied, Outcome
from graphprobe.provenance import module_path
from graphprobe_transforms import graphs, matching
from graphprobe_transforms.graphs import arg, aten, is_call

_CONVOLUTIONS = tuple(
    overload for conv in (aten.conv1d, aten.conv2d, aten.conv3d) for overload in (conv.default, conv.padding)
)


@dataclass(frozen=True)
class _Match:
    """norm = batch_norm(conv(x, weight, bias)), with running statistics."""

    conv: Node
    norm: Node


@dataclass(frozen=True)
class FoldConvBn:
    """Fold batch norms in evaluation mode into convolutions; `where` is a glob on the module path of the norm.

    Tried on a small convolutional net and on resnet of transformers; language models have no batch norms.
    """

    where: str = "*"
    name: ClassVar[str] = "fold_conv_bn"
    stage: ClassVar[str] = "post_load_fusion"

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        norms = matching.anchors(gm, self.where, aten.batch_norm.default)
        nothing = f"there is no aten.batch_norm in a module that matches {self.where!r}"
        return matching.rewrite(gm, norms, match, _fuse, nothing)


def match(norm: Node) -> _Match | NotApplied:
    """Match the convolution above one batch norm, or say what is in the way."""
    conv = arg(norm, 0)
    if not is_call(conv, *_CONVOLUTIONS):
        return NotApplied("what is normalised is no convolution, or a transposed one", norm.name)
    if arg(norm, 5):
        return NotApplied("the norm takes its statistics from the batch (training mode)", norm.name)
    if len(graphs.users(conv)) != 1:
        return NotApplied("the convolution's result is used elsewhere", conv.name)
    operands = [arg(conv, 1), arg(conv, 2), *(arg(norm, i) for i in range(1, 5))]
    if any(isinstance(n, Node) and n.op != "get_attr" for n in operands) or arg(norm, 3) is None:
        return NotApplied("a weight or statistic is computed, not stored", norm.name)
    return _Match(conv, norm)


def _fuse(gm: GraphModule, m: _Match) -> list[Node]:
    weight, bias = folded(gm, m)
    path, source = module_path(m.conv) or m.conv.name, arg(m.conv, 1)
    args = (
        arg(m.conv, 0),
        graphs.insert_weight(gm, m.norm, f"{path}.folded_weight", weight, like=source),
        graphs.insert_weight(gm, m.norm, f"{path}.folded_bias", bias, like=source),
        *m.conv.args[3:],
    )
    target = m.conv.target
    assert callable(target)
    fused = graphs.insert(m.norm, target, args, dict(m.conv.kwargs), like=m.conv)
    graphs.replace(m.norm, fused)
    graphs.erase_unused([m.conv])
    return [fused]


def folded(gm: GraphModule, m: _Match) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W gamma / sqrt(var + eps) and (b - mean) gamma / sqrt(var + eps) + beta, computed in float64."""

    def read(node: Node | None) -> torch.Tensor | None:
        return None if node is None else graphs.weight(gm, node).detach().double()

    weight, bias = read(arg(m.conv, 1)), read(arg(m.conv, 2))
    gamma, beta, mean, var = (read(arg(m.norm, i)) for i in range(1, 5))
    assert weight is not None and mean is not None and var is not None  # `match` has seen them
    factor = torch.rsqrt(var + arg(m.norm, 7))
    factor = factor if gamma is None else factor * gamma
    shift = (-mean if bias is None else bias - mean) * factor
    shift = shift if beta is None else shift + beta
    dtype = graphs.weight(gm, arg(m.conv, 1)).dtype
    return (weight * factor.reshape(-1, *[1] * (weight.dim() - 1))).to(dtype), shift.to(dtype)

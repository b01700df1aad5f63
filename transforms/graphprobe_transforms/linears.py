"""Linear layers as exported graphs hold them: ``aten.linear``, and ``aten.addmm`` for layers that keep W transposed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from graphprobe.provenance import module_path
from graphprobe_transforms import graphs
from graphprobe_transforms.graphs import arg, aten, is_call


@dataclass(frozen=True)
class Linear:
    """y = x W^T + bias, W being [out, in]; `transposed` if the graph stores W^T."""

    node: Node
    x: Node
    source: Node  # reads the weight
    bias: Node | None
    transposed: bool

    @property
    def path(self) -> str:
        """The module's path, the node's name where there is none."""
        return module_path(self.node) or self.node.name

    def weight(self, gm: GraphModule) -> torch.Tensor:
        """Return W, [out, in]."""
        stored = graphs.weight(gm, self.source).detach()
        return stored.t() if self.transposed else stored

    def use(self, weight: Node, x: Node | None = None) -> Node:
        """Let the layer take another weight [out, in] and, if given, another input; return its node."""
        if self.transposed:
            turned = graphs.insert(self.node, aten.t.default, (weight,), like=self.node)
            self.node.args = (self.node.args[0], x or self.x, turned, *self.node.args[3:])
        else:
            self.node.args = (x or self.x, weight, *self.node.args[2:])
        return self.node


def as_linear(node: Node) -> Linear | None:
    """See a node as a linear layer, None where it is none."""
    if is_call(node, aten.linear.default):
        return Linear(node, arg(node, 0), arg(node, 1), arg(node, 2), False)
    if is_call(node, aten.addmm.default) and not node.kwargs:
        return Linear(node, arg(node, 1), arg(node, 2), arg(node, 0), True)
    return None


def stored_linears(gm: GraphModule, where: str, skip: Sequence[str]) -> Iterator[Linear]:
    """Yield the layers whose floating weight is stored, in modules that match `where` and none of the globs `skip`."""
    for node in gm.graph.nodes:
        layer = as_linear(node)
        if layer is None or layer.source.op != "get_attr" or not graphs.is_at(layer.path, where):
            continue
        value = graphs.tensor(layer.source)
        floating = value is not None and value.dim() == 2 and value.is_floating_point() and value.dtype.itemsize > 1
        if floating and not any(fnmatch.fnmatchcase(layer.path, glob) for glob in skip):
            yield layer

"""Linear layers are cut into the shards of a tensor-parallel group."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from graphprobe.pipeline import Applied, NotApplied, Outcome
from graphprobe_transforms import graphs, ops
from graphprobe_transforms.graphs import Target, aten
from graphprobe_transforms.linears import Linear, stored_linears

assert ops.NAMESPACE  # importing it registers the operators

#: Layers whose outputs are cut, and layers whose inputs are cut, by the names that transformers gives them.
COLUMN = (
    "*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj", "*.c_attn", "*.c_fc",
    "*.query", "*.key", "*.value", "*.intermediate.dense",
)  # fmt: skip
ROW = ("*.o_proj", "*.down_proj", "*.c_proj", "*.output.dense")


@dataclass(frozen=True)
class ShardLinears:
    """Shard linear layers over `world` ranks (Shoeybi et al. 2019): by columns with an all_gather, by rows with an
    all_reduce.

    The work of all ranks is written into one graph, rank after rank, so that what the ranks compute together can be
    compared without starting them: collectives take the list of what every rank holds. `column` and `row` are globs on
    the layer's module path. Tried on llama, qwen2, qwen3, mistral, gpt2 and bert.
    """

    world: int = 2
    column: tuple[str, ...] = COLUMN
    row: tuple[str, ...] = ROW
    name: ClassVar[str] = "shard_linears"
    stage: ClassVar[str] = "sharding"
    makes: ClassVar[tuple[str, ...]] = (
        "graphprobe_transforms.all_reduce.default",
        "graphprobe_transforms.all_gather.default",
    )

    def __post_init__(self) -> None:
        if self.world < 2:
            raise ValueError(f"world is {self.world}, but at least 2 ranks are needed to shard")

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        layers = [layer for layer in stored_linears(gm, "*", ()) if self._way(layer)]
        if not layers:
            return NotApplied("no linear layer with a stored weight has a name that is to be sharded")
        fit = [layer for layer in layers if self._divides(gm, layer)]
        if not fit:
            return NotApplied(f"its sizes are not divisible by {self.world} ranks", layers[0].node.name)
        made = [self._shard(gm, layer) for layer in fit]
        names = tuple(layer.path for layer in fit)
        graphs.tidy(gm, made)
        return Applied(names)

    def _way(self, layer: Linear) -> str:
        path = f".{layer.path}"  # so that *.q_proj is one of the model's own, too
        if any(fnmatch.fnmatchcase(path, glob) for glob in self.row):
            return "row"
        return "column" if any(fnmatch.fnmatchcase(path, glob) for glob in self.column) else ""

    def _divides(self, gm: GraphModule, layer: Linear) -> bool:
        size = layer.weight(gm).shape[0 if self._way(layer) == "column" else 1]
        return size % self.world == 0

    def _shard(self, gm: GraphModule, layer: Linear) -> Node:
        fused = self._column(gm, layer) if self._way(layer) == "column" else self._row(gm, layer)
        graphs.replace(layer.node, fused)
        return fused

    def _column(self, gm: GraphModule, layer: Linear) -> Node:
        weights = layer.weight(gm).chunk(self.world, 0)
        biases = None if layer.bias is None else graphs.weight(gm, layer.bias).detach().chunk(self.world)
        parts = []
        for rank, weight in enumerate(weights):
            bias = None
            if biases is not None and layer.bias is not None:
                bias = _store(gm, layer, f"bias_rank{rank}", biases[rank], layer.bias)
            parts.append(_linear(gm, layer, rank, layer.x, weight, bias))
        dim = len(_shape(layer.node)) - 1
        return _call(layer, torch.ops.graphprobe_transforms.all_gather.default, parts, dim)

    def _row(self, gm: GraphModule, layer: Linear) -> Node:
        weights = layer.weight(gm).chunk(self.world, 1)
        dim, size = len(_shape(layer.x)) - 1, int(weights[0].shape[1])
        parts = []
        for rank, weight in enumerate(weights):
            cut = _call(layer, aten.slice.Tensor, layer.x, dim, rank * size, (rank + 1) * size)
            parts.append(_linear(gm, layer, rank, cut, weight, None))
        total = _call(layer, torch.ops.graphprobe_transforms.all_reduce.default, parts)
        return total if layer.bias is None else _call(layer, aten.add.Tensor, total, layer.bias)


def _linear(gm: GraphModule, layer: Linear, rank: int, x: Node, weight: torch.Tensor, bias: Node | None) -> Node:
    stored = _store(gm, layer, f"weight_rank{rank}", weight, layer.source)
    return _call(layer, aten.linear.default, x, stored, *([] if bias is None else [bias]))


def _store(gm: GraphModule, layer: Linear, name: str, value: torch.Tensor, like: Node) -> Node:
    return graphs.insert_weight(gm, layer.node, f"{layer.path}.{name}", value.contiguous().clone(), like=like)


def _call(layer: Linear, target: Target, *args: object) -> Node:
    return graphs.insert(layer.node, target, args, like=layer.node)


def _shape(node: Node) -> torch.Size:
    value = graphs.tensor(node)
    assert value is not None  # a linear layer's input and result are tensors
    return value.shape

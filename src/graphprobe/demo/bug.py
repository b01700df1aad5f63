"""The planted bug: a QKV fusion that mixes up two of the three slices in one layer."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from graphprobe import provenance
from graphprobe.errors import PipelineError
from graphprobe.pipeline import Applied, Outcome, Pipeline


@dataclass(frozen=True)
class FuseQkvWithBug:
    """The installed `fuse_qkv`, after which layer `layer` takes its keys for values and its values for keys."""

    layer: int
    name: ClassVar[str] = "fuse_qkv_with_bug"
    stage: ClassVar[str] = "post_load_fusion"

    def apply(self, gm: GraphModule) -> Outcome:
        """Fuse, then read slice 2 where slice 1 is meant and the other way round. Raises PipelineError."""
        (honest,) = Pipeline.parse("fuse_qkv").transforms
        outcome = honest.apply(gm)
        slices = [node for node in gm.graph.nodes if self._is_slice(node)]
        if not isinstance(outcome, Applied) or len(slices) != 3:
            raise PipelineError(f"layer {self.layer} has no fused query, key and value projection to plant a bug in")
        for node, index in zip(slices, (0, 2, 1), strict=True):
            node.args = (node.args[0], index)
        return outcome

    def _is_slice(self, node: Node) -> bool:
        source = node.args[0] if node.target is operator.getitem else None
        return (
            isinstance(source, Node)
            and source.target is torch.ops.aten.split_with_sizes.default
            and f".layers.{self.layer}." in f".{provenance.module_path(source)}."
        )

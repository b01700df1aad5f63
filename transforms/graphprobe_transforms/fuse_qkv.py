"""Three projections of one input become one: a linear with the weights stacked, and a split of its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from graphprobe.pipeline import Applied, NotApplied, Outcome
from graphprobe_transforms import graphs, matching
from graphprobe_transforms.graphs import arg, aten, is_call
from graphprobe_transforms.stacking import obstacle, parent, stack


@dataclass(frozen=True)
class FuseQkv:
    """Fuse the query, key and value projections of attention; `where` is a glob on the attention's module path."""

    where: str = "*"
    name: ClassVar[str] = "fuse_qkv"
    stage: ClassVar[str] = "post_load_fusion"
    makes: ClassVar[tuple[str, ...]] = ("aten.split_with_sizes.default",)

    def apply(self, gm: GraphModule) -> Outcome:
        """Replace every match in `gm`."""
        groups = {group[0]: group for group in triples(gm, self.where)}
        nothing = f"no three linears share an input in a module that matches {self.where!r}"

        def match(first: Node) -> tuple[Node, ...] | NotApplied:
            why = obstacle(groups[first])
            return NotApplied(why, first.name) if why else groups[first]

        outcome = matching.rewrite(gm, groups, match, lambda gm, group: stack(gm, group, "qkv_proj"), nothing)
        if isinstance(outcome, Applied):  # the match is the attention, not its first projection
            return Applied(tuple(path.rpartition(".")[0] or path for path in outcome.matches), outcome.misses)
        return outcome


def triples(gm: GraphModule, where: str) -> list[tuple[Node, ...]]:
    """Return the groups of exactly three linears that share their input and the module around them, in graph order."""
    siblings: dict[tuple[Node, str], list[Node]] = {}
    for node in gm.graph.nodes:
        if is_call(node, aten.linear.default) and graphs.is_at(parent(node), where):
            siblings.setdefault((arg(node, 0), parent(node)), []).append(node)
    return [tuple(group) for group in siblings.values() if len(group) == 3]

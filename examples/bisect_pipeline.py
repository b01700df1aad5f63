"""A pipeline of five transforms made a model wrong: which one, and where?

Run it with ``python examples/bisect_pipeline.py``. The third transform has a bug in its second match.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule

import graphprobe
from graphprobe.pipeline import Applied

aten = torch.ops.aten


class Block(nn.Module):
    """x + down(relu(up(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def tidy(gm: GraphModule) -> None:
    """Change nothing that matters."""
    gm.graph.eliminate_dead_code()


def relu_to_clamp(gm: GraphModule, first: int | None = None) -> Applied:
    """Write relu(x) as clamp(x, 0), in its second match as clamp(x, 0.01); `first` limits it to so many matches."""
    found = list(gm.graph.find_nodes(op="call_function", target=aten.relu.default))[:first]
    for i, old in enumerate(found):
        with gm.graph.inserting_before(old):
            new = gm.graph.call_function(aten.clamp_min.default, (old.args[0], 0.01 if i == 1 else 0))
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        gm.graph.erase_node(old)
    return Applied(tuple(node.name for node in found))


def main() -> graphprobe.Bisection:
    """Bisect, print, and return what was found."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block()).eval()
    pipeline = [("tidy", tidy), ("tidy_more", tidy), relu_to_clamp, ("tidy_again", tidy), ("tidy_last", tidy)]
    found = graphprobe.bisect(model, (torch.randn(4, 16),), pipeline=pipeline)
    print(found)
    return found


if __name__ == "__main__":
    main()

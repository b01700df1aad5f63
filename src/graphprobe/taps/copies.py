"""A second graph over the same weights."""

from __future__ import annotations

import copy
import warnings

from torch.fx import GraphModule


def copied(gm: GraphModule) -> GraphModule:
    """Return a graph module with nodes of its own that shares weights and submodules with `gm`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own: it copies deprecated leaf specs
        return GraphModule(gm, copy.deepcopy(gm.graph))

"""What a pipeline does to a graph between transforms: copy it, clean it up, compute its metadata anew."""

from __future__ import annotations

import copy
import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp


def fresh_copy(gm: GraphModule) -> GraphModule:
    """Return a GraphModule with a graph of its own and the weights of `gm`."""
    with warnings.catch_warnings():  # torch's own pytree classes, which the graph's calling convention holds
        warnings.simplefilter("ignore", FutureWarning)
        graph = copy.deepcopy(gm.graph)
    duplicate = GraphModule(gm, graph, type(gm).__name__)
    duplicate.meta = dict(gm.meta)
    duplicate.train(gm.training)
    return duplicate


def clean_up(gm: GraphModule) -> None:
    """Drop nodes and modules that nobody uses, from the inmost control-flow body outwards."""
    for one in reversed(list(gm.modules())):
        if isinstance(one, GraphModule):
            one.graph.eliminate_dead_code()
            one.delete_all_unused_submodules()
            one.graph.lint()
            one.recompile()


def propagate_shapes(gm: GraphModule) -> str:
    """Compute every ``meta["val"]`` from those of the placeholders; return why that failed, '' where it did not."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    lacking = [node.name for node in placeholders if "val" not in node.meta]
    if lacking:
        return f"the input {lacking[0]} has no meta['val']"
    inputs = [node.meta["val"] for node in placeholders]
    mode = next((v.fake_mode for v in inputs if isinstance(v, FakeTensor)), None)
    if mode is None:
        return "no input is a fake tensor"
    allowed, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True  # weights are real tensors
    try:
        with torch.no_grad():
            FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs)
    except Exception as error:  # an operator without a fake kernel, shapes that do not fit
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        mode.allow_non_fake_inputs = allowed
    return ""

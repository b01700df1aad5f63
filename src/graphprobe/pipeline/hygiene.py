"""What a pipeline does to a graph between transforms: copy it, clean it up, compute its metadata anew."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp


def fresh_copy(gm: GraphModule, *, compiled: bool = True) -> GraphModule:
    """Return a GraphModule with graphs of its own, those of control-flow bodies included, and the weights of `gm`.

    Without `compiled` its code is not generated: it can be put back in place of another, and not be called.
    """
    return _copied(gm, {}, compiled)


class _Uncompiled(GraphModule):
    """A GraphModule whose constructor generates no code."""

    def recompile(self) -> Any:
        return None


def _copied(gm: GraphModule, copies: dict[torch.nn.Module, torch.nn.Module], compiled: bool = True) -> GraphModule:
    with warnings.catch_warnings():  # torch's own pytree classes, which the graph's calling convention holds
        warnings.simplefilter("ignore", FutureWarning)
        graph = copy.deepcopy(gm.graph)
    duplicate = (GraphModule if compiled else _Uncompiled)(gm, graph, type(gm).__name__)
    duplicate.meta = dict(gm.meta)
    copies[gm] = duplicate
    _own_modules(duplicate, set(gm.modules()), copies)
    duplicate.train(gm.training)
    return duplicate


def _own_modules(
    owner: torch.nn.Module, shared: set[torch.nn.Module], copies: dict[torch.nn.Module, torch.nn.Module]
) -> None:
    """Put copies in place of the modules below `owner` that still belong to the graph it was copied from."""
    for name, module in list(owner._modules.items()):
        if module is None or module in copies.values() or isinstance(module, torch.jit.ScriptModule):
            continue
        if module in shared:
            if module not in copies:
                copies[module] = _copied(module, copies) if isinstance(module, GraphModule) else _shell(module)
            module = owner._modules[name] = copies[module]
        if not isinstance(module, GraphModule):
            _own_modules(module, shared, copies)


def _shell(module: torch.nn.Module) -> torch.nn.Module:
    """Return a module of the same class with the same weights, in which others can be registered."""
    duplicate = module.__class__.__new__(module.__class__)
    duplicate.__dict__ = dict(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        duplicate.__dict__[table] = copy.copy(module.__dict__[table])
    return duplicate


def clean_up(gm: GraphModule) -> None:
    """Drop nodes and modules that nobody uses, from the inmost control-flow body outwards."""
    for one in reversed(list(gm.modules())):
        if isinstance(one, GraphModule):
            changed = one.graph.eliminate_dead_code()
            one.delete_all_unused_submodules()
            one.graph.lint()
            if changed:
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

"""Transforms and a model for the tests of pipelines, named as a user names them: ``pipeline_models:scale``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from graphprobe.pipeline import Applied, NotApplied, Outcome

aten = torch.ops.aten


class Net(nn.Module):
    """linear, relu, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def net() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval(), (torch.randn(3, 8),)


@dataclass(frozen=True)
class Options:
    """A transform with an option of every kind, which does nothing."""

    count: int = 1
    ratio: float = 0.5
    label: str = ""
    strict: bool = False
    sizes: tuple[int, ...] = ()
    pairs: tuple[tuple[str, float], ...] = ()
    limit: int | None = None
    name: ClassVar[str] = "options"
    stage: ClassVar[str] = "post_load_fusion"

    def apply(self, gm: GraphModule) -> Outcome:
        """Match nothing."""
        return NotApplied("there is nothing to do", next(iter(gm.graph.nodes)).name)


@dataclass(frozen=True)
class Demands:
    """A transform with an option that must be given."""

    amount: int
    name: ClassVar[str] = "demands"
    stage: ClassVar[str] = "sharding"

    def apply(self, gm: GraphModule) -> Outcome:
        """Match nothing."""
        return NotApplied("nothing")


KNOWN = {"options": Options, "demands": Demands}


def node_of(gm: GraphModule, target: object) -> Node:
    return next(n for n in gm.graph.nodes if n.target is target)


def swap_relu(gm: GraphModule, target: object = aten.relu6.default, keep_val: bool = True) -> Node:
    """Replace the relu by another operator on the same input."""
    old = node_of(gm, aten.relu.default)
    with gm.graph.inserting_before(old):
        new = gm.graph.call_function(target, old.args)  # type: ignore[arg-type]
    if keep_val:
        new.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)
    return new


def in_place(gm: GraphModule) -> None:
    swap_relu(gm)


def returned(gm: GraphModule, keep_val: bool = True) -> GraphModule:
    swap_relu(gm, keep_val=keep_val)
    return gm


def pass_result(gm: GraphModule) -> PassResult:
    swap_relu(gm)
    return PassResult(gm, True)


def counted(gm: GraphModule) -> Outcome:
    return Applied((swap_relu(gm).name,))


def retraced(gm: GraphModule) -> GraphModule:
    swap_relu(gm)
    return torch.fx.Transformer(gm).transform()


def pattern(gm: GraphModule) -> object:
    return torch.fx.replace_pattern(gm, lambda x: aten.relu.default(x), lambda x: aten.relu6.default(x))


def idle(gm: GraphModule) -> None:
    """Change nothing."""


def unmodified(gm: GraphModule) -> PassResult:
    return PassResult(gm, False)


def raises(gm: GraphModule) -> None:
    swap_relu(gm)
    raise RuntimeError("out of luck")


def unlucky(gm: GraphModule) -> None:
    node_of(gm, aten.relu6.default).meta.clear()
    raise RuntimeError("out of luck")


def invalid(gm: GraphModule) -> None:
    relu, down = (
        node_of(gm, aten.relu.default),
        list(gm.graph.find_nodes(op="call_function", target=aten.linear.default))[-1],
    )
    down.append(relu)  # behind its user


def wrong(gm: GraphModule) -> int:
    return 3


class CallablePass:
    """A pass that is an object, as PassBase is."""

    def __call__(self, gm: GraphModule) -> None:
        swap_relu(gm)


class FxPass(PassBase):
    """A pass as torch's infrastructure has them."""

    def call(self, gm: GraphModule) -> PassResult:
        swap_relu(gm)
        return PassResult(gm, True)


def to_target(gm: GraphModule, six: bool = False) -> None:
    swap_relu(gm, aten.relu6.default if six else aten.clamp_min.default)


six = functools.partial(to_target, six=True)
manager = PassManager(passes=[FxPass(), in_place, six])

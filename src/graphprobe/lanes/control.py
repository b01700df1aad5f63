"""Control flow in exact arithmetic: the bodies of cond, while_loop, scan and map are lifted operation by operation.

Each function takes what the operator takes, its operands lifted already. `after_each` is asked for every result inside
a body (the second look adds float64 noise there).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphprobe.lanes import exact

AfterEach = Callable[[Node, Any], Any]


def _keep(node: Node, value: Any) -> Any:
    return value


def body(gm: GraphModule, operands: Sequence[Any], after_each: AfterEach = _keep) -> Any:
    """Evaluate the graph of a body exactly on its operands."""
    env: dict[Node, Any] = {}
    waiting = iter(operands)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(waiting)
        elif node.op == "get_attr":
            env[node] = exact.lift(operator.attrgetter(str(node.target))(gm))
        elif node.op == "output":
            return torch.fx.map_arg(node.args[0], env.__getitem__)
        else:
            args = torch.fx.map_arg(node.args, env.__getitem__)
            kwargs = torch.fx.map_arg(node.kwargs, env.__getitem__)
            target, args, kwargs = exact.lifted_call(node, args, kwargs)
            if is_control(node):
                kwargs = {**kwargs, "after_each": after_each}
            env[node] = after_each(node, target(*args, **kwargs))
    return None


def cond(
    predicate: Any, true: GraphModule, false: GraphModule, operands: Sequence[Any] = (), after_each: AfterEach = _keep
) -> Any:
    """Evaluate the branch that is taken."""
    return body(true if bool(predicate) else false, operands, after_each)


def while_loop(
    condition: GraphModule,
    step: GraphModule,
    carried: Sequence[Any],
    others: Sequence[Any] = (),
    after_each: AfterEach = _keep,
) -> Any:
    """Evaluate the body as long as the condition holds; returns what is carried."""
    state = tuple(carried)
    while bool(body(condition, (*state, *others))):
        state = tuple(body(step, (*state, *others), after_each))
    return state


def scan(
    step: GraphModule,
    initial: Sequence[torch.Tensor],
    xs: Sequence[torch.Tensor],
    others: Sequence[Any] = (),
    after_each: AfterEach = _keep,
) -> Any:
    """Evaluate the body along dimension 0 of `xs`; returns the last state, then the stacked results."""
    state = list(initial)
    rows: list[list[torch.Tensor]] = []
    for i in range(xs[0].shape[0]):
        made = list(body(step, (*state, *(x[i] for x in xs), *others), after_each))
        state, row = made[: len(state)], made[len(state) :]
        rows.append(row)
    return (*state, *(torch.stack(column) for column in zip(*rows, strict=True)))


def mapped(
    step: GraphModule, xs: Sequence[torch.Tensor], others: Sequence[Any] = (), after_each: AfterEach = _keep
) -> Any:
    """Evaluate the body for each slice of `xs` along dimension 0; returns the stacked results."""
    rows = [body(step, (*(x[i] for x in xs), *others), after_each) for i in range(xs[0].shape[0])]
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


#: Operators whose bodies are lifted, by the name of the higher-order operator.
CONTROL: dict[str, Callable[..., Any]] = {"cond": cond, "while_loop": while_loop, "scan": scan, "map_impl": mapped}


def is_control(node: Node) -> bool:
    """Whether the node is a control-flow operator with a body that can be lifted."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target._name in CONTROL

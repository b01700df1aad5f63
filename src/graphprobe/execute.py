"""Run a program node by node: values die at their last use, random operators replay their generator state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Node

from graphprobe import nodes
from graphprobe.program import Program

Values = dict[Node, Any]

#: A lane may be given a value of the other side, with other strides; there a view fails that means the values alone.
_LOOSE = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}


def target_of(node: Node) -> Callable[..., Any]:
    """Return what a lane calls for a node: its target, the form of it that takes any strides, or one that waits."""
    assert callable(node.target)
    if nodes.is_in_flight(node):
        return _awaited(node.target)
    found: Callable[..., Any] = _LOOSE.get(node.target, node.target)  # type: ignore[call-overload]
    return found


@functools.cache
def _awaited(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return a collective that is over when it returns: a lane may read what it returns, or free what it is given."""

    def awaited(*args: Any, **kwargs: Any) -> Any:
        wait = torch.ops._c10d_functional.wait_tensor.default
        return pytree.tree_map_only(torch.Tensor, wait, collective(*args, **kwargs))

    return awaited


def run_program(
    program: Program,
    inputs: Mapping[str, Any],
    wanted: Iterable[Node],
    replace: Mapping[Node, Callable[[Values], Any]] | None = None,
    hold: Iterable[Node] = (),
    skip: Iterable[Node] = (),
    observe: Callable[[Node, Any], Any] | None = None,
    known: Values | None = None,
    resumable: bool = False,
) -> Values:
    """Run a program natively and return the values of the wanted nodes.

    A node in `replace` takes what its function makes of the environment; nodes in `hold` are kept alive for that. All
    other values die after their last use. Nodes in `skip` are not run, nor any after the last one that is wanted (if
    any is). With `observe`, what it returns of a node and its value is kept in place of the values. With `known` values
    only what lies between them and the wanted nodes is run; if it is to be `resumable`, what was alive at the end is
    returned, too.
    """
    wanted, skip, held = set(wanted), set(skip), set(hold)
    end = max((program.order[n] for n in wanted if n in program.order), default=len(program.live) - 1)
    run = program.live[: end + 1]
    if known is not None:
        needed = _between(known, wanted | held)
        run = [n for n in run if n in needed]
    weight = _weights(program, run)
    last = {operand: node for node in program.live for operand in node.all_input_nodes}
    env: Values = {node: inputs[path] for path, node in program.inputs.items() if path in inputs}
    env.update(known or {})
    kept: Values = {}
    with torch.no_grad():
        for node in run:
            if node in skip:
                continue
            for operand in node.all_input_nodes:  # weights are read when they are used: graphs begin with all of them
                if operand.op == "get_attr" and operand not in env:
                    env[operand] = weight(operand)
            if replace and node in replace:
                env[node] = replace[node](env)
            elif node.op == "get_attr":
                if node not in wanted:
                    continue
                env[node] = program.attribute(node)
            elif node.op == "call_function":
                env[node] = call(program, node, env)
            if node in wanted:
                kept[node] = observe(node, env[node]) if observe else env[node]
            for operand in node.all_input_nodes:
                if last[operand] is node and operand not in held:
                    env.pop(operand, None)
    for node in wanted:
        if node not in kept and node in env:
            kept[node] = observe(node, env[node]) if observe else env[node]
    return kept | {n: v for n, v in env.items() if n.op == "call_function"} if resumable else kept


def _between(known: Values, wanted: Iterable[Node]) -> set[Node]:
    """Return the wanted nodes and all that they are computed from, as far as it is not known."""
    found: set[Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in found and node not in known:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _weights(program: Program, run: Sequence[Node]) -> Callable[[Node], Any]:
    """Return what reads a weight; weights that come from elsewhere are ordered in the order of their first use."""
    if program.stream is None:
        return program.attribute
    order = [n for node in run for n in node.all_input_nodes]
    reads = [n for n in dict.fromkeys(order) if n.op == "get_attr"]
    return program.stream.reader(reads, program.held)


def call(program: Program, node: Node, env: Mapping[Node, Any]) -> Any:
    """Evaluate one node natively; random operators draw from their own generator state."""
    args = torch.fx.map_arg(node.args, env.__getitem__)
    kwargs = torch.fx.map_arg(node.kwargs, env.__getitem__)
    target = target_of(node)
    if nodes.is_undefined(node):
        return zeroed(target, *args, **kwargs)
    if node in program.seeds:
        return replayed(program.seeds[node], target, args, kwargs)
    return target(*args, **kwargs)


def zeroed(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an operator that reserves memory and fill it with zeros: what is never read must not differ either."""
    return target(*args, **kwargs).zero_()


def replayed(seed: int, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a random operator from a given generator state, and leave the global one as it was."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return target(*args, **kwargs)

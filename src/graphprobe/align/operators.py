"""Terms of operators that nobody here knows by name: their kernel is read, where it is written in other operators.

A fused operator of a runtime often has a plain form beside its fast one (`CompositeExplicitAutograd`, as
`torch.library.custom_op` registers it). Traced on tensors without data, it says what the operator computes, in the
terms of what it was put in place of.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from graphprobe import nodes
from graphprobe.align.expressions import Expression, Term, expressed
from graphprobe.align.steps import step_of

MOST = 400  # operations in one expression, those counted again that are used again
_KNOWN = ("aten", "prims", "prim")
_KERNELS = (
    torch._C.DispatchKey.CompositeExplicitAutograd,
    torch._C.DispatchKey.CompositeImplicitAutograd,
    torch._C.DispatchKey.CompositeExplicitAutogradNonFunctional,
)
Results = tuple["Expression | int | None", ...]  # one for each result: an expression, or the operand it hands on


class Operators:
    """Remembers what was read: a model calls one operator in every layer."""

    def __init__(self) -> None:
        self._read: dict[Any, Results | None] = {}

    def term(self, node: Node, index: int = 0) -> Term | None:
        """Return the term of a result of a call of an operator; None where it has no kernel that can be read."""
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace in _KNOWN or nodes.is_random(node):
            return None
        values = [nodes.tensor_val(n) for n in node.all_input_nodes]
        if not values or any(v is None or not all(isinstance(d, int) for d in v.shape) for v in values):
            return None
        seen = [(tuple(v.shape), v.stride(), v.dtype) for v in values if v is not None]
        places = {n: f"%{i}" for i, n in enumerate(node.all_input_nodes)}
        arguments = torch.fx.map_arg((node.args, node.kwargs), places.__getitem__)
        key = (target, repr(seen), repr(arguments))
        if key not in self._read:
            self._read[key] = _read(target, node)
        results = self._read[key]
        found = results[index] if results is not None and -len(results) <= index < len(results) else None
        if found is None:
            return None
        expression = ("turned", (), found) if isinstance(found, int) else found
        return Term(tuple(node.all_input_nodes), None, expression)


def _read(target: torch._ops.OpOverload, node: Node) -> Results | None:
    """Trace the kernel on tensors like the node's operands and write down each of its results."""
    kernel = next((k for k in _KERNELS if target.has_kernel_for_dispatch_key(k)), None)
    if kernel is None or target._schema.is_mutable:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the kernel warns about is said when it runs
            traced = _traced(target, kernel, node)
        return _expressions(traced)
    except Exception:  # whatever a stranger's kernel does on tensors without data: it only stays unread
        return None


def _traced(target: torch._ops.OpOverload, kernel: Any, node: Node) -> GraphModule:
    operands = node.all_input_nodes

    def called(*values: torch.Tensor) -> Any:
        env = dict(zip(operands, values, strict=True))
        args: Any = torch.fx.map_arg(node.args, env.__getitem__)
        kwargs: Any = torch.fx.map_arg(node.kwargs, env.__getitem__)
        return target(*args, **kwargs)

    with FakeTensorMode(), torch.no_grad():
        # on the CPU, where the plain form is taken and not the fast one
        values = [v for v in map(nodes.tensor_val, operands) if v is not None]
        held = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype) for v in values]
        return make_fx(called, {target: lambda *args, **kwargs: target._op_dk(kernel, *args, **kwargs)})(*held)


def _expressions(gm: GraphModule) -> Results | None:
    """Write every output of a traced kernel over its placeholders, by their number."""
    out: dict[Node, Expression | int] = {}
    sizes: dict[Node, int] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            out[node], sizes[node] = len(out), 0
        elif node.op == "output":
            returned = node.args[0] if isinstance(node.args[0], (list, tuple)) else (node.args[0],)
            if any(sizes.get(n, 0) > MOST for n in returned):
                return None
            return tuple(out.get(n) for n in returned)
        elif node.op != "call_function" or nodes.is_random(node):
            return None  # a constant of the kernel's own, or what is drawn anew each time
        elif nodes.tensor_val(node) is not None:
            operands, out[node] = _written(node, out)
            sizes[node] = 1 + sum(sizes[n] for n in operands)
            if sizes[node] > 4 * MOST:
                return None
    return None


def _written(node: Node, known: dict[Node, Expression | int]) -> tuple[Sequence[Node], Expression | int]:
    """Return what a traced node computes, over what its operands compute."""
    step = step_of(node)
    if step is None:
        term = expressed(node)
        return term.operands, _over(term.expression, [known[n] for n in term.operands])
    source = node.all_input_nodes[0]
    if source not in known:  # of a split: a part of what was split
        source = source.all_input_nodes[0]
    return (source,), ("turned", step, known[source]) if step else known[source]


def _over(expression: Expression, operands: Sequence[Expression | int]) -> Expression:
    name, constants, *children = expression
    return (name, constants, *(operands[c] if type(c) is int else _over(c, operands) for c in children))

"""Which rule judges each operator of a graph in exact arithmetic, found out by running one of each kind in float64."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Node

from graphprobe import nodes, provenance, quantizers
from graphprobe.execute import Values, call, run_program
from graphprobe.lanes import control, exact, narrow
from graphprobe.program import Program
from graphprobe.records import EXACT_RULES, ExactRow

#: The rules whose operators nothing can be proved about: their regions are judged by the size of their rounding alone.
WEAK = ("native", "statistics", "unknown")
Trials = dict[str, tuple[str, str]]  # operator -> (rule that its trial calls for, '' for none; why)
_ORDER = list(EXACT_RULES)


def list_operators(program: Program, inputs: Mapping[str, Any] | None) -> tuple[ExactRow, ...]:
    """Return one row per operator of the graph, the weakest rules first.

    With `inputs` (by path) the graph runs once, and the first node of each operator also in float64, to learn whether
    its kernel takes that; without, and below an operator that cannot be run, the tables alone are asked.
    """
    counted: Counter[str] = Counter()
    first: dict[str, Node] = {}
    for node in program.live:
        if node.op == "call_function" and not nodes.returns_nothing(node):
            name = provenance.target_name(node)
            counted[name] += 1
            first.setdefault(name, node)
    tried: Trials = {}
    if inputs is not None:
        _try_all(program, inputs, first, tried)
    rows = [_row(name, node, counted[name], tried.get(name)) for name, node in first.items()]
    return tuple(sorted(rows, key=lambda row: (-_ORDER.index(row.rule), -row.count, row.operator)))


def known_operators() -> tuple[ExactRow, ...]:
    """Return one row per operator with a rule of its own; every other one runs in float64 itself, or is decomposed."""
    names = {*exact.RULES, *exact.NATIVE}
    rows = [ExactRow(name.replace("::", "."), *_by_name(name)) for name in names]
    rows += [ExactRow(f"higher_order.{name}", "bodies") for name in control.CONTROL]
    return tuple(sorted(rows, key=lambda row: (-_ORDER.index(row.rule), row.operator)))


def _try_all(program: Program, inputs: Mapping[str, Any], first: dict[str, Node], tried: Trials) -> None:
    """Run the graph; note for the first node of each operator the rule that its trial calls for, and why."""

    def observed(name: str, node: Node, env: Values) -> Any:
        try:
            value = call(program, node, env)
        except Exception as error:
            tried[name] = ("unknown", _first_line(error))
            raise
        plain = nodes.is_view(node) or exact.takes_native(node)
        reason = "" if plain else _try_exactly(node, env)
        tried[name] = ("statistics" if reason else "", reason)
        return value

    replace = {n: (lambda env, name=name, n=n: observed(name, n, env)) for name, n in first.items()}
    try:
        run_program(program, inputs, (), replace=replace)
    except Exception:  # its own row says so; what lies below has not been tried
        return


def _try_exactly(node: Node, env: Values) -> str:
    if exact.lifts_late(node) is not None:
        return ""
    lifted = pytree.tree_map(exact.lift, [env[n] for n in node.all_input_nodes])
    values = dict(zip(node.all_input_nodes, lifted, strict=True))
    given: Any = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
    try:
        target, args, kwargs = exact.lifted_call(node, *given)
        target(*args, **kwargs)
        if narrow.may_be_narrow(node) and narrow.is_narrow(node, values):
            return "it casts to fewer bits inside"
    except Exception as error:
        reason = _first_line(error)
    else:
        return ""
    return _try_exactly(node, env) if exact.learn_decomposition(node) else reason


def _row(name: str, node: Node, count: int, said: tuple[str, str] | None) -> ExactRow:
    schema = nodes.schema_name(node)
    rule, note = ("bodies", "") if control.is_control(node) else _by_name(schema)
    if nodes.is_random(node):
        rule, note = "replayed", ""
    elif exact.takes_native(node):
        rule, note = "native", ""
    elif nodes.is_view(node) or (node.target is operator.getitem and not nodes.makes_values(node)):
        rule, note = "view", ""
    if said and said[0]:
        rule, note = said
    elif said is None and rule in ("float64", "adapted"):
        note = "not tried"
    return ExactRow(name, rule, note, count)


def _by_name(name: str) -> tuple[str, str]:
    """Return (rule, note) as the tables have it for a schema name; native overloads are asked for by the caller."""
    if name in exact.NATIVE:
        return "native", ""
    if name in exact.DECOMPOSED:
        return "decomposition", ""
    rule = exact.RULES.get(name)
    if isinstance(rule, exact.Reference):
        module = getattr(rule.make, "__module__", "")
        return "reference", f"{module}.{getattr(rule.make, '__qualname__', rule.make)}".lstrip(".")
    if name in quantizers.RULES:
        return "reference", quantizers.__name__
    return ("float64", "") if rule is None else ("adapted", "")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__

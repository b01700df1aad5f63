"""Run a probe graph. What raises in `after` becomes a structural fact, and the rest is run without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from graphprobe import provenance
from graphprobe.errors import MismatchError, OperatorError
from graphprobe.execute import Values
from graphprobe.lanes import exact
from graphprobe.lanes.build import build
from graphprobe.lanes.plan import Plan, Probe
from graphprobe.lanes.waypoints import Waypoints
from graphprobe.program import fetch

Inputs = dict[str, Any]  # path -> value


@dataclass
class Measurements:
    """The numbers of one run: a row per region, columns as in `measure.Column`."""

    rows: torch.Tensor  # [regions, columns] float64, on the CPU
    details: torch.Tensor | None = None  # the same of `details.Detail`, where they were asked for
    raised: dict[Node, str] = field(default_factory=dict)  # node of after -> what it said
    native_only: dict[Any, str] = field(default_factory=dict)  # operator without a float64 form -> what it said
    known: Values = field(default_factory=dict)  # some of before's values, which a second look goes on from

    def each(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return the two rows of every region, in the order of the plan."""
        return zip(self.rows, [None] * len(self.rows) if self.details is None else self.details, strict=True)


def measure(plan: Plan, inputs: Inputs, redrawn: Inputs | None = None) -> Measurements:
    """Build and run the probe graph; synchronises once.

    Raises OperatorError where `before` itself cannot run: there is no reference then.
    """
    raised = _never_loaded(plan)
    native_only: dict[Any, str] = {}
    while True:
        now = dataclasses.replace(
            plan, broken=plan.broken | set(raised), native_only=plan.native_only | set(native_only)
        )
        probe = build(now)
        try:
            rows, details, known = _execute(probe, inputs, redrawn or {}, plan.before.outputs.values())
            return Measurements(rows, details, raised, native_only, known)
        except Exception as error:
            lane, node, reason = _locate(probe, inputs, redrawn or {}, error)
            if lane.startswith("exact"):
                if node.target in native_only:
                    raise
                if not exact.learn_decomposition(node):
                    native_only[node.target] = reason
            elif lane in ("free", "forced", "free_redrawn"):
                if node in raised:
                    raise
                raised[node] = reason
            else:
                where = provenance.module_path(node) or "the root"
                raise OperatorError(
                    f"before cannot be run: {plan.before.label(node)} ({provenance.target_name(node)}) in {where} "
                    f"raises {reason}. Check that the inputs fit the graph, and that its operators are known here"
                ) from error


def _never_loaded(plan: Plan) -> dict[Node, str]:
    """Return what reads a weight of `after` on the meta device: kernels take it without a word and make up numbers."""
    found: dict[Node, str] = {}
    for side, one in (("before", plan.before), ("after", plan.after)):
        if one.stream is not None:
            continue
        for node in one.live:
            absent = [n for n in node.all_input_nodes if n.op == "get_attr" and getattr(one.held(n), "is_meta", False)]
            if absent and side == "before":
                raise OperatorError(
                    f"before cannot be run: its weight {absent[0].target} is on the meta device; load it"
                )
            if absent:
                found[node] = f"no error, but {absent[0].target} is on the meta device and holds no numbers"
    return found


def _values(probe: Probe, inputs: Inputs, redrawn: Inputs) -> list[Any]:
    absent = next((p for p in probe.paths if p not in inputs and not p.startswith("redrawn:")), None)
    if absent is not None:
        raise MismatchError(
            f"one of the graphs takes an input {absent!r}, which the other does not: nothing is given for it"
        )
    return [redrawn[p.removeprefix("redrawn:")] if p.startswith("redrawn:") else inputs[p] for p in probe.paths]


def _execute(
    probe: Probe, inputs: Inputs, redrawn: Inputs, outputs: Iterable[Node]
) -> tuple[torch.Tensor, torch.Tensor | None, Values]:
    """Run the probe graph; return its rows, those of details, and what is known of before then."""
    values = _values(probe, inputs, redrawn)
    device = next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu"))
    probe.place(device)
    waypoints = Waypoints(probe, outputs)
    with torch.no_grad():
        if device.type == "cpu":
            _walk(probe, values, waypoints)  # generating code for a graph that runs once takes longer than walking it
        else:
            probe.gm(*values)
    details = probe.details
    return probe.slots.cpu(), None if details is None else details.cpu(), waypoints.values


def _walk(probe: Probe, values: list[Any], waypoints: Waypoints) -> None:
    """Evaluate the probe graph node by node; values die at their last use."""
    last = {operand: node for node in probe.graph.nodes for operand in node.all_input_nodes}
    dying: dict[Node, list[Node]] = {}
    for operand, node in last.items():
        dying.setdefault(node, []).append(operand)
    given = iter(values)
    env: dict[Node, Any] = {}
    value_of, map_arg = env.__getitem__, torch.fx.map_arg
    for place, node in enumerate(probe.graph.nodes):
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "get_attr":
            env[node] = fetch(probe.root, str(node.target))
        elif node.op == "call_function":
            kwargs = map_arg(node.kwargs, value_of) if node.kwargs else {}
            env[node] = node.target(*map_arg(node.args, value_of), **kwargs)
            waypoints.passed(place, node, env)
            if node not in last:
                del env[node]
        for operand in dying.get(node, ()):
            del env[operand]


class _Locating(torch.fx.Interpreter):
    failed: Node | None = None

    def run_node(self, n: Node) -> Any:
        try:
            return super().run_node(n)
        except Exception:
            self.failed = self.failed or n
            raise


def _locate(probe: Probe, inputs: Inputs, redrawn: Inputs, error: Exception) -> tuple[str, Node, str]:
    """Run again node by node to learn which node of which lane raised. Raises the error itself if none does."""
    interpreter = _Locating(probe.gm)
    interpreter.extra_traceback = False
    try:
        with torch.no_grad():
            interpreter.run(*_values(probe, inputs, redrawn))
    except Exception as again:
        if interpreter.failed is not None and interpreter.failed.name in probe.origin:
            lane, node = probe.origin[interpreter.failed.name]
            lines = [line for line in str(again).splitlines() if line.strip()]
            return lane, node, f"{type(again).__name__}: {lines[0][:300] if lines else ''}"
        raise
    raise error

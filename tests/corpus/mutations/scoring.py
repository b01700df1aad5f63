"""What the judge should have said of a mutant, and what it said: exact, near, wrong, missed, silent, false alarm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from corpus.mutations import Mutant
from graphprobe import inputs
from graphprobe.lanes import exact
from graphprobe.program import Program, program
from graphprobe.records import Report

SMALL = 8  # value-making operations of a region that still counts as a place
EFFECT = 1e-11  # relative change of an output, in float64, from which on a defect has an effect
LEVELS = ("ids", "modules", "values")
#: A defect that only computes more coarsely changes nothing in exact arithmetic.
COARSE = ("cast",)
_ALLOWED = 8.0  # times before's own error: within rounding

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def has_effect(before: GraphModule, mutant: Mutant, given: Inputs) -> bool:
    """Whether the change moves an output: in float64, or (where it only rounds) beyond eight times before's error."""
    exact_before, exact_after = (lifted_outputs(gm, given) for gm in (before, mutant.gm))
    if mutant.change not in COARSE:
        return any(_distance(x, y) > EFFECT for x, y in zip(exact_before, exact_after, strict=True))
    mine, theirs = (_native_outputs(gm, given) for gm in (before, mutant.gm))
    errors = [[_distance(t, y) for t, y in zip(exact_before, side, strict=True)] for side in (mine, theirs)]
    return any(y > _ALLOWED * x for x, y in zip(*errors, strict=True))


def _distance(x: Any, y: Any) -> float:
    """Return the relative L2 distance of two outputs; infinite where shapes or NaNs differ."""
    if not isinstance(x, torch.Tensor):
        return 0.0
    if x.shape != y.shape or not torch.equal(x.isnan(), y.isnan()):
        return float("inf")
    x, y = torch.nan_to_num(x.double()), torch.nan_to_num(y.double())
    top, bottom = float((y - x).norm()), float(x.norm())
    return top / bottom if bottom > 0 else (0.0 if top == 0 else float("inf"))


def lifted_outputs(gm: GraphModule, given: Inputs) -> list[Any]:
    """Return the outputs of the whole graph evaluated in float64, operation by operation, without any judge."""
    one = program(gm, *given)
    return _outputs(one, inputs.bind(gm, *given, "before"), lift=True)


def _native_outputs(gm: GraphModule, given: Inputs) -> list[Any]:
    return _outputs(program(gm, *given), inputs.bind(gm, *given, "before"), lift=False)


def _outputs(one: Program, bound: Mapping[str, Any], lift: bool) -> list[Any]:
    keep = exact.lift if lift else lambda value: value
    env = {n: keep(bound[path]) for path, n in one.inputs.items() if path in bound}
    with torch.no_grad():
        for n in one.live:
            if n.op == "get_attr":
                env[n] = keep(one.attribute(n))
            elif n.op == "call_function":
                args, kwargs = (torch.fx.map_arg(v, env.__getitem__) for v in (n.args, n.kwargs))
                target: Any = n.target
                if lift:
                    target, args, kwargs = exact.lifted_call(n, args, kwargs)
                env[n] = target(*args, **kwargs)
    return [env[n] for n in one.outputs.values()]


def classify(report: Report, mutant: Mutant, names: Mapping[str, str], effect: bool) -> str:
    """Name what became of a mutant; `names` maps its nodes to those of the graph that was compared."""
    grave = [f for f in report.findings if f.kind not in ("rounding", "identical")]
    if mutant.benign:
        return "false alarm" if grave else "unknown" if report.verdict == "unknown" else "fine"
    if not grave:
        return "unknown" if report.verdict == "unknown" else "missed" if effect else "silent"
    changed = {*mutant.nodes, *(names.get(n, n) for n in mutant.nodes)}
    hit = [f for f in grave if changed & {*f.before, *f.after, f.culprit}]
    if not hit:
        return "wrong" if effect else "silent, but found"
    views = {n.name for n in report.after.nodes if n.is_view} if report.after else set()
    size = len([n for n in hit[0].after if n not in views])
    return "exact" if len(grave) == 1 and size <= SMALL else "near"


def renamed(mutant: GraphModule, stripped: GraphModule) -> dict[str, str]:
    """Map the names of a mutant's nodes to those they have after evidence was taken away."""
    return dict(zip((n.name for n in mutant.graph.nodes), (n.name for n in stripped.graph.nodes), strict=True))

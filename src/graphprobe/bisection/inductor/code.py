"""Generated code: is it right, and if not, the lowering of which operation is wrong?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from graphprobe import graphview, provenance
from graphprobe.bisection.inductor import snapshots
from graphprobe.bisection.inductor.outputs import Reference
from graphprobe.bisection.inductor.recording import Recording
from graphprobe.bisection.inductor.snapshots import Piece
from graphprobe.bisection.oracle import Answer
from graphprobe.bisection.search import BAD, GOOD, UNKNOWN
from graphprobe.records import VERDICTS, Finding, Report

RULE = "3 no float64 form"
#: Switches of Inductor: if one of them mends the code, that says what is wrong with it.
WITH_CASTS: tuple[str, dict[str, Any]] = ("with every cast of eager", {"emulate_precision_casts": True})
SWITCHES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("without vectorisation", {"cpp.simdlen": 1}),
    ("without fusion", {"max_fusion_size": 1, "epilogue_fusion": False}),
    WITH_CASTS,
    ("without changes of layout", {"layout_optimization": False, "comprehensive_padding": False}),
    ("on one thread", {"cpp.threads": 1}),
)

_ROUNDINGS = 16  # so many of their dtype may lie between results that make the same casts


def judge(reference: Reference, found: Sequence[Any], who: str) -> Answer:
    """Say whether what came back is what the graph computes, up to rounding; the report says by what proof."""
    drawn = [n.name for n in reference.gm.graph.nodes if snapshots.is_random(n)]
    if drawn:
        return Answer(UNKNOWN, f"the graph draws random numbers ({drawn[0]}), and the code draws others")
    outputs = reference.compare(found)
    worst = max(outputs, key=lambda one: VERDICTS.index(one.kind))
    notes = tuple(f"{who}, output {one.path}: {one.said}" for one in outputs)
    report = Report(
        verdict=worst.kind,
        outputs=tuple(one.row for one in outputs if one.row is not None),
        notes=notes,
        before=graphview.view(reference.gm, "the last graph"),
        after=graphview.view(reference.gm, "generated code"),
    )
    if worst.kind in ("identical", "rounding"):
        return Answer(GOOD, worst.kind, report=report)
    finding = Finding(
        kind=worst.kind,
        before=(),
        after=(),
        module_path="",
        op="",
        introduced=worst.error,
        total=worst.error,
        exact=None,
        floor=worst.floor,
        located=False,
        rule=RULE,
        better=worst.better,
        explanation=worst.said,
    )
    return Answer(BAD, worst.kind, report=dataclasses.replace(report, findings=(finding,)))


def rests_on_casts(reference: Reference, report: Report) -> bool:
    """Whether the difference may be that the code leaves out narrowing casts: it is nearer to exact arithmetic.

    Two results that make the same casts differ by a few roundings of their dtype; by 0 where infinities are all.
    """
    if not reference.narrowing or report.verdict == "identical":
        return False
    if report.findings:
        return report.findings[0].better == "after"
    return any(
        row.error is not None and (row.error > _ROUNDINGS * _unit(row.dtype) or row.error == 0)
        for row in report.outputs
        if not row.identical
    )


def _unit(dtype: str) -> float:
    kind = getattr(torch, dtype)
    return float(torch.finfo(kind).eps) / 2 if kind.is_floating_point else 0.0


def located(report: Report, gm: GraphModule, place: str | None) -> Report:
    """Return the report with its finding at a node of the last graph."""
    node = next((n for n in gm.graph.nodes if n.name == place), None)
    if node is None or not report.findings:
        return report
    finding = dataclasses.replace(
        report.findings[0],
        before=(node.name,),
        after=(node.name,),
        culprit=node.name,
        op=provenance.target_name(node),
        module_path=provenance.module_path(node),
        source=provenance.source(node),
        located=True,
    )
    return dataclasses.replace(report, findings=(finding,))


def outputs_after_aot(recorded: Recording, piece: Piece) -> Answer:
    """Compare what a piece returns as Dynamo's graph and as the first graph behind AOTAutograd."""
    reference = Reference.of(piece.snapshots[piece.boundary - 1].gm, piece.inputs or ())
    compiled = piece.outputs
    recorded.run({piece.number: piece.boundary}, keep=True)
    found, piece.outputs = piece.outputs, compiled
    return judge(reference, found or (), "the graph after aot")

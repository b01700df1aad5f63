"""A judgement becomes a report: findings in order, coverage, outputs, the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from graphprobe import align, nodes, provenance
from graphprobe.align.claims import Claim
from graphprobe.align.leftovers import unclaimed
from graphprobe.judge import state, unseen
from graphprobe.judge.findings import GRAVE, findings_of, names
from graphprobe.judge.judging import Judged, Judgement
from graphprobe.judge.plain import plain_outputs
from graphprobe.judge.unjudged import emptiness, is_open, question, void
from graphprobe.lanes.regions import SMALL, Region
from graphprobe.program import Program
from graphprobe.records import VERDICTS, Coverage, Finding, OutputRow, RegionRow, Report


def report(
    judgement: Judgement, *, accept: Sequence[str] = (), allow: Sequence[str] = (), min_coverage: float
) -> Report:
    """Make the report of one run."""
    before, after = judgement.replay.plan.before, judgement.replay.plan.after
    judged = sorted(judgement.judged, key=lambda j: after.order.get(j.region.claim.after, -1))
    plain = plain_outputs(before, after, judgement.replay.inputs)
    outputs = _outputs(judgement, judged) + [p.row() for p in plain if p.before is not None or p.after is not None]
    findings = findings_of(judgement, judged, accept)
    findings += [p.finding() for p in plain if not p.same]
    written, brought = state.one_sided(before, after)
    findings += written
    coverage = _coverage(judgement, judged)
    identical = all(o.identical for o in outputs)
    verdict = _verdict(findings, coverage, identical, bool(outputs), min_coverage)
    notes, loud = (*judgement.notes, *brought), [j for j in judged if is_open(j)]
    if loud and verdict in ("identical", "rounding"):
        verdict, notes = "unknown", (*notes, question(judgement, loud))
    if nothing := void(judgement, judged):
        notes = (*notes, emptiness(judgement, nothing))
        if len(nothing) == len(outputs) and verdict in ("identical", "rounding"):
            verdict = "unknown"
    if quiet := unseen.note(judgement, judged):
        notes = (*notes, quiet)
    return Report(
        verdict=verdict,
        findings=tuple(findings),
        coverage=coverage,
        regions=tuple(_row(judgement, j) for j in judged),
        outputs=tuple(outputs),
        claims=tuple(align.record(c, before, after) for c in judgement.alignment.claims),
        notes=notes,
        allow=tuple(allow),
        min_coverage=min_coverage,
    )


def _verdict(
    findings: list[Finding], coverage: Coverage, identical: bool, has_outputs: bool, min_coverage: float
) -> str:
    standing = [f.kind for f in findings if not f.accepted and f.kind in GRAVE]
    if standing:
        return max(standing, key=VERDICTS.index)
    if not has_outputs or coverage.compared == 0 or coverage.resolution < min_coverage:
        return "unknown"
    return "identical" if identical else "rounding"


# --- the table of regions, outputs, coverage --------------------------------------------------------------------


def _row(judgement: Judgement, j: Judged) -> RegionRow:
    before, after = judgement.replay.plan.before, judgement.replay.plan.after
    region, m = j.region, j.measured
    y = region.claim.after
    value = nodes.tensor_val(y)
    return RegionRow(
        before.label(region.claim.before),
        after.label(y),
        provenance.target_name(nodes.shown(y)),
        provenance.module_path(y) or provenance.module_path(region.claim.before),
        j.kind,
        m.introduced,
        m.total,
        m.exact,
        m.floor,
        region.claim.evidence,
        len(region.operations("before")),
        len(region.operations("after")),
        tuple(int(d) for d in value.shape) if value is not None else (),
        nodes.dtype_name(value.dtype) if value is not None else "",
        j.rule,
        j.spread,
        j.note,
        m.details,
    )


def _outputs(judgement: Judgement, judged: list[Judged]) -> list[OutputRow]:
    rows = []
    for j in judged:
        claim: Claim = j.region.claim
        if not claim.output:
            continue
        value = nodes.tensor_val(claim.after)
        known = j.measured.total is not None
        rows.append(
            OutputRow(
                claim.output,
                tuple(int(d) for d in value.shape) if value is not None else (),
                nodes.dtype_name(value.dtype) if value is not None else "",
                (float("inf") if j.measured.free_class else j.measured.total) if known else None,
                j.measured.max_abs if known else None,
                known and j.measured.identical,
                j.measured.details,
            )
        )
    return rows


def _coverage(judgement: Judgement, judged: list[Judged]) -> Coverage:
    before, after = judgement.replay.plan.before, judgement.replay.plan.after
    making = [n for n in after.live if nodes.makes_values(n)]
    sure = [j for j in judged if j.kind not in ("unknown", "pardoned")]
    inside = {n for j in sure for n in j.region.after}
    # what lies between two halves that compensate has been judged by itself before they were judged as one
    small = [j.region for j in (*sure, *(j for j in judged if j.agreed)) if j.region.size("after") <= SMALL]
    resolved = {n for region in small for n in region.after}
    seen_before = {n for j in sure for n in j.region.before}
    claimed_before = {nodes.shown(c.before) for c in judgement.alignment.claims}
    claimed_after = {nodes.shown(c.after) for c in judgement.alignment.claims}
    largest = max((j.region for j in sure), key=lambda r: r.size("after"), default=None)
    compared = {nodes.shown(j.region.claim.after) for j in sure} & set(making)
    unmatched = [n for n in making if n not in inside]
    making_before = [n for n in before.live if nodes.makes_values(n)]
    rest = unclaimed(before, after, judgement.alignment)
    return Coverage(
        compared=len(compared),
        derived=sum(nodes.is_view(n) for n in after.live),
        inside=sum(n in inside for n in making),
        pardoned=len(judgement.settled.pardoned),
        unknown=sum(j.kind == "unknown" for j in judged),
        unmatched_before=sum(n not in claimed_before for n in making_before),
        unmatched_after=sum(n not in claimed_after for n in making),
        fraction=_share(len(compared), len(making)),
        resolution=_share(sum(n in resolved for n in making), len(making)),
        largest=_largest(largest, after),
        evidence=dict(Counter(c.evidence for c in judgement.alignment.claims)),
        dont_care=max((j.measured.left_out for j in judged), default=0),
        left_before=dict(Counter(one.why for one in rest[0])),
        left_after=dict(Counter(one.why for one in rest[1])),
        unmatched=names(after, unmatched),
        eliminated=names(before, [n for n in making_before if n not in seen_before]),
    )


def _share(part: int, whole: int) -> float:
    # a graph that computes nothing has nothing that could be left out
    return part / whole if whole else 1.0


def _largest(region: Region | None, after: Program) -> str:
    return f"{after.label(region.claim.after)} ({region.size('after')} operations)" if region else ""

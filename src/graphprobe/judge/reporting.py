"""A judgement becomes a report: findings in order, coverage, outputs, the verdict."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Sequence

import torch
from torch.fx import Node

from graphprobe import align, nodes, provenance
from graphprobe.align.claims import Claim
from graphprobe.align.leftovers import unclaimed
from graphprobe.errors import InputError
from graphprobe.judge.culprit import Culprit, culprit, share_a_split
from graphprobe.judge.cure import Cures
from graphprobe.judge.explain import explain
from graphprobe.judge.hints import hint
from graphprobe.judge.judging import Judged, Judgement
from graphprobe.judge.unjudged import is_open, question
from graphprobe.lanes.regions import SMALL, Region
from graphprobe.program import Program
from graphprobe.records import VERDICTS, Coverage, Finding, OutputRow, RegionRow, Report

GRAVE = ("quantization", "precision", "semantic", "nonfinite", "structural")
_MOST_CURES = 16  # each costs one forward run of after
_MOST_HINTS = 8  # each costs some evaluations of its region
_MOST_ROUNDING = 10  # where nothing graver stands, so many of the largest roundings are listed


def report(
    judgement: Judgement, *, accept: Sequence[str] = (), allow: Sequence[str] = (), min_coverage: float
) -> Report:
    """Make the report of one run."""
    before, after = judgement.replay.plan.before, judgement.replay.plan.after
    judged = sorted(judgement.judged, key=lambda j: after.order.get(j.region.claim.after, -1))
    outputs = _outputs(judgement, judged)
    findings = _findings(judgement, judged, accept)
    coverage = _coverage(judgement, judged)
    identical = all(o.identical for o in outputs)
    verdict = _verdict(findings, coverage, identical, bool(outputs), min_coverage)
    notes, loud = tuple(judgement.notes), [j for j in judged if is_open(j)]
    if loud and verdict in ("identical", "rounding"):
        verdict, notes = "unknown", (*notes, question(judgement, loud))
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


# --- findings ---------------------------------------------------------------------------------------------------


def _findings(judgement: Judgement, judged: list[Judged], accept: Sequence[str]) -> list[Finding]:
    found = _structural(judgement, judged)
    found += [(j, _finding(judgement, j)) for j in judged if j.kind in GRAVE]
    if not found:
        loud = [j for j in judged if j.kind == "rounding" and not j.measured.reproduced]
        loud.sort(key=lambda j: -(j.measured.introduced or 0))
        chosen = loud[:_MOST_ROUNDING]
        found = [(j, _finding(judgement, j)) for j in judged if any(j is c for c in chosen)]
    order = judgement.replay.plan.after.order
    found.sort(key=lambda pair: order.get(pair[0].region.claim.after, 0) if pair[0] else 0)
    found = _with_cures(judgement, _with_hints(judgement, _merged(judgement, found)))
    return [_accepted(finding, accept) for _, finding in found]


def _merged(judgement: Judgement, found: list[tuple[Judged | None, Finding]]) -> list[tuple[Judged | None, Finding]]:
    """Join findings of one cause: what nothing claims shows in every region it feeds, and operations in another order
    show in all of them."""
    causes = {
        place: (j.region.claim, culprit(_tight(judgement, j.region), judgement.weights))
        for place, (j, f) in enumerate(found)
        if j is not None and f.kind in ("semantic", "precision")
    }
    partners = {(c.before, c.after) for c in judgement.alignment.claims}
    home: dict[int, int] = {}  # place of a finding -> place of the first of its cause
    for place, cause in causes.items():
        same = [p for p in home if found[p][1].kind == found[place][1].kind and _one_cause(causes[p], cause, partners)]
        homes = {home[p] for p in same}
        first = min(homes, default=place)
        home[place] = first
        home.update({p: first for p in home if home[p] in homes})
    out: list[tuple[Judged | None, Finding]] = []
    for place, (j, finding) in enumerate(found):
        others = [other for p in home if home[p] == place != p and (other := found[p][0]) is not None]
        if home.get(place, place) != place:
            continue
        out.append(_joined(judgement, j, finding, others) if j is not None and others else (j, finding))
    return out


def _joined(judgement: Judgement, j: Judged, finding: Finding, others: list[Judged]) -> tuple[Judged | None, Finding]:
    names = [judgement.replay.plan.after.label(other.region.claim.after) for other in others]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    hint = "; ".join(h for h in (finding.hint, f"the same operation also shows in {shown}") if h)
    whole = dataclasses.replace(j, also=tuple(other.region for other in others))
    return whole, dataclasses.replace(finding, hint=hint)


def _one_cause(first: tuple[Claim, Culprit], second: tuple[Claim, Culprit], partners: set[tuple[Node, Node]]) -> bool:
    """Whether one of two culprits is an operation without partner in the other's region, too, or what the other claims:
    an operation that stands elsewhere in the order is missing here and too much there. Parts of one value that are
    taken otherwise are one mistake, too: the split."""
    (claim, mine), (other, theirs) = first, second
    if mine.node in theirs.lone or theirs.node in mine.lone:
        return True
    if mine.side == theirs.side and share_a_split(mine.node, theirs.node):
        return True
    if (mine.node, theirs.node) in partners or (theirs.node, mine.node) in partners:
        return True
    home = provenance.module_path(mine.node)
    if mine.side != theirs.side and mine.node.target is theirs.node.target and home:
        return home == provenance.module_path(theirs.node)  # it has moved
    return mine.node in (other.before, other.after) or theirs.node in (claim.before, claim.after)


def _finding(judgement: Judgement, j: Judged) -> Finding:
    before, after = judgement.replay.plan.before, judgement.replay.plan.after
    region, m = _tight(judgement, j.region), j.measured
    guilty = culprit(region, judgement.weights)
    node, program = guilty.node, after if guilty.side == "after" else before
    befores = _names(before, region.operations("before"))
    afters = _names(after, region.operations("after"))
    finding = Finding(
        kind=j.kind,
        before=befores,
        after=afters,
        module_path=provenance.module_path(node) or provenance.module_path(region.claim.before),
        op=provenance.target_name(node),
        introduced=m.introduced,
        total=m.total,
        exact=m.exact,
        floor=m.floor,
        located=max(region.size("before"), region.size("after")) <= SMALL,
        rule=j.rule,
        better=j.better,
        culprit=program.label(node),
        source=provenance.source(node) or provenance.source(region.claim.before),
        outputs=(before.label(region.claim.before), after.label(region.claim.after)),
        frontier=tuple((before.label(p), after.label(q)) for p, q in region.frontier),
        spread=j.spread,
        hint=j.note,
    )
    return dataclasses.replace(finding, explanation=explain(finding))


def _tight(judgement: Judgement, region: Region) -> Region:
    """Return what of a region to show: neither piece reaches beyond a claim that agrees.

    A frontier must be consumed on both sides to be judged from; to be shown, it is enough that one side passes it.
    """
    failing = judgement.settled.guilty.keys()
    claims = [c for c in judgement.alignment.claims if c.cut and c not in failing and c is not region.claim]
    partners = {c.before: c.after for c in claims}, {c.after: c.before for c in claims}
    known = set(region.frontier)
    pieces = []
    for side, partner in zip(("before", "after"), partners, strict=True):
        inside = set(getattr(region, side))
        piece, stack = set(), [getattr(region.claim, side)]
        while stack:
            node = stack.pop()
            if node not in inside or node in piece:
                continue
            if node in partner and node is not getattr(region.claim, side):
                known.add((node, partner[node]) if side == "before" else (partner[node], node))
                continue
            piece.add(node)
            stack.extend(node.all_input_nodes)
        pieces.append(tuple(n for n in getattr(region, side) if n in piece))
    return dataclasses.replace(region, before=pieces[0], after=pieces[1], frontier=tuple(known))


def _names(program: Program, nodes_: Sequence[Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(program.label(n) for n in nodes_))


def _structural(judgement: Judgement, judged: list[Judged]) -> list[tuple[Judged | None, Finding]]:
    """Operations that raise, and outputs of another shape."""
    after = judgement.replay.plan.after
    out: list[tuple[Judged | None, Finding]] = []
    for node, said in judgement.raised.items():
        never = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr" and _is_meta(after.held(n))]
        looks = [f"looks like a weight that was never loaded: {name} is on the meta device" for name in never]
        finding = Finding(
            "structural", (), (after.label(node),), provenance.module_path(node), provenance.target_name(node),
            None, None, None, None, rule="9 structural", hint="; ".join([*looks, f"it raises {said}"]),
            culprit=after.label(node), source=provenance.source(node), outputs=("", after.label(node)),
        )  # fmt: skip
        out.append((None, dataclasses.replace(finding, explanation=explain(finding))))
    dead = judgement.replay.plan.dead()
    for j in judged:
        x, y = j.region.claim.before, j.region.claim.after
        if j.region.claim.output and j.measured.introduced is None and y not in dead:
            said = f"the output {j.region.claim.output!r} has shape {nodes.shape(y)}, before's has {nodes.shape(x)}"
            finding = dataclasses.replace(_finding(judgement, j), kind="structural", rule="9 structural", hint=said)
            out.append((j, dataclasses.replace(finding, explanation=explain(finding))))
    return out


def _is_meta(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _with_hints(
    judgement: Judgement, found: list[tuple[Judged | None, Finding]]
) -> list[tuple[Judged | None, Finding]]:
    """Say of the first semantic findings what they look like."""
    asked = [j for j, f in found if j is not None and f.kind in ("semantic", "nonfinite")][:_MOST_HINTS]
    judgement.replay.forget()
    judgement.replay.fetch_frontiers([j.region for j in asked])
    judgement.replay.fetch_masks([(j.region.claim.before, j.region.claim.after) for j in asked])
    out: list[tuple[Judged | None, Finding]] = []
    for j, finding in found:
        if j is not None and any(j is a for a in asked):
            looks = hint(judgement.replay, j.region, culprit(_tight(judgement, j.region), judgement.weights))
            if looks:
                said = "; ".join(h for h in (looks, finding.hint) if h)
                finding = dataclasses.replace(finding, hint=said)
                finding = dataclasses.replace(finding, explanation=explain(finding))
        out.append((j, finding))
    return out


def _with_cures(
    judgement: Judgement, found: list[tuple[Judged | None, Finding]]
) -> list[tuple[Judged | None, Finding]]:
    if not any(f.kind in GRAVE for _, f in found):
        return found
    asked = [j for j, _ in found[:_MOST_CURES] if j is not None and j.measured.introduced is not None]
    errors = {
        j.region.claim: float("inf") if j.measured.free_class else j.measured.total
        for j in judgement.judged
        if j.region.claim.output and j.measured.total is not None
    }
    identical = [j.region.claim for j in judgement.judged if j.measured.bitwise]
    cures = Cures(judgement.replay, errors, [r for j in asked for r in (j.region, *j.also)], identical)
    out: list[tuple[Judged | None, Finding]] = []
    for j, finding in found:
        share = cures.share([j.region, *j.also]) if j is not None and any(j is a for a in asked) else None
        out.append((j, dataclasses.replace(finding, cures=share)))
    return out


def _accepted(finding: Finding, accept: Sequence[str]) -> Finding:
    for rule in accept:
        pattern, kind, bound = parse_accept(rule)
        names = (*finding.after, finding.module_path, finding.culprit)
        small = finding.introduced is not None and finding.introduced <= bound
        if kind == finding.kind and small and any(fnmatch.fnmatchcase(n, pattern) for n in names):
            return dataclasses.replace(finding, accepted=rule)
    return finding


def parse_accept(rule: str) -> tuple[str, str, float]:
    """Read 'NODE:KIND:BOUND'; NODE may be a glob over node names and module paths. Raises InputError."""
    parts = rule.rsplit(":", 2)
    try:
        pattern, kind, bound = parts[0], parts[1], float(parts[2])
    except (IndexError, ValueError):
        raise InputError(
            f"--accept {rule!r} is not NODE:KIND:BOUND, as in 'model.layers.3.mlp*:precision:1e-2'"
        ) from None
    if kind not in VERDICTS:
        raise InputError(f"--accept {rule!r}: {kind!r} is no kind; the kinds are {', '.join(VERDICTS)}")
    if not bound >= 0:
        raise InputError(f"--accept {rule!r}: the bound {parts[2]} must be a number from 0 on")
    return pattern, kind, bound


# --- the table of regions, outputs, coverage --------------------------------------------------------------------


def _row(judgement: Judgement, j: Judged) -> RegionRow:
    before, after = judgement.replay.plan.before, judgement.replay.plan.after
    region, m = j.region, j.measured
    y = region.claim.after
    value = nodes.tensor_val(y)
    return RegionRow(
        before.label(region.claim.before),
        after.label(y),
        provenance.target_name(y),
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
            )
        )
    return rows


def _coverage(judgement: Judgement, judged: list[Judged]) -> Coverage:
    before, after = judgement.replay.plan.before, judgement.replay.plan.after
    making = [n for n in after.live if nodes.makes_values(n)]
    sure = [j for j in judged if j.kind not in ("unknown", "pardoned")]
    inside = {n for j in sure for n in j.region.after}
    resolved = {n for j in sure if j.region.size("after") <= SMALL for n in j.region.after}
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
        unmatched=_names(after, unmatched),
        eliminated=_names(before, [n for n in making_before if n not in seen_before]),
    )


def _share(part: int, whole: int) -> float:
    # a graph that computes nothing has nothing that could be left out
    return part / whole if whole else 1.0


def _largest(region: Region | None, after: Program) -> str:
    return f"{after.label(region.claim.after)} ({region.size('after')} operations)" if region else ""

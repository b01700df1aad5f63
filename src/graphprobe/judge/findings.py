"""What is wrong becomes findings: where, what kind, how large, what it looks like, and what would cure it."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.errors import InputError
from graphprobe.judge.culprit import culprit, rounding
from graphprobe.judge.cure import Cures
from graphprobe.judge.explain import explain
from graphprobe.judge.hints import hint
from graphprobe.judge.judging import Judged, Judgement
from graphprobe.judge.merging import Found, merged, tight
from graphprobe.lanes import remembered
from graphprobe.lanes.regions import SMALL, Region
from graphprobe.program import Program
from graphprobe.records import VERDICTS, Finding

GRAVE = ("quantization", "precision", "semantic", "nonfinite", "structural")
_MOST_CURES = 16  # each costs one forward run of after
_MOST_HINTS = 8  # each costs some evaluations of its region
_MOST_ROUNDING = 10  # where nothing graver stands, so many of the largest roundings are listed


def findings_of(judgement: Judgement, judged: list[Judged], accept: Sequence[str]) -> list[Finding]:
    """Return the findings in the order of after; where nothing graver stands, the largest roundings."""
    found = _structural(judgement, judged)
    found += [(j, _finding(judgement, j)) for j in judged if j.kind in GRAVE]
    if not found:
        loud = [j for j in judged if j.kind == "rounding" and not j.measured.reproduced]
        loud.sort(key=lambda j: -(j.measured.introduced or 0))
        chosen = loud[:_MOST_ROUNDING]
        found = [(j, _finding(judgement, j)) for j in judged if any(j is c for c in chosen)]
    order = judgement.replay.plan.after.order
    found.sort(key=lambda pair: order.get(pair[0].region.claim.after, 0) if pair[0] else 0)
    found = _with_cures(judgement, _with_hints(judgement, merged(judgement, found)))
    return [_accepted(finding, accept) for _, finding in found]


def _finding(judgement: Judgement, j: Judged) -> Finding:
    before, after = judgement.replay.plan.before, judgement.replay.plan.after
    region, m = tight(judgement, j.region), j.measured
    guilty = culprit(region, judgement.weights)
    if j.kind in ("rounding", "precision"):
        guilty = rounding(guilty, region)
    node, program = guilty.node, after if guilty.side == "after" else before
    befores = names(before, region.operations("before"))
    afters = names(after, region.operations("after"))
    finding = Finding(
        kind=j.kind,
        before=befores,
        after=afters,
        module_path=_home(node, region),
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
        details=m.details,
    )
    return dataclasses.replace(finding, explanation=explain(finding))


def names(program: Program, nodes_: Sequence[Node]) -> tuple[str, ...]:
    """Return the names users know, each once."""
    return tuple(dict.fromkeys(program.label(n) for n in nodes_))


def _structural(judgement: Judgement, judged: list[Judged]) -> Found:
    """Operations that raise, and outputs of another shape."""
    after = judgement.replay.plan.after
    out: Found = []
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


def _with_hints(judgement: Judgement, found: Found) -> Found:
    """Say of the first semantic findings what they look like."""
    asked = [j for j, f in found if j is not None and f.kind in ("semantic", "nonfinite")][:_MOST_HINTS]
    judgement.replay.forget(beyond=remembered.LIMIT)  # the judge may just have fetched these
    judgement.replay.fetch_frontiers([j.region for j in asked])
    judgement.replay.fetch_masks([(j.region.claim.before, j.region.claim.after) for j in asked])
    out: Found = []
    for j, finding in found:
        if j is not None and any(j is a for a in asked):
            guilty = culprit(tight(judgement, j.region), judgement.weights)
            looks, proved = hint(judgement.replay, j.region, guilty)
            if proved is not None and proved is not guilty.node:
                finding = _named(judgement, finding, proved, j.region)
            if looks:
                said = "; ".join(h for h in (looks, finding.hint) if h)
                finding = dataclasses.replace(finding, hint=said)
                finding = dataclasses.replace(finding, explanation=explain(finding))
        out.append((j, finding))
    return out


def _named(judgement: Judgement, finding: Finding, node: Node, region: Region) -> Finding:
    """Name the operation that a trial has shown to be to blame, in place of the one that had no partner."""
    plan = judgement.replay.plan
    label = (plan.after if node in plan.after.order else plan.before).label(node)
    return dataclasses.replace(
        finding, op=provenance.target_name(node), culprit=label, module_path=_home(node, region),
        source=provenance.source(node) or finding.source,
    )  # fmt: skip


def _home(node: Node, region: Region) -> str:
    """Return the module of an operation; of one that no capture has placed, that of the region it is in."""
    path = provenance.module_path(node)
    if path or not provenance.module_stack(node):
        return path or provenance.module_path(region.claim.before)
    # at the root of a model of modules that is said; a model without any tells nothing of where it is
    modular = any(provenance.module_path(n) for n in node.graph.nodes)
    return "" if modular else provenance.module_path(region.claim.before)


def _with_cures(judgement: Judgement, found: Found) -> Found:
    if not any(f.kind in GRAVE for _, f in found):
        return found
    asked = [j for j, _ in found[:_MOST_CURES] if j is not None and j.measured.introduced is not None]
    errors = {
        j.region.claim: float("inf") if j.measured.free_class else j.measured.total
        for j in judgement.judged
        if j.region.claim.output and j.measured.total is not None
    }
    identical = [j.region.claim for j in judgement.judged if j.measured.bitwise]
    cures = Cures(judgement.replay, errors, [r for j in asked for r in j.replaced], identical)
    out: Found = []
    for j, finding in found:
        share = cures.share(j.replaced) if j is not None and any(j is a for a in asked) else None
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

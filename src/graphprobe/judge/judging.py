"""The judge: regions are measured, suspects get a second look, failing claims are settled, every region gets a kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Alignment, Claim
from graphprobe.judge import nonfinite, opaque, precision, steadiness
from graphprobe.judge.born import nan_is_told
from graphprobe.judge.derived import Looks
from graphprobe.judge.rows import Measured, read
from graphprobe.judge.same import RULE, Sameness
from graphprobe.judge.ties import native_ties
from graphprobe.judge.trial import COMPENSATED, Settled
from graphprobe.judge.withdraw import Withdrawal
from graphprobe.lanes.plan import Plan
from graphprobe.lanes.regions import Region, regions_of
from graphprobe.lanes.replay import Replay
from graphprobe.lanes.run import Measurements, measure
from graphprobe.lanes.same import Weights, isomorphic, repeats, substitutes
from graphprobe.program import Program

#: Kinds that stand against a version, unless the operation differs from itself.
STANDING = ("semantic", "precision", "nonfinite")
_CHUNK = 64  # suspects whose frontier values are held at once
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Judged:
    """One region with its kind, and the rule that decided."""

    measured: Measured
    kind: str  # a verdict, or "pardoned"
    rule: str = ""
    spread: float | None = None
    note: str = ""
    cured_by: tuple[Region, ...] = ()  # what to replace where the finding stands for more than its own region
    better: str | None = None
    agreed: bool = False  # of a pardoned one: it agreed by itself, and only lay between two halves that compensate

    @property
    def region(self) -> Region:
        """The region."""
        return self.measured.region

    @property
    def replaced(self) -> tuple[Region, ...]:
        """The regions to run before's piece in, to see what the finding is to blame for."""
        return self.cured_by or (self.region,)


@dataclass
class Judgement:
    """All that the judge found out."""

    judged: list[Judged]
    alignment: Alignment  # what is left after withdrawals
    settled: Settled
    raised: dict[Node, str]
    native_only: dict[Any, str]
    replay: Replay
    weights: Weights
    notes: list[str] = field(default_factory=list)


def judge(
    before: Program,
    after: Program,
    alignment: Alignment,
    inputs: Mapping[str, Any],
    *,
    redrawn: Mapping[str, Any] | None = None,
    leaks: bool = False,
    exact: str = "auto",
    detailed: bool = False,
    progress: Progress | None = None,
) -> Judgement:
    """Run the lanes and judge every region. `exact` is "auto", "always" or "never".

    `redrawn` are inputs with fresh padding: what moves with it is left out. If it `leaks` into what counts of after,
    only what moves of before is.
    """
    weights = Weights(before, after)

    def measured(alignment: Alignment) -> tuple[Plan, list[Measured], Measurements]:
        lanes = "" if redrawn is None else "before" if leaks else "both"
        chosen = Plan(before, after, (), redraw=lanes, detailed=detailed)
        return _measure(chosen, alignment, inputs, redrawn, exact, weights, progress)

    plan, rows, measurements = measured(alignment)
    replay = Replay(plan, inputs, redrawn, measurements.known)
    looks = Looks(replay)
    answers = _second_look(looks, alignment, [r for r in rows if r.suspect], progress)
    withdrawal = Withdrawal(replay, alignment, rows, answers, looks, weights)
    settled = withdrawal.settle()
    answers |= withdrawal.failing  # a frontier may have moved since the first look
    pardoned = [r for r in rows if r.region.claim in settled.pardoned]
    if pardoned:  # below a pardon the frontiers have changed: measure again on the new ones
        plan, rows, measurements = measured(withdrawal.active)
        replay = Replay(plan, inputs, redrawn, measurements.known)
        answers = {c: a for c, a in answers.items() if c in settled.guilty}
        looks = Looks(replay)
        again = [r for r in rows if r.suspect and r.region.claim not in answers]
        answers |= _second_look(looks, withdrawal.active, again, progress)
    if looks.wider:  # what agrees from further up is measured from there
        wide = _measure_regions(plan, list(looks.wider.values()), dict(inputs), redrawn, weights)
        rows = [wide.get(r.region.claim, r) for r in rows]
    judged = [_kind(replay, row, answers, settled) for row in rows]
    judged, notes = _steady(replay, judged)
    judged = nan_is_told(replay, judged, STANDING)
    for row in pardoned:
        why = settled.pardoned[row.region.claim]
        agreed = why == COMPENSATED and row.region.claim not in withdrawal.failing
        judged.append(Judged(row, "pardoned", "5 withdrawal", note=why, agreed=agreed))
    return Judgement(
        judged, withdrawal.active, settled, measurements.raised, measurements.native_only, replay, weights, notes
    )


def _steady(replay: Replay, judged: list[Judged]) -> tuple[list[Judged], list[str]]:
    """Where something stands, or one program made other bits, repeat: what differs from itself is no finding."""

    def asked(j: Judged) -> bool:
        differs = j.measured.isomorphic and not j.measured.reproduced and j.measured.introduced is not None
        return differs or j.kind in STANDING

    marked = steadiness.unsteady(replay, [j.region for j in judged if asked(j)])
    if not marked:
        return judged, []
    out = []
    for j in judged:
        why = steadiness.excused(replay, j.region, marked) if asked(j) else None
        if why is not None:
            j = dataclasses.replace(j, kind=why[0], rule=steadiness.RULE, note=why[1], better=None)
        out.append(j)
    return out, [steadiness.words(marked)]


def _measure(
    plan: Plan,
    alignment: Alignment,
    inputs: Mapping[str, Any],
    redrawn: Mapping[str, Any] | None,
    exact: str,
    weights: Weights,
    progress: Progress | None,
) -> tuple[Plan, list[Measured], Measurements]:
    """Measure the regions of an alignment, as an empty plan wants it."""
    regions = regions_of(plan.before, plan.after, alignment)
    repeated = {r for r in regions if repeats(r, weights)} if exact != "always" else set()
    same = {r for r in regions if r in repeated or isomorphic(r, weights)}  # what repeats is one program, too
    chosen = {"always": set(regions), "never": set(), "auto": set(regions) - same}[exact]
    tick = (lambda row: progress(row, len(regions), "comparing")) if progress else None
    substituted = substitutes(regions, weights)
    plan = dataclasses.replace(
        plan, regions=regions, exact_regions=chosen, repeated=repeated, same_weight=substituted, tick=tick
    )
    found = measure(plan, dict(inputs), dict(redrawn) if redrawn else None)
    plan = dataclasses.replace(plan, broken=set(found.raised), native_only=set(found.native_only), tick=None)
    rows = [read(region, *pair, isomorphic=region in same) for region, pair in zip(regions, found.each(), strict=True)]
    return plan, _unrepeated(rows, repeated), found


def _unrepeated(rows: list[Measured], repeated: set[Region]) -> list[Measured]:
    """Where the forced lane was left out, see by the free lane whether it would have repeated before's bits.

    What starts from bits that are equal on both sides and ends in others differs from itself, or is computed by
    another kernel, because its operands lie otherwise in memory.
    """
    differing = {(r.region.claim.before, r.region.claim.after) for r in rows if not r.identical}
    return [
        dataclasses.replace(row, reproduced=False)
        if row.region in repeated and not row.identical and not differing.intersection(row.region.frontier)
        else row
        for row in rows
    ]


def _measure_regions(
    plan: Plan, regions: list[Region], inputs: dict[str, Any], redrawn: Mapping[str, Any] | None, weights: Weights
) -> dict[Claim, Measured]:
    """Measure a few regions by themselves, in exact arithmetic, too."""
    same = {**plan.same_weight, **substitutes(regions, weights)}
    mine = dataclasses.replace(plan, regions=regions, exact_regions=set(regions), same_weight=same)
    found = measure(mine, inputs, dict(redrawn) if redrawn else None)
    return {region.claim: read(region, *pair) for region, pair in zip(regions, found.each(), strict=True)}


def _second_look(
    looks: Looks, alignment: Alignment, suspects: list[Measured], progress: Progress | None
) -> dict[Claim, Sameness]:
    replay = looks.replay
    answers: dict[Claim, Sameness] = {}
    for start in range(0, len(suspects), _CHUNK):
        chunk = [s.region for s in suspects[start : start + _CHUNK]]
        if progress:
            progress(start, len(suspects), "second look")
        replay.forget()
        replay.fetch_frontiers(chunk)
        replay.fetch_masks((r.claim.before, r.claim.after) for r in chunk)
        for region in chunk:
            failing = {c for c, a in answers.items() if a.same is False}
            answers[region.claim] = looks.ask(region, alignment, failing)
    return answers


def _kind(replay: Replay, row: Measured, answers: dict[Claim, Sameness], settled: Settled) -> Judged:
    """Ask the rules in the order of their gravity."""
    claim = row.region.claim
    if row.introduced is None:
        return Judged(row, "unknown", "9 structural", note="could not be run or has another shape")
    answer = answers.get(claim)
    if answer is not None and answer.left_out:
        row = dataclasses.replace(row, left_out=row.left_out + answer.left_out)
    spread = answer.spread if answer else (0.0 if row.exact is not None else None)
    if claim in settled.guilty or (answer is not None and answer.same is False):
        return _guilty(row, answer, settled.guilty.get(claim, ""))
    if not row.reproduced and (claim in settled.unknown or (answer is not None and answer.same is None)):
        reason = settled.unknown.get(claim) or (answer.reason if answer else "")
        return Judged(row, "unknown", opaque.RULE, None, reason)
    if answer is not None and answer.kind:
        return _excused(replay, row, answer)
    found = _nonfinite(replay, row, spread)
    if found is not None:
        return found
    if row.reproduced:
        kind = "identical" if row.identical else "rounding"
        return Judged(row, kind, "same program" if row.isomorphic else "1 same function", spread)
    if row.exact is None:
        return Judged(row, "unknown", "exact lanes did not run", None)
    if row.isomorphic:
        return Judged(row, "rounding", "same program", spread, note=_other_bits(row.region))
    judged = _rounding_or_precision(replay, row, spread)
    if answer is None or not answer.note:
        return judged
    return dataclasses.replace(judged, note="; ".join(w for w in (judged.note, answer.note) if w))


def _other_bits(region: Region) -> str:
    """Say why one program makes other bits of equal values, as far as it shows; what differs from itself is marked."""
    pairs = [(nodes.tensor_val(p), nodes.tensor_val(q), q) for p, q in region.frontier]
    moved = [q.name for x, y, q in pairs if x is not None and y is not None and _strides(x) != _strides(y)]
    why = f": {', '.join(moved)} lies otherwise in memory" if moved else ""
    return f"one program makes other bits of equal values{why}"


def _strides(value: torch.Tensor) -> tuple[int, ...]:
    """Return the strides that matter: those of dimensions of 1 do not."""
    return tuple(step for step, size in zip(value.stride(), value.shape, strict=True) if size != 1)


def _guilty(row: Measured, answer: Sameness | None, why: str) -> Judged:
    if answer is None or answer.same is not False:
        return Judged(row, "semantic", f"{RULE} ({why})" if why else RULE, answer.spread if answer else None, why)
    kind = answer.kind or "semantic"
    rule = f"{answer.rule} ({why})" if why else answer.rule
    note = "; ".join(w for w in (_where(answer, why), answer.note) if w)
    return Judged(row, kind, rule, _spread(answer), note, better=answer.better)


def _excused(replay: Replay, row: Measured, answer: Sameness) -> Judged:
    """A rule other than the first has explained the difference: rounding, or quantisation that is not too coarse."""
    if answer.kind == "quantization":
        replay.fetch_frontiers([row.region])
        replay.fetch_masks([(row.region.claim.before, row.region.claim.after)])
        ratio = precision.ratio(replay, row, quantized=True)
        if ratio > precision.BOUND:
            note = f"R = {ratio:.1f} beside the quantisation; {answer.note}"
            return Judged(row, "precision", "2 precision", answer.spread, note, better="before")
    return Judged(row, answer.kind, answer.rule, _spread(answer), answer.note, better=answer.better)


def _spread(answer: Sameness) -> float | None:
    return None if answer.rule == opaque.RULE else answer.spread  # what R alone decides has no S


def _where(answer: Sameness | None, note: str) -> str:
    return "; ".join(
        w for w in (note, f"worst at {answer.where}" if answer and answer.where not in ("", "element ()") else "") if w
    )


def _nonfinite(replay: Replay, row: Measured, spread: float | None) -> Judged | None:
    if row.forced_class == 0 or row.forced_nonfinite == row.before_nonfinite:
        return None
    if row.forced_nonfinite > row.before_nonfinite:
        given = nonfinite.beyond(replay, row.region)
        if given is not None:
            note = f"what before has at {replay.plan.after.label(given)} is too large for the dtype of after"
            return Judged(row, "rounding", nonfinite.RULE, spread, note=note, better="before")
        return Judged(row, "nonfinite", "8 non-finite", spread, better="before")
    return Judged(row, "rounding", "8 non-finite", spread, note="before is not finite here, after is", better="after")


def _rounding_or_precision(replay: Replay, row: Measured, spread: float | None) -> Judged:
    better = None
    if row.floor is not None and row.forced_floor is not None and row.forced_floor < row.floor / 2:
        better = "after"
    if row.precision_ratio <= precision.BOUND:
        return Judged(row, "rounding", "2 precision", spread, better=better)
    replay.fetch_frontiers([row.region])
    replay.fetch_masks([(row.region.claim.before, row.region.claim.after)])
    ratio = precision.ratio(replay, row)
    if ratio > precision.BOUND and (ties := native_ties(replay, row)) is not None:
        return Judged(row, "rounding", "6 tie", spread, note=ties, better=better)
    if ratio > precision.BOUND:
        return Judged(row, "precision", "2 precision", spread, note=f"R = {ratio:.1f}", better="before")
    return Judged(row, "rounding", "2 precision", spread, note=f"R = {ratio:.1f}", better=better)

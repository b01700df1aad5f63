"""The search through Inductor: which stage, which pass, which match, which operation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule

from graphprobe.bisection import matching, search
from graphprobe.bisection.inductor import code, eager, recording, snapshots
from graphprobe.bisection.inductor.outputs import Reference
from graphprobe.bisection.inductor.recording import Plan, Recording
from graphprobe.bisection.inductor.snapshots import Piece, Snapshot
from graphprobe.bisection.oracle import Answer, compare
from graphprobe.bisection.records import Bisection, BisectStep
from graphprobe.bisection.search import BAD, GOOD, UNKNOWN
from graphprobe.records import VERDICTS, Report

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Guilt:
    """One wrong step."""

    label: str
    report: Report
    match: str | None = None
    matches: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Segment:
    """Neighbouring graphs of one piece that are called in the same way."""

    snapshots: tuple[Snapshot, ...]
    graphs: tuple[GraphModule, ...]
    inputs: tuple[Any, ...]


def segments_of(piece: Piece) -> list[Segment]:
    """Return one segment, two where AOTAutograd has changed the signature beyond what can be adapted."""
    border = piece.boundary
    outer, inner = tuple(piece.snapshots[:border]), tuple(piece.snapshots[border:])
    graphs = tuple(snapshots.in_aten(s.gm, piece.inputs or ()) for s in outer)
    if not inner or piece.inputs is None:
        return [Segment(outer, graphs, piece.inputs or ())]
    if piece.adapter is not None:
        names = [str(n.target) for n in outer[0].gm.graph.find_nodes(op="placeholder")]
        adapted = tuple(piece.adapter.adapted(s.gm, names) for s in inner)
        return [Segment(outer + inner, graphs + adapted, piece.inputs)]
    second = Segment(inner, tuple(s.gm for s in inner), piece.inner_inputs or ())
    return [Segment(outer, graphs, piece.inputs), second]


def reproduced(model: str, check: str, first: int | None = None) -> str:
    """Return the command that runs Inductor's steps with a check; `first` lowers so many operations only."""
    if model:
        run = f"graphprobe run {model} --pipeline inductor --check {check}"
    else:
        run = f"print(graphprobe.run(model, args, kwargs, pipeline='inductor', check=('{check}',)))"
    if first is None:
        return run
    switch = {"BACKEND": "inductor", "SUBSYSTEM": "lowerings", "MAX": str(first - 1)}
    words = " ".join(f"TORCH_BISECT_{name}={value}" for name, value in switch.items())
    return f"{words} {run}" if model else f"{run}  # with {words}"


@dataclass
class Inquiry:
    """One bisection of one compiled model."""

    recorded: Recording
    options: dict[str, Any]
    command: str = ""  # a shell's words for the model
    progress: Progress | None = None
    steps: list[BisectStep] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)  # of what was found good
    _answers: dict[str, Answer] = field(default_factory=dict)

    def run(self) -> Bisection:
        """Search, and say what was found."""
        found = list(self._guilty())
        labels = tuple(dict.fromkeys(guilt.label for guilt in found))
        unknown = any(step.verdict == UNKNOWN for step in self.steps)
        return Bisection(
            verdict=BAD if found else UNKNOWN if unknown else GOOD,
            transform=found[0].label if found else None,
            transforms=labels,
            together=tuple((label,) for label in labels),
            match=found[0].match if found else None,
            matches=found[0].matches if found else (),
            report=found[0].report if found else self._whole(),
            steps=tuple(self.steps),
            notes=tuple(self.notes),
            pipeline="inductor",
        )

    def _guilty(self) -> Iterator[Guilt]:
        if not self.recorded.pieces:
            self.notes.append("torch.compile found nothing to compile: eager ran in its place")
            return
        traced = list(self._traced())
        yield from traced
        for piece in self.recorded.pieces:
            found = list(self._in_graphs(piece))
            yield from found
            if not found and not traced:
                yield from self._in_code(piece)

    # --- eager and Dynamo --------------------------------------------------------------------------------------------

    def _traced(self) -> Iterator[Guilt]:
        """The model itself against the graphs that Dynamo has traced of it."""
        started = time.perf_counter()
        self._say("eager against the graphs that Dynamo has traced")
        found = eager.against_traced(self.recorded)
        self._told("eager against the graphs that Dynamo has traced", found.answer, started)
        self.notes += found.notes
        if found.answer.verdict == BAD and found.answer.report is not None:
            yield Guilt(found.stage, found.answer.report, found.match, (found.match,) if found.match else ())

    # --- FX graphs ---------------------------------------------------------------------------------------------------

    def _in_graphs(self, piece: Piece) -> Iterator[Guilt]:
        segments = segments_of(piece)
        for i, segment in enumerate(segments):
            if i:
                yield from self._across(piece)
            yield from self._in_segment(piece, segment)

    def _in_segment(self, piece: Piece, segment: Segment) -> Iterator[Guilt]:
        base, last = 0, len(segment.graphs) - 1
        while base < last:
            whole = self._diff(piece, segment, base, last)
            if whole.verdict == GOOD:
                self.reports += [whole.report] if whole.report is not None else []
                return
            guilty = self._first_guilty(piece, segment, base, whole)
            if guilty is None:
                return
            yield self._guilt(piece, segment, guilty)
            base = guilty

    def _first_guilty(self, piece: Piece, segment: Segment, base: int, whole: Answer) -> int | None:
        """Return the first step that is wrong on its own; a step is what decides, whatever larger leaps look like."""
        last = len(segment.graphs) - 1
        if whole.verdict == BAD:
            low, high = search.first_bad(base, last, lambda k: self._diff(piece, segment, base, k).verdict)
            if high == low + 1 and self._diff(piece, segment, low, high).verdict == BAD:
                return high
        answers = [self._diff(piece, segment, k - 1, k) for k in range(base + 1, last + 1)]
        for k, answer in enumerate(answers, base + 1):
            if answer.verdict == BAD:
                return k
        worst = max((a.report for a in answers if a.report is not None), key=lambda r: VERDICTS.index(r.verdict))
        self.reports.append(worst)
        if all(answer.verdict == GOOD for answer in answers):
            self.notes.append("every step is right on its own, and that decides: the leap over all is harder to judge")
        return None

    def _diff(self, piece: Piece, segment: Segment, i: int, j: int) -> Answer:
        """Compare two graphs of a segment; asked again, it is remembered."""
        what = f"{self._name(piece)}{segment.snapshots[i].label} against {segment.snapshots[j].label}"
        known = self._answers.get(what)
        if known is not None:
            return known
        self._say(what)
        started = time.perf_counter()
        events = tuple(e for s in segment.snapshots[i + 1 : j + 1] for e in s.replacements)
        answer = compare(segment.graphs[i], segment.graphs[j], segment.inputs, {}, events, self.options)
        self._answers[what] = answer
        self._told(what, answer, started, check="diff" if j == i + 1 else "total")
        return answer

    def _guilt(self, piece: Piece, segment: Segment, k: int) -> Guilt:
        snapshot = segment.snapshots[k]
        report = self._diff(piece, segment, k - 1, k).report
        assert report is not None
        findings = tuple(dataclasses.replace(f, transform=snapshot.label) for f in report.findings)
        report = dataclasses.replace(report, findings=findings)
        culprits = matching.all_of(report, ())
        if not snapshot.hits:
            return Guilt(snapshot.label, report, culprits[0] if culprits else None, culprits)
        hit = self._hit(piece, segment, k)
        return Guilt(snapshot.label, report, hit, (hit,))

    def _hit(self, piece: Piece, segment: Segment, k: int) -> str:
        """Find the first guilty pattern match of a pass: it is run again with its first n matches only."""
        snapshot = segment.snapshots[k]
        if len(snapshot.hits) == 1:
            return str(snapshot.hits[0])

        def limited(count: int) -> str:
            what = f"{self._name(piece)}{snapshot.label} limited to its first {count} of {len(snapshot.hits)} matches"
            self._say(what)
            started = time.perf_counter()
            answer = self._limited(piece, segment, k, count)
            self._told(what, answer, started)
            return answer.verdict

        _, high = search.first_bad(0, len(snapshot.hits), limited)
        return str(snapshot.hits[high - 1])

    def _limited(self, piece: Piece, segment: Segment, k: int, count: int) -> Answer:
        snapshot = segment.snapshots[k]
        plan = Plan(limit=(snapshot.key, count), codegen=False, config=self.recorded.recorder.plan.config)
        try:
            again = recording.record(self.recorded.model, self.recorded.args, self.recorded.kwargs, plan)
        except recording.Interrupted as error:
            return Answer(UNKNOWN, str(error))
        twin = next((p for p in again.pieces if p.number == piece.number), None)
        graphs = segments_of(twin) if twin is not None else []
        for one in graphs:
            for place, other in enumerate(one.snapshots):
                if other.key == snapshot.key:
                    before = one.graphs[place - 1]
                    return compare(before, one.graphs[place], one.inputs, {}, other.replacements, self.options)
        return Answer(GOOD, "the pass then changes nothing")

    def _across(self, piece: Piece) -> Iterator[Guilt]:
        """AOTAutograd has changed the signature: only outputs can be compared there."""
        started = time.perf_counter()
        what = f"{self._name(piece)}the outputs before and after aot"
        self.notes.append(f"the graph after aot is compared by its outputs alone: {piece.unadapted}")
        try:
            found = code.outputs_after_aot(self.recorded, piece)
        except Exception as error:
            self._told(what, Answer(UNKNOWN, f"{type(error).__name__}: {error}"), started)
            return
        self._told(what, found, started)
        if found.verdict == BAD and found.report is not None:
            yield Guilt("aot", found.report)

    # --- generated code ----------------------------------------------------------------------------------------------

    def _in_code(self, piece: Piece) -> Iterator[Guilt]:
        """The last FX graph against what the generated code returns, then the call around it."""
        started = time.perf_counter()
        what = f"{self._name(piece)}the last graph against the generated code"
        self._say(what)
        try:
            reference = Reference.of(piece.snapshots[-1].gm, piece.inner_inputs or ())
        except Exception as error:  # the graph cannot be run in exact arithmetic
            self._told(what, Answer(UNKNOWN, f"{type(error).__name__}: {error}"), started)
            return
        found = code.judge(reference, piece.inner_outputs or (), "the generated code")
        self._told(what, found, started)
        if found.verdict == BAD:
            yield self._code_guilt(piece, reference, found)
            return
        self.reports += [found.report] if found.report is not None else []
        yield from self._at_runtime(piece)

    def _code_guilt(self, piece: Piece, reference: Reference, found: Answer) -> Guilt:
        report = found.report
        assert report is not None
        search_ = code.Lowerings(self.recorded, piece, reference, self._told, self._say)
        place = search_.culprit()
        self.notes += search_.mended_by()
        report = code.located(report, reference.gm, place)
        stage = "eager" if report.first is not None and report.first.better == "after" else "codegen"
        match = f"{report.first.op} at {place}" if place and report.first is not None else None
        return Guilt(stage, report, match, (match,) if match else ())

    def _at_runtime(self, piece: Piece) -> Iterator[Guilt]:
        started = time.perf_counter()
        what = f"{self._name(piece)}what the compiled graph returns to its caller"
        self._say(what)
        try:
            reference = Reference.of(piece.snapshots[0].gm, piece.inputs or ())
        except Exception as error:
            self._told(what, Answer(UNKNOWN, f"{type(error).__name__}: {error}"), started)
            return
        for when in ("", ", called again"):
            if when:
                self.recorded.run(keep=True)
            found = code.judge(reference, piece.outputs or (), f"the compiled graph{when}")
            self._told(f"{what}{when}", found, started)
            if found.verdict == BAD and found.report is not None:
                yield Guilt("runtime", found.report)
                return

    # --- words -------------------------------------------------------------------------------------------------------

    def _whole(self) -> Report | None:
        """Return the gravest report of what was judged, with what is to say of all."""
        if not self.reports:
            return None
        worst = max(self.reports, key=lambda report: VERDICTS.index(report.verdict))
        notes = tuple(dict.fromkeys(note for report in (worst, *self.reports) for note in report.notes))
        graphs = [report for report in self.reports if report.regions]
        shown = max(graphs, key=lambda report: VERDICTS.index(report.verdict)) if graphs else worst
        return dataclasses.replace(shown, verdict=worst.verdict, notes=notes)

    def _name(self, piece: Piece) -> str:
        return f"graph {piece.number}: " if len(self.recorded.pieces) > 1 else ""

    def _told(
        self, what: str, answer: Answer, started: float, *, check: str = "diff", first: int | None = None
    ) -> None:
        seconds, command = time.perf_counter() - started, reproduced(self.command, check, first)
        self.steps.append(BisectStep(what, (), answer.verdict, answer.reason, seconds, command=command))

    def _say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(len(self.steps), len(self.steps) + 4, what)

"""The search through Inductor: which stage, which pass, which match, which operation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from graphprobe import provenance
from graphprobe.bisection import matching, search
from graphprobe.bisection.choice import CODE, EAGER, RUNTIME, Choice
from graphprobe.bisection.inductor import code
from graphprobe.bisection.inductor.lowerings import LoweringHunt
from graphprobe.bisection.inductor.recording import Recording
from graphprobe.bisection.inductor.segments import Segment
from graphprobe.bisection.inductor.snapshots import IN_ATEN, Piece
from graphprobe.bisection.inductor.trials import Trials
from graphprobe.bisection.oracle import Answer
from graphprobe.bisection.records import Bisection, BisectStep
from graphprobe.bisection.search import BAD, GOOD, UNKNOWN
from graphprobe.records import VERDICTS, Report

Progress = Callable[[int, int, str], None]
_WHOLE = "eager against the compiled model, end to end"


@dataclass(frozen=True)
class Guilt:
    """One wrong step."""

    label: str
    report: Report
    match: str | None = None
    matches: tuple[str, ...] = ()


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

    def __post_init__(self) -> None:
        self.trials = Trials(self.recorded, self.options)

    def run(self) -> Bisection:
        """Search, and say what was found."""
        return self._result(list(self._guilty()))

    def run_graphs(self) -> Bisection:
        """Search among the FX graphs alone."""
        return self._result([guilt for piece in self.recorded.pieces for guilt in self._in_graphs(piece)])

    def _result(self, found: list[Guilt]) -> Bisection:
        labels = tuple(dict.fromkeys(guilt.label for guilt in found))
        # the steps decide; the leap over all of them is a net for what no step can see
        unknown = any(step.verdict == UNKNOWN for step in self.steps if step.what != _WHOLE)
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
        if self.trials.eager.first is None:
            self.notes.append(f"eager itself raises {self.trials.eager.error}")
            yield from self._end_to_end()
            return
        found = list(self._traced())
        yield from found
        for piece in self.recorded.pieces:
            wrong = list(self._in_graphs(piece))
            found += wrong
            yield from wrong
            if not found:
                wrong = list(self._in_code(piece))
                found += wrong
                yield from wrong
        if not found and not self.trials.is_random:
            yield from self._end_to_end()

    # --- eager and Dynamo --------------------------------------------------------------------------------------------

    def _traced(self) -> Iterator[Guilt]:
        """The model itself against the graphs that Dynamo has traced of it."""
        what = "eager against the graphs that Dynamo has traced"
        answer = self._ask(what, Choice(EAGER, "dynamo"))
        self.notes += self.trials.traced.notes
        if answer.verdict == BAD and answer.report is not None:
            yield Guilt(self.trials.traced.stage, answer.report)

    def _end_to_end(self) -> Iterator[Guilt]:
        """What a caller sees of the model and of the compiled one: nothing may be left that no step explains."""
        whole = self._ask(_WHOLE, Choice(EAGER, RUNTIME))
        if whole.verdict == UNKNOWN:
            self.notes.append(f"eager and the compiled model were not compared end to end: {whole.reason}")
        if whole.verdict != BAD:
            return
        stops = self.trials.stops()

        def verdict(stop: int) -> str:
            label, graph, _ = stops[stop]
            where = f"{self._name(graph)}{label}"
            return self._ask(f"eager against the model stopped at {where}", Choice(EAGER, label, graph)).verdict

        if verdict(0) == BAD:
            label, graph = stops[0][:2]
        else:
            low, high = search.first_bad(0, len(stops) - 1, verdict) if verdict(len(stops) - 1) == BAD else (-1, -1)
            label, graph = stops[high][:2] if high >= 0 else (RUNTIME, 0)
            if high - low > 1:
                self.notes.append(f"the stops between {stops[low][0]} and {label} cannot be judged")
        report = self.trials.ask(Choice(EAGER, label, graph)).report if label != RUNTIME else whole.report
        assert report is not None
        yield Guilt(label, report)

    # --- FX graphs ---------------------------------------------------------------------------------------------------

    def _in_graphs(self, piece: Piece) -> Iterator[Guilt]:
        for i, segment in enumerate(self.trials.segments(piece)):
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
        """Compare two graphs of a segment."""
        before, after = segment.labels[i], segment.labels[j]
        return self._ask(f"{self._name(piece.number)}{before} against {after}", Choice(before, after, piece.number))

    def _guilt(self, piece: Piece, segment: Segment, k: int) -> Guilt:
        snapshot, label = segment.snapshots[k], segment.labels[k]
        report = self._diff(piece, segment, k - 1, k).report
        assert report is not None
        findings = tuple(dataclasses.replace(f, transform=label) for f in report.findings)
        report = dataclasses.replace(report, findings=findings)
        if snapshot.hits:
            hit = self._hit(piece, segment, k)
            return Guilt(label, report, hit, (hit,))
        places = self._places(report, segment, k)
        return Guilt(label, report, places[0] if places else None, places)

    def _places(self, report: Report, segment: Segment, k: int) -> tuple[str, ...]:
        """Name what a step without pattern matches has rewritten: its own node, else one of the graph before it."""
        snapshot = segment.snapshots[k]
        was, now = ({n.name: n for n in graph.graph.nodes} for graph in segment.graphs[k - 1 : k + 1])
        made = {*snapshot.created, *snapshot.rewritten} if snapshot.stage in IN_ATEN else set()
        counted = ", ".join(snapshot.counted)
        found = []
        for finding in [report.first, *report.findings] if report.first is not None else []:
            node = now.get(finding.culprit) if finding.culprit in made else None
            node = node or next((was[name] for name in reversed(finding.before) if name in was), None)
            if finding is not None and finding.kind == report.verdict and node is not None:
                found.append(f"{counted or provenance.target_name(node)} at {node.name}")
        return tuple(dict.fromkeys(found)) or matching.all_of(report, ())

    def _hit(self, piece: Piece, segment: Segment, k: int) -> str:
        """Find the first guilty pattern match of a pass: it is run again with its first n matches only."""
        hits, label = segment.snapshots[k].hits, segment.labels[k]
        if len(hits) == 1:
            return str(hits[0])

        def limited(count: int) -> str:
            what = f"{self._name(piece.number)}{label} limited to its first {count} of {len(hits)} matches"
            return self._ask(what, Choice("", label, piece.number, first=count)).verdict

        _, high = search.first_bad(0, len(hits), limited)
        return str(hits[high - 1])

    def _across(self, piece: Piece) -> Iterator[Guilt]:
        """AOTAutograd has changed the signature: only outputs can be compared there."""
        self.notes.append(f"the graph after aot is compared by its outputs alone: {piece.unadapted}")
        outer, inner = self.trials.segments(piece)[:2]
        choice = Choice(outer.labels[-1], inner.labels[0], piece.number)
        found = self._ask(f"{self._name(piece.number)}the outputs before and after aot", choice)
        if found.verdict == BAD and found.report is not None:
            yield Guilt("aot", found.report)

    # --- generated code ----------------------------------------------------------------------------------------------

    def _in_code(self, piece: Piece) -> Iterator[Guilt]:
        """The last FX graph against what the generated code returns, then the call around it."""
        name = self._name(piece.number)
        found = self._ask(f"{name}the last graph against the generated code", Choice("", CODE, piece.number))
        if found.report is None:
            return
        excused = self._casts_left_out(piece, found.report)
        if found.verdict == BAD:
            if not excused:
                yield self._code_guilt(piece, found.report)
                return
            said = "the generated code, outputs: what differs are casts that it leaves out"
            found = dataclasses.replace(found, report=Report(verdict="rounding", notes=(said,)))
        self.reports += [found.report] if found.report is not None else []
        excused |= self._casts_dropped(piece)
        found = self._ask(f"{name}what the compiled graph returns to its caller", Choice("", RUNTIME, piece.number))
        if found.verdict == BAD and found.report is not None:
            first = found.report.first
            if not (excused and first is not None and first.better == "after"):
                yield Guilt("runtime", found.report)

    def _casts_dropped(self, piece: Piece) -> bool:
        """Whether passes took narrowing casts out of the graph: each was judged, and the sum of it is rounding, too."""
        made, left = (len(self.trials.reference(piece, place).narrowing) for place in (0, -1))
        if made <= left:
            return False
        self.notes.append(
            f"passes take narrowing casts out of the graph ({made} at first, {left} at last), which brings it nearer "
            f"to exact arithmetic; torch._inductor.config {code.WITH_CASTS[1]} keeps them where a pass heeds it"
        )
        return True

    def _casts_left_out(self, piece: Piece, report: Report) -> bool:
        """Whether code differs only because it leaves out narrowing casts: that is rounding, and finer than eager."""
        reference = self.trials.reference(piece, -1)
        if not code.rests_on_casts(reference, report):
            return False
        choice = Choice("", CODE, piece.number, config=code.WITH_CASTS[1])
        kept = self._ask(f"{self._name(piece.number)}the generated code {code.WITH_CASTS[0]}", choice)
        names = ", ".join(reference.narrowing[:3]) + ", ..." * (len(reference.narrowing) > 3)
        if kept.verdict != GOOD or kept.report is None or code.rests_on_casts(reference, kept.report):
            if report.verdict == "rounding":
                self.notes.append(
                    f"the generated code may leave out narrowing casts that the graph makes ({names}); with "
                    f"torch._inductor.config {code.WITH_CASTS[1]} it is {kept.reason}, too, so this is not proved"
                )
            return False
        self.notes.append(
            f"the generated code leaves out narrowing casts that the graph makes ({names}), which brings it nearer to "
            f"exact arithmetic; with torch._inductor.config {code.WITH_CASTS[1]} it is {kept.reason}"
        )
        return True

    def _code_guilt(self, piece: Piece, report: Report) -> Guilt:
        """Find the operation, or the pattern, whose lowering makes the code wrong, and the switch that mends it."""
        hunt = LoweringHunt(self._ask, self.recorded, piece, self._name(piece.number))
        match, place = hunt.pattern(), None
        if match is None:
            place = hunt.operation()
        self.notes += hunt.switches()
        report = code.located(report, self.trials.reference(piece, -1).gm, place)
        stage = "eager" if report.first is not None and report.first.better == "after" else "codegen"
        if place and report.first is not None:
            match = f"{report.first.op} at {place}"
        return Guilt(stage, report, match, (match,) if match else ())

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

    def _name(self, graph: int) -> str:
        return f"graph {graph}: " if len(self.recorded.pieces) > 1 else ""

    def _ask(self, what: str, choice: Choice) -> Answer:
        """Make a trial and tell of it; one that was made before is not told again."""
        if self.trials.is_known(choice):
            return self.trials.ask(choice)
        if self.progress is not None:
            self.progress(len(self.steps), len(self.steps) + 4, what)
        started = time.perf_counter()
        answer = self.trials.ask(choice)
        seconds = time.perf_counter() - started
        command = choice.command(self.command)
        self.steps.append(BisectStep(what, (), answer.verdict, answer.reason, seconds, command=command))
        return answer

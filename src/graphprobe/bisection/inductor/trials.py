"""One trial: two points of a compilation are compared, and the answer is remembered."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from graphprobe.bisection.choice import CODE, EAGER, RUNTIME, Choice
from graphprobe.bisection.inductor import code, expanded, recording, snapshots
from graphprobe.bisection.inductor.eager import Eager, Traced
from graphprobe.bisection.inductor.outputs import Reference
from graphprobe.bisection.inductor.recorder import Interrupted, Plan
from graphprobe.bisection.inductor.recording import Recording
from graphprobe.bisection.inductor.segments import Segment, labels_of, segments_of
from graphprobe.bisection.inductor.snapshots import Piece
from graphprobe.bisection.oracle import Answer, compare
from graphprobe.bisection.search import BAD, GOOD, UNKNOWN
from graphprobe.errors import PipelineError, nearest
from graphprobe.records import VERDICTS

#: A point at which the compiled model can be stopped: its label, its Dynamo graph, where each piece then stands.
Stop = tuple[str, int, dict[int, int]]


@dataclass
class Trials:
    """Compares any two points of one recorded compilation; `options` are those of graphprobe.diff."""

    recorded: Recording
    options: dict[str, Any]
    _segments: dict[int, list[Segment]] = field(default_factory=dict)
    _references: dict[tuple[int, int], Reference] = field(default_factory=dict)
    _answers: dict[str, Answer] = field(default_factory=dict)

    def ask(self, choice: Choice) -> Answer:
        """Compare; what cannot be compared is unknown. Raises PipelineError for a label that is not there."""
        known = self._answers.get(str(choice))
        if known is None:
            try:
                known = self._asked(choice)
            except PipelineError:
                raise
            except Interrupted as error:
                known = Answer(UNKNOWN, f"it cannot be compiled so: {error}")
            except Exception as error:  # such as a graph that cannot be run in exact arithmetic
                known = Answer(UNKNOWN, f"{type(error).__name__}: {error}")
            self._answers[str(choice)] = known
        return known

    def is_known(self, choice: Choice) -> bool:
        """Whether the answer is there without a comparison."""
        return str(choice) in self._answers

    @cached_property
    def eager(self) -> Eager:
        """The model without the compiler."""
        return Eager(self.recorded)

    @cached_property
    def traced(self) -> Traced:
        """The model against the graphs that Dynamo has traced of it."""
        return self.eager.against_traced()

    @property
    def is_random(self) -> bool:
        """Whether the model draws random numbers, so that it cannot be compared end to end."""
        graphs = [snapshot.gm for piece in self.recorded.pieces for snapshot in piece.snapshots]
        return any(snapshots.is_random(node) for gm in graphs for node in gm.graph.nodes)

    def segments(self, piece: Piece) -> list[Segment]:
        """Return the graphs of a piece that are called in the same way."""
        if piece.number not in self._segments:
            self._segments[piece.number] = segments_of(piece)
        return self._segments[piece.number]

    def reference(self, piece: Piece, place: int) -> Reference:
        """Return what a graph of a piece computes: the first one on the outer inputs, others on the inner ones."""
        place %= len(piece.snapshots)
        if (piece.number, place) not in self._references:
            inputs = piece.inputs if place < piece.boundary else piece.inner_inputs
            self._references[piece.number, place] = Reference.of(piece.snapshots[place].gm, inputs or ())
        return self._references[piece.number, place]

    def stops(self) -> list[Stop]:
        """Return each point at which the model can be stopped: earlier pieces run as code, later ones as traced."""
        pieces = self.recorded.pieces
        found: list[Stop] = [("dynamo", 0, self.recorded.as_fx())]
        for i, piece in enumerate(pieces):
            later = {other.number: 0 for other in pieces[i + 1 :]}
            for place, label in enumerate(labels_of(piece.snapshots)):
                if place:
                    found.append((label, piece.number, {**later, piece.number: place}))
            found.append((CODE, piece.number, later))
        return found

    # --- the kinds of comparisons ------------------------------------------------------------------------------------

    def _asked(self, choice: Choice) -> Answer:
        if choice.before == EAGER:
            return self._end_to_end(choice)
        piece = next((p for p in self.recorded.pieces if p.number == choice.graph), None)
        if piece is None:
            raise PipelineError(f"there is no graph {choice.graph}: Dynamo has made {len(self.recorded.pieces)}")
        if choice.after == CODE:
            return self._code(piece, choice)
        if choice.first is not None:
            return self._limited(piece, choice)
        if choice.after == RUNTIME:
            return self._runtime(piece)
        return self._graphs(piece, choice)

    def _end_to_end(self, choice: Choice) -> Answer:
        if choice.after in ("", RUNTIME):
            return self.eager.against(self.recorded.compiled, "the compiled model")
        if choice.after == "dynamo" and self.eager.first is not None:
            return self.traced.answer
        stops = {(label, number): places for label, number, places in self.stops()}
        places = _found(stops, (choice.after, choice.graph))
        with self.recorded.standing(places):
            return self.eager.against(self.recorded.compiled, f"the model stopped at {choice.after}")

    def _graphs(self, piece: Piece, choice: Choice) -> Answer:
        segments = self.segments(piece)
        labels = [label for segment in segments for label in segment.labels]
        before, after = choice.before or labels[0], choice.after or labels[-1]
        for segment in segments:
            if before in segment.labels and after in segment.labels:
                i, j = segment.labels.index(before), segment.labels.index(after)
                events = tuple(e for s in segment.snapshots[i + 1 : j + 1] for e in s.replacements)
                found = compare(segment.graphs[i], segment.graphs[j], segment.inputs, {}, events, self.options)
                return expanded.judged(found, self.options)
        for label in (before, after):
            _found(dict.fromkeys(labels), label)
        return code.outputs_after_aot(self.recorded, piece)

    def _limited(self, piece: Piece, choice: Choice) -> Answer:
        """Compile again; the pass applies its first matches only."""
        key = _key(piece, choice.after)
        plan = Plan(limit=(key, choice.first or 0), codegen=False, config=self.recorded.recorder.plan.config)
        again = recording.record(self.recorded.model, self.recorded.args, self.recorded.kwargs, plan)
        twin = next((p for p in again.pieces if p.number == piece.number), None)
        for segment in segments_of(twin) if twin is not None else []:
            for place, snapshot in enumerate(segment.snapshots):
                if snapshot.key == key and place:
                    before, events = segment.graphs[place - 1], snapshot.replacements
                    return compare(before, segment.graphs[place], segment.inputs, {}, events, self.options)
        if again.recorder.failed is not None:
            raise again.recorder.failed
        return Answer(GOOD, "the pass then changes nothing")

    def _code(self, piece: Piece, choice: Choice) -> Answer:
        """The last graph against what generated code returns, compiled in another way where that was chosen."""
        twin = piece
        if choice.lowered is not None or choice.first is not None or choice.config:
            count, number = choice.lowered, piece.number
            plan = Plan(
                limit=None if choice.first is None else (_key(piece, choice.before), choice.first),
                lowered=None if count is None else lambda one, index: one != number or index < count,
                config=(*self.recorded.recorder.plan.config, *choice.config.items()),
            )
            again = recording.record(self.recorded.model, self.recorded.args, self.recorded.kwargs, plan)
            twin = next(p for p in again.pieces if p.number == piece.number)
        return code.judge(self.reference(piece, -1), twin.inner_outputs or (), "the generated code")

    def _runtime(self, piece: Piece) -> Answer:
        """The first graph against what the compiled one returns to its caller, also when it is called again."""
        reference = self.reference(piece, 0)
        found = code.judge(reference, piece.outputs or (), "the compiled graph")
        if found.verdict == BAD:
            return found
        self.recorded.run(keep=True)
        again = code.judge(reference, piece.outputs or (), "the compiled graph, called again")
        if again.verdict != BAD and found.report is not None and again.report is not None:
            return max((found, again), key=lambda one: VERDICTS.index(one.report.verdict))  # type: ignore[union-attr]
        return again


def _key(piece: Piece, label: str) -> tuple[str, str, int]:
    """Return what names a pass in every compilation of the model. Raises PipelineError for an unknown label."""
    index: int = _found({one: i for i, one in enumerate(labels_of(piece.snapshots))}, label)
    return piece.snapshots[index].key


def _found(there: dict[Any, Any], name: Any) -> Any:
    if name not in there:
        plain = [key if isinstance(key, str) else key[0] for key in there]
        wanted = name if isinstance(name, str) else name[0]
        raise PipelineError(
            f"the compilation has no point {wanted!r}{nearest(wanted, plain)}; it has {', '.join(dict.fromkeys(plain))}"
        )
    return there[name]

"""The search through a pipeline of transforms: trials are run, judged, remembered and told."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule

from graphprobe.bisection import bench, matching, search, store
from graphprobe.bisection.bench import Entry, Trial
from graphprobe.bisection.commands import Commands
from graphprobe.bisection.oracle import Answer, Oracle, compare
from graphprobe.bisection.records import Bisection, BisectStep
from graphprobe.bisection.search import BAD, GOOD, UNKNOWN
from graphprobe.bisection.store import Store
from graphprobe.pipeline import NotApplied, Step, transform_text
from graphprobe.pipeline.running import Run
from graphprobe.records import Report

Progress = Callable[[int, int, str], None]
Subset = search.Subset


@dataclass
class Hunt:
    """One bisection of one pipeline over one captured graph."""

    captured: GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    entries: tuple[Entry, ...]
    oracle: Oracle
    store: Store
    commands: Commands
    options: dict[str, Any] = field(default_factory=dict)  # of graphprobe.diff
    progress: Progress | None = None
    steps: list[BisectStep] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _full: Trial | None = None
    _told: set[str] = field(default_factory=set)
    _prints: dict[Subset, int] = field(default_factory=dict)  # of the graphs that were judged

    @property
    def everything(self) -> Subset:
        """All positions of the pipeline."""
        return tuple(range(len(self.entries)))

    def run(self) -> Bisection:
        """Search, and say what was found."""
        self._full = bench.run(self.captured, self.entries, lint=True)
        if self.commands.has_check and not self._is_steady(()):
            return self._result((), UNKNOWN)
        if self.answer(()).verdict == BAD:
            reason = self.answer(()).reason
            self.notes.append(f"the captured model itself is bad ({reason}): no transform is to blame")
            return self._result((), UNKNOWN)
        whole = self.answer(self.everything)
        groups = list(search.culprits(self.everything, self.test)) if whole.verdict == BAD else []
        if whole.verdict == UNKNOWN:
            groups = list(self._suspects())
        groups = self._blamed(groups)
        decisive = [part for group in groups for part in self._decisive(group)]
        if (groups or self.commands.has_check) and not self._is_steady(self.everything, *decisive):
            return self._result((), UNKNOWN)
        self._doubt(groups)
        return self._result(tuple(groups), BAD if groups else whole.verdict)

    def _blamed(self, groups: list[Subset]) -> list[Subset]:
        """Leave out what is bad by itself, but undone later in the pipeline."""
        blamed = search.to_blame(self.everything, groups, self.test)
        pardoned = sorted({i for group in groups if group not in blamed for i in group})
        if pardoned:
            names = [" and ".join(self.entries[i].label for i in part) for part in (pardoned, *blamed)]
            self.notes.append(
                f"{names[0]} {'is' if len(pardoned) == 1 else 'are'} bad in part of the trials, but not in the whole "
                f"pipeline without {', '.join(names[1:])}: later transforms make up for what they do"
            )
        return list(blamed)

    def _decisive(self, group: Subset) -> tuple[Subset, ...]:
        """The trials on which the blame rests: the guilty ones with what ran before them, and what ran before."""
        context = self._context(group)
        return (*context, group[-1]), context

    def _is_steady(self, *trials: Subset) -> bool:
        """Make decisive trials once more; where one then comes out in another way, nothing is known."""
        for subset in dict.fromkeys(trials):
            first, again = self.answer(subset), self._ask_again(subset)
            if first.verdict != again.verdict:
                self.notes.append(self._unsteady(self._what(subset, None), first.verdict, again.verdict))
                return False
        return True

    def _unsteady(self, what: str, first: str, again: str) -> str:
        label = bench.unsteady(self.captured, self.entries)
        if label:
            who, cure = f"transform {label}", "its seeds, and let it keep nothing from one call to the next"
        elif self.commands.has_check:
            who, cure = "check", "its seeds, or let it decide by the majority of several runs"
        else:
            who, cure = "comparison", "the seeds of the model and of the transforms"
        return (
            f"the {who} is not steady: {what} was {first} and then, made again, {again}; so nothing can be concluded. "
            f"Fix {cure}"
        )

    def _ask_again(self, subset: Subset) -> Answer:
        trial = ",".join(map(str, subset)) + " again"
        if trial not in self.store.answers:
            what = f"{self._what(subset, None)} once more"
            self._say(what)
            started = time.perf_counter()
            made = bench.run(self.captured, tuple(self.entries[i] for i in subset))  # a check may have run the last one
            if not self.commands.has_check and self._prints.get(subset) == store.print_of(made.gm):
                return self.answer(subset)  # graphprobe.diff says the same of the same graph
            answer = self._judged(made, subset)
            self.store.put(trial, answer, time.perf_counter() - started)
        return self.store.answers[trial]

    # --- trials ------------------------------------------------------------------------------------------------------

    def test(self, subset: Subset) -> str:
        """Judge a part of the pipeline; a failure that the part itself brought about is unknown, not bad."""
        answer = self.answer(subset)
        if answer.crashed is not None and self._ran_well(subset[answer.crashed]):
            return UNKNOWN
        return answer.verdict

    def _ran_well(self, position: int) -> bool:
        return self._full is not None and self._full.steps[position].status in ("applied", "matched nothing")

    def answer(self, subset: Subset, limit: int | None = None) -> Answer:
        """Judge a part of the pipeline, its last transform limited to its first `limit` matches."""
        entries = tuple(self.entries[i] for i in subset)
        if limit is not None:
            entries = (*entries[:-1], entries[-1].limited(limit))
        trial = ",".join(map(str, subset)) + (f":{limit}" if limit is not None else "")
        known = trial in self.store.answers
        what = self._what(subset, limit)
        if not known:
            self._say(what)
            started = time.perf_counter()
            answer = self._judge(subset, entries, limit)
            self.store.put(trial, answer, time.perf_counter() - started)
        answer = self.store.answers[trial]
        if trial not in self._told and (subset or self.commands.has_check):
            self._told.add(trial)
            self.steps.append(
                BisectStep(
                    what=what,
                    transforms=tuple(transform_text(entry.transform) for entry in entries),
                    verdict=answer.verdict,
                    reason=answer.reason,
                    seconds=self.store.seconds[trial],
                    remembered=trial in self.store.remembered,
                    command=self.commands.trial(entries),
                )
            )
        return answer

    def _judge(self, subset: Subset, entries: tuple[Entry, ...], limit: int | None) -> Answer:
        whole = subset == self.everything and limit is None and self._full is not None
        trial = self._full if whole and self._full is not None else bench.run(self.captured, entries)
        if limit is None and not self.commands.has_check:
            self._prints[subset] = store.print_of(trial.gm)
        return self._judged(trial, subset)

    def _judged(self, trial: Trial, subset: Subset) -> Answer:
        if trial.crashed is not None:
            step = trial.steps[trial.crashed]
            reason = f"{self.entries[subset[trial.crashed]].label} failed: {_reason(step)}"
            return Answer(BAD, reason, crashed=trial.crashed)
        if not subset and not self.commands.has_check:
            return Answer(GOOD, "nothing was changed")
        return self.oracle.ask(trial.gm, trial.events)

    def _what(self, subset: Subset, limit: int | None) -> str:
        labels = [self.entries[i].label for i in subset]
        if limit is not None:
            return f"{labels[-1]} limited to its first {limit} matches{', after those before it' * bool(labels[1:])}"
        if not subset:
            return "the captured model"
        if subset == self.everything:
            return "the whole pipeline"
        if len(subset) == 1:
            return f"{labels[0]} alone"
        if subset == self.everything[: len(subset)]:
            return f"the first {len(subset)} of {len(self.entries)} transforms"
        missing = [self.entries[i].label for i in self.everything if i not in subset]
        return f"all but {missing[0]}" if len(missing) == 1 else " and ".join((", ".join(labels[:-1]), labels[-1]))

    def _suspects(self) -> Iterator[Subset]:
        """The whole cannot be judged: look for prefixes that are bad for sure."""
        for k in range(1, len(self.entries)):
            if self.test(self.everything[:k]) == BAD:
                yield from search.culprits(self.everything[:k], self.test)
                return

    def _doubt(self, groups: list[Subset]) -> None:
        """Say what could not be judged on the way."""
        gone = {group[-1] for group in groups}
        left = tuple(i for i in self.everything if i not in gone)
        if groups and left and self.test(left) == UNKNOWN:
            names = " and ".join(self.entries[i].label for i in sorted(gone))
            reason = self.answer(left).reason
            self.notes.append(f"whether more is wrong cannot be judged: without {names}, {reason}")
        unknown = sum(step.verdict == UNKNOWN for step in self.steps)
        if unknown:
            self.notes.append(f"{unknown} of {len(self.steps)} trials could not be judged and count as neither")

    # --- the answer --------------------------------------------------------------------------------------------------

    def _result(self, groups: tuple[Subset, ...], verdict: str) -> Bisection:
        named = tuple(sorted({i for group in groups for i in group}))
        full = self._full
        found = Bisection(
            verdict=verdict,
            transform=self.entries[named[0]].label if named else None,
            transforms=tuple(self.entries[i].label for i in named),
            together=tuple(tuple(self.entries[i].label for i in group) for group in groups),
            lints=full.lints if full is not None else (),
            pipeline=bench.text_of(self.entries),
        )
        if groups:
            found = self._located(found, min(groups, key=lambda group: group[-1]))
        elif verdict != BAD:
            found = dataclasses.replace(found, report=self._whole_report())
        return dataclasses.replace(found, steps=tuple(self.steps), notes=tuple(self.notes))

    def _whole_report(self) -> Report | None:
        full = self._full
        if full is None or full.crashed is not None:
            return None
        remembered = self.store.answers.get(",".join(map(str, self.everything)))
        if remembered is not None and remembered.report is not None:
            return remembered.report
        answer = compare(self.captured, full.gm, self.args, self.kwargs, full.events, self.options)
        return answer.report and Run(full.gm, full.steps).attributed(answer.report)

    def _located(self, found: Bisection, group: Subset) -> Bisection:
        """Add the report of the guilty step, and its match."""
        last = group[-1]
        context = self._context(group)
        self._say(f"the match in {self.entries[last].label}")
        before = bench.run(self.captured, tuple(self.entries[i] for i in context))
        after = bench.run(self.captured, tuple(self.entries[i] for i in (*context, last)))
        if after.crashed is not None:
            step = after.steps[after.crashed]
            notes = (f"{self.entries[last].label} failed: {_reason(step)}", step.traceback)
            return dataclasses.replace(found, report=Report(verdict="structural", notes=notes))
        report = self._step_report(before, after)
        places = after.matches(len(context))
        matches = matching.all_of(report, places)
        by_trial = self._by_trial(context, last, places)
        return dataclasses.replace(
            found,
            report=report,
            match=by_trial or (matches[0] if matches else None),
            matches=matches or ((by_trial,) if by_trial else ()),
        )

    def _context(self, group: Subset) -> Subset:
        """What runs before the guilty transform when it is looked at: all that the pipeline has, if that is good."""
        prefix = self.everything[: group[-1]]
        return prefix if self.test(prefix) == GOOD else group[:-1]

    def _step_report(self, before: Trial, after: Trial) -> Report:
        events = after.steps[-1].observation.replacements
        answer = compare(before.gm, after.gm, self.args, self.kwargs, events, self.options)
        assert answer.report is not None
        if answer.verdict == GOOD:
            self.notes.append(f"graphprobe.diff calls the guilty step {answer.report.verdict}: see its report")
        return Run(after.gm, after.steps).attributed(answer.report)

    def _by_trial(self, context: Subset, last: int, places: tuple[str, ...]) -> str | None:
        """Find the first guilty match by letting the transform rewrite the first k of its n matches."""
        entry = self.entries[last]
        if len(places) == 1:
            return places[0]
        if not places or not entry.is_limitable:
            return None
        subset = (*context, last)
        low, high = search.first_bad(0, len(places), lambda k: self._limited(subset, k))
        if high - low > 1:
            self.notes.append(f"matches {low + 1} to {high} of {entry.label} cannot be judged one by one")
        return places[high - 1]

    def _limited(self, subset: Subset, count: int) -> str:
        answer = self.answer(subset, count)
        return UNKNOWN if answer.crashed is not None and answer.crashed < len(subset) - 1 else answer.verdict

    def _say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(len(self.steps), len(self.steps) + 4, what)


def _reason(step: Step) -> str:
    return step.outcome.reason if isinstance(step.outcome, NotApplied) else ""

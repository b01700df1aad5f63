"""The search through Inductor with a user's own check in place of graphprobe.diff."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graphprobe.bisection import search
from graphprobe.bisection.inductor.recording import Recording
from graphprobe.bisection.inductor.trials import Stop
from graphprobe.bisection.records import Bisection, BisectStep
from graphprobe.bisection.search import BAD, GOOD, UNKNOWN

Check = Callable[[Callable[..., Any]], Any]


@dataclass
class Checked:
    """Asks the check of the model with the compiler stopped at one point after the other.

    The check is given a function that is called like the model. At stop 0 every piece runs as Dynamo has traced it, at
    the last one as generated code.
    """

    recorded: Recording
    check: Check
    stops: list[Stop]
    steps: list[BisectStep] = field(default_factory=list)
    _known: dict[int, str] = field(default_factory=dict)

    def run(self) -> Bisection:
        """Find the first stop that is bad; what it means is for graphprobe.diff to say."""
        stops = self.stops
        if self._ask("eager", self.recorded.model) == BAD:
            return self._result(UNKNOWN, None, "the model itself is bad without the compiler: no stage is to blame")
        whole = self._at(len(stops) - 1)
        if whole != BAD:
            return self._result(whole, None)
        if self._at(0) == BAD:
            return self._result(BAD, "dynamo")
        low, high = search.first_bad(0, len(stops) - 1, self._at)
        note = "" if high == low + 1 else f"the stops between {stops[low][0]} and {stops[high][0]} cannot be judged"
        return self._result(BAD, stops[high][0], note)

    def _at(self, stop: int) -> str:
        if stop not in self._known:
            label, _, places = self.stops[stop]
            with self.recorded.standing(places):
                self._known[stop] = self._ask(f"stopped at {label}", self.recorded.compiled)
        return self._known[stop]

    def _ask(self, what: str, function: Callable[..., Any]) -> str:
        started = time.perf_counter()
        try:
            said = self.check(function)
            verdict = UNKNOWN if said is None else GOOD if bool(said) else BAD
            reason = f"the check says {said}" if said is None else f"the check says {bool(said)}"
        except Exception as error:
            verdict, reason = BAD, f"the check raised {type(error).__name__}: {str(error)[:200]}"
        self.recorded.restore()
        self.steps.append(BisectStep(what, (), verdict, reason, time.perf_counter() - started))
        return verdict

    def _result(self, verdict: str, label: str | None, note: str = "") -> Bisection:
        names = (label,) if label else ()
        return Bisection(
            verdict=verdict,
            transform=label,
            transforms=names,
            together=tuple((name,) for name in names),
            steps=tuple(self.steps),
            notes=(note,) if note else (),
            pipeline="inductor",
        )

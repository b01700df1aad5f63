"""The model itself against the graphs that Dynamo has traced of it, against itself, and against the compiled model.

What is compared is all that a caller can see: what the model returns, what it wrote into its arguments, its buffers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from graphprobe.bisection.inductor.noise import Raising, Shaking
from graphprobe.bisection.inductor.outputs import Compared, compared
from graphprobe.bisection.inductor.recording import Recording
from graphprobe.bisection.inductor.values import Seen
from graphprobe.bisection.oracle import Answer
from graphprobe.bisection.search import BAD, GOOD, UNKNOWN
from graphprobe.capturing import quiet
from graphprobe.lanes import exact
from graphprobe.records import VERDICTS, Report

_DRAWS = 2
_UNKNOWN = "the model runs neither in float64 nor with noise: what is rounding is unknown"
#: Between eager and generated code lie many roundings: what is called too coarse from step to step (above 8) is not
#: from end to end.
_GROSS = ("semantic", "nonfinite", "structural")


@dataclass(frozen=True)
class Traced:
    """What came of the comparison; `stage` is the guilty one, "eager" or "dynamo"."""

    answer: Answer
    stage: str = ""
    match: str | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Eager:
    """The model without the compiler: what it returns, or raises, natively, exactly, and with rounding-sized noise."""

    recorded: Recording
    first: Seen | None = field(init=False, default=None)
    error: str = field(init=False, default="")

    def __post_init__(self) -> None:
        try:
            self.first = self.recorded.observed(self.recorded.model)
        except Exception as error:
            self.error = _said(error)

    @cached_property
    def truth(self) -> Seen | None:
        """What the model returns in float64, casts among floating dtypes left out; None where it cannot be run so."""
        recorded = self.recorded
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
                model = copy.deepcopy(recorded.model).double()
                torch.manual_seed(0)
                args, kwargs = recorded.inputs(exact.lift)
                with Raising():
                    return recorded.seen(model, model, args, kwargs)
        except Exception:
            return None

    @cached_property
    def noisy(self) -> list[Seen]:
        """What the model returns when every floating result in it is off by a rounding error; [] where it raises."""
        found, recorded = [], self.recorded
        for draw in range(_DRAWS):
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
                    model = copy.deepcopy(recorded.model)
                    args, kwargs = recorded.inputs(lambda value: value)
                    torch.manual_seed(0)
                    with Shaking(draw):
                        found.append(recorded.seen(model, model, args, kwargs))
            except Exception:
                return []
        return found

    # --- comparisons -------------------------------------------------------------------------------------------------

    def against_traced(self) -> Traced:
        """Run the model once more without the compiler, and as Dynamo has traced it, on the same inputs and seeds."""
        recorded = self.recorded
        assert self.first is not None
        try:
            traced = recorded.observed(recorded.compiled, recorded.as_fx())
        except Exception as error:
            said = f"the graph that Dynamo has traced raises {_said(error)}, which the model does not"
            return Traced(Answer(BAD, said, report=Report(verdict="structural", notes=(said,))), "dynamo")
        found = self._compare(self.first, traced, "the graph that Dynamo has traced")
        if found is not None and found.report is not None and found.report.verdict == "structural":
            return Traced(found, "dynamo")  # another shape, whatever the values are
        again = recorded.observed(recorded.model)
        unsteady = self._compare(self.first, again, "eager, called again,")
        if unsteady is None or unsteady.verdict != GOOD:
            said = "eager itself returns another result when it is called again on the same inputs with the same seeds"
            report = Report(verdict="semantic", notes=(said,), outputs=_rows(self._leaves(self.first, again) or []))
            return Traced(Answer(BAD, said, report=report), "eager", None, (said,))
        if found is None:
            said = (
                "the model cannot be run in float64, so what is rounding between eager and Dynamo's graphs is unknown"
            )
            return Traced(Answer(UNKNOWN, said), notes=(said,))
        if found.verdict == GOOD:
            return Traced(found)
        better = found.report is not None and any(note.endswith(_NEARER) for note in found.report.notes)
        return Traced(found, "eager" if better else "dynamo")

    def against(self, function: Callable[..., Any], who: str) -> Answer:
        """Compare the model with what was compiled, end to end; only gross differences are bad."""
        try:
            found = self.recorded.observed(function)
        except Exception as error:
            if self.first is None:
                return Answer(GOOD, f"it raises, as eager does: {_said(error)}")
            said = f"{who} raises {_said(error)}, which eager does not"
            return Answer(BAD, said, report=Report(verdict="structural", notes=(said,)))
        if self.first is None:
            said = f"{who} returns a result where eager raises {self.error}"
            return Answer(BAD, said, report=Report(verdict="structural", notes=(said,)))
        answer = self._compare(self.first, found, who, _GROSS, noisy=True)
        return answer or Answer(
            UNKNOWN, "the model runs neither in float64 nor with noise: what is rounding is unknown"
        )

    def _compare(
        self, x: Seen, y: Seen, who: str, bad: tuple[str, ...] = ("precision", *_GROSS), *, noisy: bool = False
    ) -> Answer | None:
        """Compare value by value; None where values differ and nobody knows what is exact."""
        if list(x) != list(y):
            said = f"{who}: {len(y)} values came back in place of {len(x)}"
            return Answer(BAD, said, report=Report(verdict="structural", notes=(said,)))
        found = self._leaves(x, y, noisy=noisy)
        if found is None:
            return None
        # end to end, eager may well be the coarser one: rounding inside of it is not among what the noise explains
        counted = [one for one in found if not noisy or one.better != "after"]
        worst = max(counted, key=lambda one: VERDICTS.index(one.kind), default=None)
        if worst is None or worst.kind not in bad:
            same = all(one.kind == "identical" for one in found)
            return Answer(GOOD, "identical" if same else "rounding")
        note = f"{who}, {worst.path}: {worst.said}"
        if worst.better == "after":
            note += _NEARER
        return Answer(BAD, worst.kind, report=Report(verdict=worst.kind, outputs=_rows(found), notes=(note,)))

    def _leaves(self, x: Seen, y: Seen, *, noisy: bool = False) -> list[Compared] | None:
        found = []
        for path, a in x.items():
            b = y[path]
            if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
                if isinstance(a, torch.Tensor) is not isinstance(b, torch.Tensor) or a != b:
                    found.append(Compared(path, "structural", note=f"{b!r:.60} in place of {a!r:.60}"))
                continue
            one = compared(path, a, b, a)  # without an exact value only equality can be told
            if one.kind not in ("identical", "structural"):
                exactly = self.truth.get(path) if self.truth is not None else None
                if not isinstance(exactly, torch.Tensor) or exactly.shape != a.shape:
                    exactly = None
                # without a float64 form, what noise makes of eager's own value says what is rounding
                moves = [seen[path] for seen in self.noisy if path in seen] if noisy or exactly is None else []
                if exactly is None and not moves:
                    return None
                one = compared(path, a, b, a if exactly is None else exactly, moves)
            found.append(one)
        return found


_NEARER = "; it is the one that is nearer to exact arithmetic"


def _rows(found: list[Compared]) -> tuple[Any, ...]:
    return tuple(one.row for one in found if one.row is not None)


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")

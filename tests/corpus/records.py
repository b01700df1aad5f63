"""What a corpus case is, what is true of it, and how an answer is scored against the truth.

A case is a function ``build(seed) -> (before, after, args, kwargs, truth)``. Seeds draw weights, inputs, the number of
layers and the layer that is wrong; even seeds are float32, odd ones bfloat16, where the case does not fix the dtype.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import graphprobe
from corpus import changes
from graphprobe.records import Finding, Report

GRAVE = ("quantization", "precision", "semantic", "nonfinite", "structural")
SMALL = 8  # value-making operations of the smaller piece: a finding over more names a neighbourhood, not an operation


@dataclass(frozen=True)
class Bug:
    """One thing that is wrong in `after`."""

    module: str  # path of the module whose operation is wrong
    ops: tuple[str, ...] = ()  # operators that may rightly be named; none: any operation of that module
    kind: str = "semantic"


@dataclass(frozen=True)
class Truth:
    """What a report must say. Without bugs nothing may be reported but kinds in `background`."""

    bugs: tuple[Bug, ...] = ()
    background: tuple[str, ...] = ()  # kinds that honest changes show beside the bug: quantization


Built = tuple[Any, Any, tuple[Any, ...], dict[str, Any], Truth]


@dataclass(frozen=True)
class Case:
    """One case of the corpus."""

    name: str
    group: str  # the class it is counted under: rotary, masks, ...
    benign: bool
    architecture: str
    build: Callable[[int], Built]


CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Draw:
    """What a seed fixes: the dtype, and a generator for everything else."""

    seed: int
    dtype: torch.dtype
    rng: random.Random

    @staticmethod
    def of(seed: int, name: str, dtype: torch.dtype | None = None) -> Draw:
        """Draw for one case; `dtype` where the case fixes it."""
        chosen = dtype or (torch.bfloat16, torch.float32)[seed % 2 == 0]
        return Draw(seed, chosen, random.Random(f"{name}/{seed}"))


Subject = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Architecture = Callable[[Draw], Subject]


def register(name: str, group: str, benign: bool, architecture: str, build: Callable[[int], Built]) -> None:
    """Add a case to the corpus; a name may be taken once."""
    assert name not in CASES, name
    CASES[name] = Case(name, group, benign, architecture, build)


def changed(
    group: str,
    architecture: Architecture,
    *,
    ops: str = "",
    kind: str = "semantic",
    benign: bool = False,
    background: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``change(after, draw)``, which changes a copy of the model in place.

    It returns the module path that is wrong now, a Bug, or a list of either; for a benign change nothing, or a new
    module in place of the copy.
    """

    def decorate(change: Callable[..., Any]) -> Callable[..., Any]:
        name = change.__name__.replace("_", " ")

        def build(seed: int) -> Built:
            draw = Draw.of(seed, name, dtype)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                before, args, kwargs = architecture(draw)
                after = copy.deepcopy(before)
                wrong = change(after, draw)
            if isinstance(wrong, nn.Module):
                after, wrong = wrong, None
            wrongs = wrong if isinstance(wrong, list) else [wrong] if wrong is not None else []
            named = tuple(op if "." in op and op.startswith("operator") else f"aten.{op}" for op in ops.split())
            bugs = tuple(p if isinstance(p, Bug) else Bug(p, named, kind) for p in wrongs)
            assert bool(bugs) != benign, name
            after.train(before.training)
            return before, after, args, kwargs, Truth(bugs, background)

        register(name, group, benign, architecture.__name__.strip("_"), build)
        return change

    return decorate


# --- scoring ----------------------------------------------------------------------------------------------------------


def judged(before: Any, after: Any, args: tuple[Any, ...], kwargs: dict[str, Any], truth: Truth) -> tuple[Report, str]:
    """Compare two models of a case; return the report and its score."""
    if not truth.bugs:
        report = graphprobe.diff(before, after, args, kwargs)
        return report, score(report, truth, [])
    graphs = graphprobe.capture(before, args, kwargs), graphprobe.capture(after, args, kwargs)
    differing = changes.places(*graphs)
    allowed = [max(1, changes.inside(differing, *graphs, bug.module)) for bug in truth.bugs]
    report = graphprobe.diff(*graphs, args, kwargs)
    return report, score(report, truth, allowed)


def score(report: Report, truth: Truth, allowed: list[int]) -> str:
    """Return exact, near, wrong or missed for a defect; fine, unknown or false alarm for a benign change.

    *Exact*: every bug has findings of the right kind, in the right module, on a rightful operator, over at most `SMALL`
    operations, no more of them than places of its module in which the graphs really differ (`allowed`, one number a
    bug, counted by `corpus.changes`), and there is no other finding. *Near*: some finding lies in a module that is
    wrong.
    """
    grave = [f for f in report.findings if f.kind in GRAVE and f.kind not in truth.background]
    if not truth.bugs:
        if grave:
            return "false alarm"
        return "unknown" if report.verdict == "unknown" else "fine"
    if not grave:
        return "unknown" if report.verdict == "unknown" else "missed"
    named = [next((b for b in truth.bugs if _names(f, b, report)), None) for f in grave]
    counts = [1 <= named.count(bug) <= most for bug, most in zip(truth.bugs, allowed, strict=True)]
    if all(counts) and None not in named:
        return "exact"
    inside = any(
        _within(f.module_path, b.module) or _within(b.module, f.module_path) for f in grave for b in truth.bugs
    )
    return "near" if inside else "wrong"


def _names(finding: Finding, bug: Bug, report: Report) -> bool:
    if finding.kind != bug.kind or not _within(finding.module_path, bug.module):
        return False
    if bug.ops and finding.op not in bug.ops:
        return False
    sizes = (_size(finding.before, report.before.by_name), _size(finding.after, report.after.by_name))
    return min(sizes) <= SMALL


def _size(names: tuple[str, ...], by_name: dict[str, Any]) -> int:
    return sum(name in by_name and not by_name[name].is_view for name in names)


def _within(path: str, module: str) -> bool:
    return path == module or not module or path.startswith(module + ".")

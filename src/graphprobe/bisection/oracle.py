"""Is a transformed graph good or bad? Asked of `graphprobe.diff`, of a user's predicate, or of a user's command."""

from __future__ import annotations

import contextlib
import copy
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule

from graphprobe import api, fxfile
from graphprobe.bisection.search import BAD, GOOD, UNKNOWN
from graphprobe.capturing import quiet
from graphprobe.errors import GraphprobeError, InputError, MismatchError
from graphprobe.records import Replacement, Report

Check = Callable[[GraphModule], Any] | str | Sequence[str]
#: Exit statuses of a check command: what `git bisect run` calls "cannot be tested", and what a shell says of a command
#: that is not there.
CANNOT_JUDGE, NO_COMMAND = 125, (126, 127)


@dataclass(frozen=True)
class Answer:
    """What an oracle says of one graph."""

    verdict: str  # good, bad or unknown
    reason: str = ""
    crashed: int | None = None  # which transform failed, where one did
    report: Report | None = None


class Oracle(Protocol):
    """Judges graphs against the captured one."""

    def ask(self, gm: GraphModule, events: Sequence[Replacement]) -> Answer:
        """Judge a graph, which may be run and changed."""
        ...


def deep_copy(gm: GraphModule) -> GraphModule:
    """Return a graph with weights and state of its own: running it, or writing into it, changes no other."""
    with quiet(), torch.no_grad():
        return copy.deepcopy(gm)


@dataclass
class DiffOracle:
    """graphprobe.diff against the captured graph; `options` are its keyword arguments."""

    before: GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def ask(self, gm: GraphModule, events: Sequence[Replacement] = ()) -> Answer:
        """Compare; what passes, or is allowed, is good."""
        return compare(self.before, gm, self.args, self.kwargs, events, self.options)


def compare(
    before: GraphModule,
    after: GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    events: Sequence[Replacement],
    options: dict[str, Any],
) -> Answer:
    """Ask graphprobe.diff; a graph that cannot be run is bad, one that only diff cannot take is unknown."""
    try:
        report = api.diff(before, after, args, kwargs, events=tuple(events), **options)
    except GraphprobeError as error:
        why = run_error(after, args, kwargs)
        reason = why or f"it cannot be compared: {error}"
        if why or isinstance(error, MismatchError):
            return Answer(BAD, reason, report=Report(verdict="structural", notes=(reason,)))
        return Answer(UNKNOWN, reason, report=Report(verdict="unknown", notes=(reason,)))
    except Exception as error:  # a graph that diff was not made for leaves a gap, and does not end the search
        why = run_error(after, args, kwargs)
        reason = why or f"the comparison failed: {_said(error)}"
        report = Report(verdict="structural" if why else "unknown", notes=(reason,))
        return Answer(BAD if why else UNKNOWN, reason, report=report)
    verdict = GOOD if report.ok else UNKNOWN if report.verdict == "unknown" else BAD
    return Answer(verdict, report.verdict, report=report)


def run_error(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return why a copy of the graph cannot be run, '' where it can."""
    try:
        _outputs(gm, args, kwargs)
    except Exception as error:
        return f"it cannot be run: {_said(error)}"
    return ""


def _outputs(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    call = torch.nn.Module.__call__  # a GraphModule's own prints the code of a graph that raises
    with torch.no_grad():
        return pytree.tree_leaves(call(deep_copy(gm), *copy.deepcopy(args), **copy.deepcopy(kwargs)))


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(": ")


@dataclass
class Health:
    """Crashes and new NaNs are bad, whatever a user's own check would say of them."""

    before: GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    _finite: list[Any] = field(default_factory=list)  # for each output where it is finite, None for what has no NaNs
    _known: bool = False

    def trouble(self, gm: GraphModule) -> str:
        """Return what is wrong with running a graph, '' where nothing is, or where there is nothing to run it on."""
        if not self._known:
            self._known = True
            if not run_error(self.before, self.args, self.kwargs):
                self._finite = [_finite(leaf) for leaf in _outputs(self.before, self.args, self.kwargs)]
        if not self._finite:
            return ""
        try:
            found = _outputs(gm, self.args, self.kwargs)
        except Exception as error:
            return f"it cannot be run: {_said(error)}"
        spoiled = any(_spoiled(was, _finite(leaf)) for was, leaf in zip(self._finite, found, strict=False))
        return "an output holds NaN or infinity where the captured graph's does not" if spoiled else ""


def _finite(leaf: Any) -> torch.Tensor | None:
    if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
        return torch.isfinite(leaf.float() if leaf.dtype.itemsize == 1 else leaf)
    return None


def _spoiled(was: torch.Tensor | None, now: torch.Tensor | None) -> bool:
    """Whether there is a NaN or an infinity more, element by element where the shape is the same."""
    if was is None or now is None:
        return False
    if was.shape == now.shape:
        return bool((was & ~now).any())
    return bool(was.all()) and not bool(now.all())


@dataclass
class PredicateOracle:
    """A user's function of the graph: true is good, false is bad, None is unknown; raising is bad."""

    check: Callable[[GraphModule], Any]
    health: Health

    def ask(self, gm: GraphModule, events: Sequence[Replacement] = ()) -> Answer:
        """Run the graph, then the check."""
        trouble = self.health.trouble(gm)
        if trouble:
            return Answer(BAD, trouble)
        try:
            said = self.check(gm)
            if said is None:
                return Answer(UNKNOWN, "the check returned None: return True for good, False for bad")
            return Answer(GOOD if bool(said) else BAD, f"the check says {bool(said)}")
        except Exception as error:
            return Answer(BAD, f"the check raised {_said(error)}")


@dataclass
class CommandOracle:
    """A user's command: exit status 0 is good, 125 unknown, any other bad.

    ``{before}`` and ``{after}`` in it become the paths of ``.fx`` files with inputs, as do the environment variables
    GRAPHPROBE_BEFORE and GRAPHPROBE_AFTER; without either the path of the transformed graph is its last argument.
    """

    command: str | Sequence[str]
    health: Health
    folder: Path

    def ask(self, gm: GraphModule, events: Sequence[Replacement] = ()) -> Answer:
        """Write the graph and run the command. Raises InputError where there is no such command."""
        trouble = self.health.trouble(gm)
        if trouble:
            return Answer(BAD, trouble)
        before, after = self.folder / "before.fx", self.folder / "after.fx"
        for path, graph in ((before, self.health.before), (after, gm)):
            if path is after or not path.exists():
                fxfile.save(graph, path, args=self.health.args, kwargs=self.health.kwargs)
        environment = {**os.environ, "GRAPHPROBE_BEFORE": str(before), "GRAPHPROBE_AFTER": str(after)}
        command = filled(self.command, str(before), str(after))
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
        if done.returncode in NO_COMMAND:
            said = (done.stderr or done.stdout).strip()[-300:]
            raise InputError(f"the check {command!r} cannot be run: {said or f'exit status {done.returncode}'}")
        said = f"exit status {done.returncode}" if done.returncode >= 0 else f"killed by signal {-done.returncode}"
        verdict = {0: GOOD, CANNOT_JUDGE: UNKNOWN}.get(done.returncode, BAD)
        return Answer(verdict, f"the check ended with {said}")


def filled(command: str | Sequence[str], before: str, after: str) -> str:
    """Return the command line with the paths put in."""
    line = command if isinstance(command, str) else shlex.join(command)
    if "{after}" not in line and "GRAPHPROBE_AFTER" not in line:
        line = f"{line} {{after}}"
    # a list was quoted part by part, braces and all; the paths themselves need no quotes more than once
    line = line.replace("'{before}'", "{before}").replace("'{after}'", "{after}")
    return line.replace("{before}", shlex.quote(before)).replace("{after}", shlex.quote(after))


@contextlib.contextmanager
def made(
    check: Check | None, before: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
) -> Iterator[Oracle]:
    """Give the oracle for what a caller gave as ``check=``. Raises InputError."""
    health = Health(before, args, kwargs)
    if check is None:
        yield DiffOracle(before, args, kwargs, options)
    elif callable(check):
        yield PredicateOracle(check, health)
    elif check and (isinstance(check, str) or all(isinstance(part, str) for part in check)):
        with tempfile.TemporaryDirectory(prefix="graphprobe-") as folder:
            yield CommandOracle(check, health, Path(folder))
    else:
        raise InputError(f"check={check!r:.60}: it must be a function of the graph, or a command")

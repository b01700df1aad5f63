"""A bisection as text of at most 100 columns: what is to blame, the proof, every trial with its command."""

from __future__ import annotations

from graphprobe.bisection.records import Bisection, BisectStep
from graphprobe.render.numbers import count, table, wrap
from graphprobe.render.wording import text as report_text


def text(found: Bisection) -> str:
    """Return a bisection as text."""
    parts = ["\n".join(wrap(headline(found)))]
    if found.steps:
        parts += [trials(found), commands(found)]
    if found.report is not None:
        title = f"the report of {found.transform}:" if found.transform else "the report of the whole pipeline:"
        parts.append(f"{title}\n\n{report_text(found.report)}")
    parts += ["\n".join(wrap(f"{lint.transform}: {lint.rule}: {lint.node}: {lint.message}")) for lint in found.lints]
    parts += ["\n".join(wrap(note, "note: ")) for note in found.notes]
    parts.append(f"{count(len(found.steps), 'trial')}, {found.seconds:.1f} s")
    return "\n\n".join(part for part in parts if part)


def headline(found: Bisection) -> str:
    """Return the answer in one sentence."""
    if found.verdict == "good":
        report = found.report
        if report is not None and not report.ok:
            return f"nothing is wrong, says the check; graphprobe.diff calls the whole pipeline {report.verdict}"
        return f"nothing is wrong: the whole pipeline is {report.verdict if report is not None else 'good'}"
    if not found.transform:
        return "it cannot be judged: see the trials and notes below"
    where = f", in the match {found.match}" if found.match else ""
    several = [" and ".join(group) for group in found.together if len(group) > 1]
    if several:
        return f"{'; '.join(several)} are wrong only together{where}"
    others = [name for name in found.transforms if name != found.transform]
    more = f"; so {'is' if len(others) == 1 else 'are'} {', '.join(others)}" if others else ""
    return f"{found.transform} is to blame{where}{more}"


def trials(found: Bisection) -> str:
    """Return the table of trials."""
    rows = [[str(i), step.what, step.verdict, step.reason, _seconds(step)] for i, step in enumerate(found.steps, 1)]
    return table(["", "trial", "is", "because", "s"], rows, flexible=(1, 3))


def commands(found: Bisection) -> str:
    """Return the commands that reproduce the trials, unbroken so that they can be copied."""
    lines = [f"{i:>3}  {step.command}" for i, step in enumerate(found.steps, 1) if step.command]
    return "\n".join(["to reproduce a trial:", *lines]) if lines else ""


def _seconds(step: BisectStep) -> str:
    return "before" if step.remembered else f"{step.seconds:.1f}"

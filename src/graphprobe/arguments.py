"""What users hand to the functions of `api`, checked before any work: one clear sentence for every mistake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphprobe import judge
from graphprobe.errors import InputError, nearest
from graphprobe.records import VERDICTS, Replacement
from graphprobe.sides import Call

Args = tuple[Any, ...] | list[Any]  # one call's positional arguments, or a list of such tuples: several input sets
Kwargs = dict[str, Any] | list[dict[str, Any]] | None


def check_options(
    exact: str,
    accept: Sequence[str],
    allow: Sequence[str],
    min_coverage: float,
    device: str | torch.device | None,
    events: Sequence[Replacement] | None,
) -> None:
    """Raise InputError where an option of `diff` is not what it should be."""
    if exact not in ("auto", "always", "never"):
        raise InputError(f"exact={exact!r}: it must be 'auto', 'always' or 'never'")
    if not isinstance(min_coverage, (int, float)) or not 0 <= min_coverage <= 1:
        raise InputError(f"min_coverage={min_coverage!r}: it must be a number between 0 and 1")
    for name, given in (("accept", accept), ("allow", allow)):
        if isinstance(given, str):
            raise InputError(f"{name}={given!r}: give a list or a tuple, as in {name}=({given!r},)")
    unknown = [kind for kind in allow if kind not in VERDICTS]
    if unknown:
        hint = nearest(str(unknown[0]), VERDICTS)
        raise InputError(f"allow={unknown[0]!r} is no kind{hint}. The kinds are {', '.join(VERDICTS)}")
    for rule in accept:
        judge.parse_accept(rule)
    if any(not isinstance(event, Replacement) for event in events or ()):
        raise InputError("events must be the replacements of an observed run (records.Replacement), as run.events is")
    if device is not None:
        check_device(device)


def check_device(name: str | torch.device) -> torch.device:
    """Return the device of this name. Raises InputError where this machine has none such, and for "meta"."""
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise InputError(f"the device {str(name)!r} cannot be used here: {reason}") from error
    if found.type == "meta":
        raise InputError("the device 'meta' cannot be used: it has shapes, but no values to compare")
    return found


def input_sets(args: Args, kwargs: Kwargs) -> list[tuple[tuple[Any, ...], dict[str, Any] | None]]:
    """Return the (args, kwargs) of every call: one, unless `args` is a list of tuples or `kwargs` a list of dicts.

    Raises InputError where there are other numbers of both, or where they are something else.
    """
    if not isinstance(args, (tuple, list)):
        raise InputError(f"args must be a tuple of positional arguments, not a {type(args).__name__}: args=(x,)")
    named_all = kwargs if isinstance(kwargs, list) else [kwargs]
    for one in named_all:
        if one is not None and not isinstance(one, dict):
            raise InputError(f"kwargs must be a dict of names and values, not a {type(one).__name__}")
    many_args = isinstance(args, list) and bool(args) and all(isinstance(one, tuple) for one in args)
    if not many_args and not isinstance(kwargs, list):
        return [(tuple(args), kwargs)]
    count = len(args) if many_args else len(kwargs or ())
    if isinstance(kwargs, list) and (len(kwargs) != count or not count):
        raise InputError(f"{count} sets of args and {len(kwargs)} of kwargs were given: give one of each per set")
    positional = args if many_args else [tuple(args)] * count
    named = kwargs if isinstance(kwargs, list) else [kwargs] * count
    return list(zip(positional, named, strict=True))


def other_sets(args: Args | None, kwargs: Kwargs, count: int) -> list[Call | None]:
    """Return what after is called with in every input set: None where it takes the same as before."""
    if args is None and kwargs is None:
        return [None] * count
    sets = [(one, dict(named or {})) for one, named in input_sets(() if args is None else args, kwargs)]
    if len(sets) != count:
        raise InputError(
            f"{count} input sets were given for before and {len(sets)} for after: give one of each per set"
        )
    return list(sets)

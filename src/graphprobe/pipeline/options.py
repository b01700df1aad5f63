"""Options of transforms: which there are, their defaults, and whether a value read from a text fits."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from graphprobe.errors import PipelineError, nearest
from graphprobe.pipeline.transform import Settings

#: Keys that a pipeline may give for any transform; no option may have such a name.
SETTINGS = tuple(f.name for f in dataclasses.fields(Settings))
_MISSING: Any = dataclasses.MISSING


def options_of(kind: type) -> list[dataclasses.Field[Any]]:
    """Return the fields of a transform class that are options."""
    if not dataclasses.is_dataclass(kind):
        return []
    return [f for f in dataclasses.fields(kind) if f.init and f.name not in ("name", *SETTINGS)]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return an option's default, ``dataclasses.MISSING`` where it must be given."""
    factory: Any = field.default_factory
    return field.default if factory is _MISSING else factory()


def split(given: Mapping[str, Any], name: str) -> tuple[dict[str, Any], Settings]:
    """Take the settings out of what a pipeline says about one transform. Raises PipelineError."""
    settings = {key: _fitted(name, key, _hints(Settings)[key], given[key]) for key in SETTINGS if key in given}
    return {key: value for key, value in given.items() if key not in SETTINGS}, Settings(**settings)


def instantiate(kind: type, name: str, given: Mapping[str, Any]) -> Any:
    """Make a transform of class `kind` with these options. Raises PipelineError."""
    fields = options_of(kind)
    _check_keys(name, given, [f.name for f in fields])
    hints = _hints(kind)
    missing = [f.name for f in fields if default_of(f) is _MISSING and f.name not in given]
    if missing:
        raise PipelineError(f"the transform {name} needs the option {missing[0]}: write {name}{{{missing[0]}=...}}")
    try:
        return kind(**{key: _fitted(name, key, hints.get(key, Any), value) for key, value in given.items()})
    except (TypeError, ValueError) as error:
        raise PipelineError(f"the transform {name} cannot be made: {error}") from error


def bind_function(function: Callable[..., Any], name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for a function ``(gm, **options)``. Raises PipelineError."""
    if not given:
        return {}
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        _check_keys(name, given, [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)])
    return dict(given)


def as_tuples(value: Any) -> Any:
    """Return the value with every list in it made a tuple, as options of a frozen dataclass are."""
    if isinstance(value, (list, tuple)):
        return tuple(as_tuples(v) for v in value)
    return value


def _check_keys(name: str, given: Mapping[str, Any], known: list[str]) -> None:
    for key in given:
        if key not in known:
            raise PipelineError(
                f"the transform {name} has no option {key!r}{nearest(key, [*known, *SETTINGS])}; "
                f"it has {', '.join(known) or 'none'}, and each takes {', '.join(SETTINGS)}"
            )


def _hints(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except NameError:  # a name only known to a type checker
        return {}


def _fitted(name: str, key: str, hint: Any, value: Any) -> Any:
    value = as_tuples(value)
    if _fits(hint, value):
        return float(value) if hint is float else value
    said = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise PipelineError(f"the transform {name}: {key} is {value!r}, but must be {said}")


def _fits(hint: Any, value: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(h, value) for h in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(inner) == 2 and inner[1] is Ellipsis:
            return all(_fits(inner[0], v) for v in value)
        return len(inner) == len(value) and all(_fits(h, v) for h, v in zip(inner, value, strict=True))
    if hint is type(None) or hint is None:
        return value is None
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint in (int, float):  # True is an int to Python, but no number to anybody else
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return True

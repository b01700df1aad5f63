"""Records to JSON and back: what is written is plain data, and what is read is checked against the record's types."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, TypeVar

SCHEMA_VERSION = 1

R = TypeVar("R")


def parse(kind: type[R], text: str, key: str) -> R:
    """Read the JSON text of a record of class `kind`, known by `key`. Raises ValueError where it is none."""
    data = json.loads(text)
    if not isinstance(data, dict) or key not in data:
        raise ValueError(f"this JSON is no graphprobe {kind.__name__}: it has no {key!r}")
    if data.get("version", 0) > SCHEMA_VERSION:
        raise ValueError(
            f"this report has schema version {data['version']}, this graphprobe reads up to "
            f"{SCHEMA_VERSION}: update graphprobe"
        )
    return from_data(kind, data)


def to_data(value: Any) -> Any:
    """Turn a record into what `json.dumps` takes; NaN and infinities become the strings 'nan', 'inf', '-inf'."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        saved = [f for f in dataclasses.fields(value) if not f.metadata.get("unsaved")]
        return {f.name: to_data(getattr(value, f.name)) for f in saved}
    if isinstance(value, dict):
        return {str(k): to_data(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_data(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_data(kind: type[R], data: dict[str, Any]) -> R:
    """Rebuild a record of class `kind` from `to_data`'s output; unknown keys are ignored."""
    hints = _hints(typing.cast(Any, kind))
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: _convert(hints[k], v) for k, v in data.items() if k in known})


def _convert(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        plain = [a for a in args if a is not type(None)]
        return _convert(plain[0], value) if len(plain) == 1 else value
    if hint is float and isinstance(value, (str, int)):
        return float(value)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v) for v in value)
        return tuple(_convert(a, v) for a, v in zip(args, value, strict=True))
    if origin is dict:
        return {k: _convert(args[1], v) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_data(typing.cast(type, hint), value)
    return value

"""The JSON schemas of what is saved, derived from the records themselves."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from graphprobe.records import SCHEMA_VERSION, STATUSES, VERDICTS, Report, RunReport

_NUMBER: dict[str, Any] = {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}
_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: _NUMBER,
    type(None): {"type": "null"},
}

#: (record, field, the words it may hold)
_WORDS = (
    ("Report", "verdict", VERDICTS),
    ("Finding", "kind", VERDICTS),
    ("RunStep", "status", STATUSES),
)


def report_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of what `Report.to_json` writes; non-finite numbers are strings there."""
    return schema_of(Report, "graphprobe report")


def run_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of what `RunReport.to_json` writes."""
    return schema_of(RunReport, "graphprobe run")


def schema_of(kind: type, title: str) -> dict[str, Any]:
    """Return the JSON schema of a record that is saved as JSON, and of all that it holds."""
    definitions: dict[str, Any] = {}
    top = _record(kind, definitions)
    for name, key, words in _WORDS:
        if name in definitions:
            definitions[name]["properties"][key] = {"enum": list(words)}
    definitions[kind.__name__]["properties"]["version"] = {"const": SCHEMA_VERSION}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **top,
        "$defs": dict(sorted(definitions.items())),
    }


def _record(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}  # a place in the table, so that records may hold themselves
        hints = typing.get_type_hints(kind)
        saved = [f.name for f in dataclasses.fields(kind) if not f.metadata.get("unsaved")]
        definitions[kind.__name__] = {
            "type": "object",
            "properties": {name: _schema(hints[name], definitions) for name in saved},
            "required": saved,
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if hint in _PLAIN:
        return dict(_PLAIN[hint])
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint), definitions)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(arg, definitions) for arg in args]}
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return {"type": "array", "items": _schema(args[0], definitions)}
    if origin is tuple:
        members = [_schema(arg, definitions) for arg in args]
        return {"type": "array", "prefixItems": members, "minItems": len(members), "maxItems": len(members)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], definitions)}
    raise TypeError(f"a record holds {hint!r}, which the JSON schema does not know: add it to graphprobe.render.schema")

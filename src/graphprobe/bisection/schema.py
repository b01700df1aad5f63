"""The JSON schema of a saved bisection."""

from __future__ import annotations

from typing import Any

from graphprobe.bisection.records import Bisection
from graphprobe.render.schema import schema_of

#: What a trial, and a whole bisection, may come to.
VERDICTS = ("good", "bad", "unknown")


def bisection_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of what `Bisection.to_json` writes."""
    schema = schema_of(Bisection, "graphprobe bisection")
    top, step = (schema["$defs"][name] for name in ("Bisection", "BisectStep"))
    for record in (top, step):
        record["properties"]["verdict"] = {"enum": list(VERDICTS)}
    # said once more for those who only want to paste them; reading a bisection makes them anew from its steps
    top["properties"]["commands"] = {"type": "array", "items": {"type": "string"}}
    return schema

"""The JSON schema in docs/ is that of the records, and what is saved obeys it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from graphprobe.records import Report
from graphprobe.render.schema import report_schema
from render_samples import wrong_scale
from test_render_text import reports

FILE = Path(__file__).parent.parent / "docs" / "report.schema.json"
TYPES: dict[str, Any] = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": dict}


def violations(schema: dict[str, Any], value: Any, top: dict[str, Any], where: str = "$") -> list[str]:
    """Return where a value breaks a schema. Knows the keywords that the schema uses and refuses any other."""
    found: list[str] = []
    for word, rule in schema.items():
        match word:
            case "$ref":
                found += violations(top["$defs"][rule.rsplit("/", 1)[1]], value, top, where)
            case "type" if rule == "integer":
                found += [] if isinstance(value, int) and not isinstance(value, bool) else [f"{where} is no integer"]
            case "type" if rule == "number":
                found += (
                    [] if isinstance(value, (int, float)) and not isinstance(value, bool) else [f"{where} is no number"]
                )
            case "type":
                found += [] if isinstance(value, TYPES[rule]) else [f"{where} is no {rule}"]
            case "enum":
                found += [] if value in rule else [f"{where} is none of {rule}"]
            case "const":
                found += [] if value == rule else [f"{where} is not {rule}"]
            case "anyOf":
                tried = [violations(choice, value, top, where) for choice in rule]
                found += [] if not all(tried) else tried[0]
            case "properties" if isinstance(value, dict):
                for name in value.keys() & rule.keys():
                    found += violations(rule[name], value[name], top, f"{where}.{name}")
            case "required" if isinstance(value, dict):
                found += [f"{where} lacks {name}" for name in rule if name not in value]
            case "additionalProperties" if isinstance(value, dict):
                for name in value.keys() - schema.get("properties", {}).keys():
                    found += [f"{where} has {name}"] if rule is False else violations(rule, value[name], top, where)
            case "items" if isinstance(value, list):
                for index, item in enumerate(value):
                    found += violations(rule, item, top, f"{where}[{index}]")
            case "prefixItems" if isinstance(value, list):
                for index, (choice, item) in enumerate(zip(rule, value, strict=False)):
                    found += violations(choice, item, top, f"{where}[{index}]")
            case "minItems" | "maxItems" if isinstance(value, list):
                short = len(value) < rule if word == "minItems" else len(value) > rule
                found += [f"{where} has {len(value)} items"] if short else []
            case "properties" | "required" | "additionalProperties" | "items" | "prefixItems" | "minItems" | "maxItems":
                pass  # says nothing about a value of another type; "type" does
            case "$schema" | "title" | "$defs":
                pass
            case _:
                raise AssertionError(f"the schema uses {word!r}, which this test cannot check")
    return found


def test_the_file_in_docs_is_current() -> None:
    assert json.loads(FILE.read_text()) == report_schema(), (
        "docs/report.schema.json is stale: write json.dumps(report_schema(), indent=2) and a newline to it"
    )


@given(reports)
@settings(max_examples=60, deadline=None)
def test_every_report_obeys_the_schema(report: Report) -> None:
    schema = report_schema()
    assert violations(schema, json.loads(report.to_json()), schema) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("verdict",), "fine"),
        (("version",), 99),
        (("findings", 0, "introduced"), "large"),
        (("findings", 0, "outputs"), ["one"]),
        (("regions", 0, "size_before"), 1.5),
        (("coverage", "evidence", "id"), "all"),
        (("surprise",), 1),
    ],
)
def test_a_report_that_is_none_breaks_the_schema(path: tuple[str | int, ...], value: Any) -> None:
    data = copy.deepcopy(json.loads(wrong_scale().to_json()))
    here: Any = data
    for step in path[:-1]:
        here = here[step]
    here[path[-1]] = value
    schema = report_schema()
    assert violations(schema, data, schema)

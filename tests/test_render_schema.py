"""The JSON schemas in docs/ are those of the records, and what is saved obeys them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphprobe
from graphprobe.bisection.records import Bisection, BisectStep
from graphprobe.bisection.schema import bisection_schema
from graphprobe.records import STATUSES, Lint, Replacement, Report, RunReport, RunStep
from graphprobe.render.schema import report_schema, run_schema
from render_samples import wrong_scale
from test_render_text import reports

DOCS = Path(__file__).parent.parent / "docs"
SCHEMAS = {"report": report_schema, "run": run_schema, "bisection": bisection_schema}
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


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_files_in_docs_are_current(name: str) -> None:
    assert json.loads((DOCS / f"{name}.schema.json").read_text()) == SCHEMAS[name](), (
        f"docs/{name}.schema.json is stale: write json.dumps({name}_schema(), indent=2) and a newline to it"
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


_short = st.text(max_size=4)
_names = st.lists(_short, max_size=2).map(tuple)
_lints = st.builds(Lint, _short, _short, _short, _short)
_steps = st.builds(
    RunStep,
    name=_short,
    transform=_short,
    stage=_short,
    status=st.sampled_from(STATUSES),
    matches=_names,
    created=_names,
    replacements=st.lists(st.builds(Replacement, old=_short, new=_short), max_size=2).map(tuple),
    seconds=st.floats(allow_nan=True),
    lints=st.lists(_lints, max_size=2).map(tuple),
    report=st.none() | reports,
)
_runs = st.builds(RunReport, pipeline=_short, steps=st.lists(_steps, max_size=2).map(tuple), report=st.none() | reports)
_bisections = st.builds(
    Bisection,
    verdict=st.sampled_from(["good", "bad", "unknown"]),
    transform=st.none() | _short,
    transforms=_names,
    together=st.lists(_names, max_size=2).map(tuple),
    report=st.none() | reports,
    lints=st.lists(_lints, max_size=2).map(tuple),
    steps=st.lists(
        st.builds(BisectStep, what=_short, transforms=_names, verdict=st.just("bad"), command=_short), max_size=2
    ).map(tuple),
    environment=st.dictionaries(_short, _short, max_size=2),
)


@pytest.mark.parametrize(("kind", "drawn"), [("run", _runs), ("bisection", _bisections)])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_run_and_bisection_obeys_its_schema(kind: str, drawn: Any, data: st.DataObject) -> None:
    record, schema = data.draw(drawn), SCHEMAS[kind]()
    assert violations(schema, json.loads(record.to_json()), schema) == []
    assert violations(schema, {**json.loads(record.to_json()), "steps": [{}]}, schema)


def doubled(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Be wrong: every relu counts twice."""
    for node in [n for n in gm.graph.nodes if n.target is torch.ops.aten.relu.default]:
        with gm.graph.inserting_after(node):
            made = gm.graph.call_function(torch.ops.aten.mul.Tensor, (node, 2.0))
        node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
    gm.recompile()
    return gm


def test_what_is_saved_of_a_real_run_and_bisection_obeys_the_schemas() -> None:
    model, args = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval(), (torch.randn(3, 4),)
    run = graphprobe.run(model, args, pipeline=[("doubled", doubled)], check=("diff", "total"))
    found = graphprobe.bisect(model, args, pipeline=[("doubled", doubled)])
    assert run.exit_code == 1 and found.transform is not None
    for kind, record in (("run", run), ("bisection", found)):
        schema = SCHEMAS[kind]()
        assert violations(schema, json.loads(record.to_json()), schema) == []

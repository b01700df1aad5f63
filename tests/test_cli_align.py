"""``graphprobe align`` shows every claim with its evidence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import graphprobe
from corpus import mutations
from graphprobe.cli import main
from models import tiny


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    model, args, kwargs = tiny("llama")
    before = graphprobe.capture(model, args, kwargs)
    after = mutations.strip(before, "values")
    for name, graph in (("before", before), ("after", after)):
        graphprobe.save(graph, tmp_path / f"{name}.fx", args=args, kwargs=kwargs)
    return str(tmp_path / "before.fx"), str(tmp_path / "after.fx")


def test_every_operation_is_paired_and_says_why(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["unmatched"]
    assert {c["evidence"] for c in found["claims"]} >= {"structure"}
    assert main(["align", *files, "--node", "*attention*"]) == 0
    text = capsys.readouterr().out
    assert "scaled_dot_product_attention" in text and "2 claims" in text


def test_a_graph_with_its_ids_needs_no_run(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", files[0], files[0], "--no-run", "--json"]) == 0
    assert {c["evidence"] for c in json.loads(capsys.readouterr().out)["claims"]} == {"id"}

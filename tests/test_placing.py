"""Whatever writes a file writes it whole, through links, and never replaces what is no plain file."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import graphprobe
from graphprobe import cli, placing, render

INPUTS = (torch.ones(2, 3),)
GRAPH = graphprobe.capture(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU()), INPUTS)
REPORT = graphprobe.diff(GRAPH, GRAPH, INPUTS)
VIEW = graphprobe.view(GRAPH, "two")
WRITERS = {
    "two.fx": lambda path: graphprobe.save(GRAPH, path, args=INPUTS),
    "report.json": lambda path: cli.output.write_text(path, REPORT.to_json()),
    "report.html": REPORT.to_html,
    "two.dot": lambda path: render.write_graph(VIEW, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_whole_and_a_link_stays_a_link(name: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / name, tmp_path / name
    WRITERS[name](str(real))
    wanted = real.read_bytes()
    real.write_text("old")
    link.symlink_to(real)
    WRITERS[name](str(link))
    assert link.is_symlink() and real.read_bytes() == wanted
    assert stat.S_IMODE(real.stat().st_mode) & 0o111 == 0
    assert {p.name for p in tmp_path.rglob("*")} == {"elsewhere", name}  # nothing is left beside it


@pytest.mark.parametrize("name", WRITERS)
def test_a_pipe_is_given_the_bytes(name: str, tmp_path: Path) -> None:
    plain, pipe = tmp_path / name, tmp_path / f"pipe-{name}"
    WRITERS[name](str(plain))
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    WRITERS[name](str(pipe))
    reader.join(timeout=20)
    assert read == [plain.read_bytes()] and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["two.fx", "report.json", "report.html"])  # a picture is told by its suffix
def test_a_device_is_never_replaced(name: str) -> None:
    with pytest.raises(graphprobe.errors.GraphprobeError, match="cannot write /dev/full: No space left"):
        WRITERS[name]("/dev/full")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout", "/proc/self/fd/1"])
def test_what_is_a_stream_is_known_by_its_name_or_kind(path: str, tmp_path: Path) -> None:
    assert placing.is_stream(path)
    assert not placing.is_stream(tmp_path / "new") and not placing.is_stream(__file__)


@pytest.mark.parametrize("stdout", ["closed", "full"])
def test_a_stdout_that_takes_nothing_gives_no_traceback(stdout: str, tmp_path: Path) -> None:
    saved, drawn = tmp_path / "report.json", tmp_path / "picture.dot"
    saved.write_text(REPORT.to_json())
    shown = f"{sys.executable} -m graphprobe show {saved} -o {drawn}"  # needs no torch, and no seconds to load it
    command = f"{shown} " + (">&-" if stdout == "closed" else ">/dev/full")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if stdout == "closed" else 2)
    assert stdout == "closed" or "graphprobe: cannot write its output: No space left" in done.stderr


def test_the_answer_is_told_where_its_file_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved = str(tmp_path / "two.fx")
    graphprobe.save(GRAPH, saved, args=INPUTS)
    assert cli.main(["diff", saved, saved, "-o", "/dev/full"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("identical") and "cannot write /dev/full" in err

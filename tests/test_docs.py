"""Every command, program and transcript in README.md and docs/ is run here, and what they print is compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from graphprobe import cli
from graphprobe.records import VERDICTS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MARK = "=== end of command ==="


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file it is meant to be, and the name of the transcript it is."""

    language: str
    file: str
    transcript: str
    text: str


def blocks(page: Path) -> list[Block]:
    pattern = r"(?:<!-- transcript: (\w+) -->\n)?^```(\w*)(?: file=(\S+))?\n(.*?)^```$"
    found = re.findall(pattern, page.read_text(encoding="utf-8"), re.M | re.S)
    return [Block(language, file, transcript, text) for transcript, language, file, text in found]


def normal(line: str) -> str:
    """Take out what differs from run to run: numbers, and the blanks around them."""
    return re.sub(r"\s+", " ", re.sub(r"-?\d[\d.,]*(e[+-]\d+)?", "#", line)).strip()


def equal(wanted: list[str], printed: list[str]) -> bool:
    """Whether lines are the same; "[...]" stands for any rest of a line, such as what a broken model says."""
    cut = [(w.partition("[...]")[0], p) for w, p in zip(wanted, printed, strict=True) if "[...]" in w]
    same = all(w == p for w, p in zip(wanted, printed, strict=True) if "[...]" not in w)
    return same and all(p.startswith(w) for w, p in cut)


def assert_printed(expected: str, printed: str) -> None:
    """Compare line by line; a line of three dots stands for any lines."""
    pieces = re.split(r"^\s*\.\.\.\s*$", expected, flags=re.M)
    rest = [normal(line) for line in printed.splitlines() if line.strip()]
    for number, piece in enumerate(pieces):
        wanted = [normal(line) for line in piece.splitlines() if line.strip()]
        starts = [i for i in range(len(rest) - len(wanted) + 1) if equal(wanted, rest[i : i + len(wanted)])]
        assert starts, f"not printed:\n{piece}\n--- printed was ---\n{printed}"
        assert number > 0 or starts[0] == 0, f"printed before the transcript begins:\n{printed}"
        rest = rest[starts[0] + len(wanted) :]
    assert not rest or not pieces[-1].strip(), f"printed after the transcript ends: {rest}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the README tells the reader to write."""
    path = tmp_path_factory.mktemp("docs")
    for block in blocks(README):
        if block.file:
            (path / block.file).write_text(block.text)
    return path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_console_transcripts(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.language != "console":
            continue
        steps = re.split(r"^\$ ", block.text, flags=re.M)[1:]
        commands = [step.partition("\n")[0] for step in steps]
        script = "".join(f"{command}\nstatus=$?\necho '{MARK}'\n(exit $status)\n" for command in commands)
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.stderr == ""
        for step, printed in zip(steps, done.stdout.split(f"{MARK}\n"), strict=False):
            assert_printed(step.partition("\n")[2], printed)


def test_python_programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    namespace: dict[str, Any] = {}
    programs = [block for block in blocks(README) if block.language == "python" and not block.file]
    assert programs
    for block in programs:
        exec(compile(block.text, "README.md", "exec"), namespace)
    assert (folder / "culprit.dot").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_readme_lists_every_command_and_real_make_targets() -> None:
    text = README.read_text(encoding="utf-8")
    listed = re.findall(r"^\| `graphprobe (\w+)", text, re.M)
    assert sorted(listed) == sorted(cli.COMMANDS)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets


def test_how_it_works_explains_every_verdict() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(VERDICTS)


@pytest.mark.slow
def test_the_transcript_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprobe.demo import story, subjects

    if subjects._missing():
        pytest.skip(subjects._missing())
    subjects.choose("smollm2", lambda text: None)  # a conversion would be told in the transcript
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    settings: dict[str, Any] = {"model": "smollm2", "layer": None, "prompt": None, "directory": "out"}
    story.tell(**settings, say=lines.append, progress=lambda done, total, what: None)
    (transcript,) = [block for block in blocks(README) if block.transcript == "demo"]
    assert_printed(transcript.text, "\n".join(lines))

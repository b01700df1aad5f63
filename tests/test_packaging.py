"""What a user installs: the wheel's contents, its entry points, its pins and the Makefile around them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the sources and nothing else."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("src", "transforms"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (built,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def test_every_source_file_is_in_the_wheel_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {
        str(path.relative_to(ROOT / top))
        for top in ("src", "transforms")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path)
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert {"graphprobe/py.typed", "graphprobe_transforms/py.typed"} <= packed
    assert any(name.startswith("graphprobe/render/templates/") for name in packed)


def test_licence_and_commands_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    points = next(wheel.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "graphprobe = graphprobe.cli:main" in points
    assert "[graphprobe.transforms]" in points


def test_installed_transforms_bear_their_own_names() -> None:
    points = [p for p in entry_points(group="graphprobe.transforms") if p.value.startswith("graphprobe_transforms.")]
    assert points
    for point in points:
        assert point.load().name == point.name


def test_every_requirement_is_pinned() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("\ndependencies") : text.index("[project.scripts]")]
    required = set(re.findall(r'"([A-Za-z0-9-]+)>=', section)) - {"matplotlib"}  # plots are drawn by hand only
    pinned = set(re.findall(r"^([A-Za-z0-9_-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    assert {name.lower() for name in required} <= {name.lower() for name in pinned}


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.M)
    done = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True)
    listed = re.findall(r"^  make (\S+)", done.stdout, re.M)
    assert sorted(listed) == sorted(phony.split())

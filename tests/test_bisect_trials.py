"""Trials of a bisection: they do not see each other's state, are remembered, and their commands reproduce them."""

from __future__ import annotations

import functools
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import bisect_passes as passes
import graphprobe
from bisect_passes import BUGS, Planted, chain, search
from graphprobe.bisection import store
from graphprobe.bisection.records import Bisection
from graphprobe.cli import main
from graphprobe.errors import InputError

# --- copies, lints ---------------------------------------------------------------------------------------------------


class Counter(torch.nn.Module):
    """Counts its calls in a buffer, and is different at the second."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x * self.calls


def test_trials_do_not_see_each_others_state() -> None:
    def run_twice(gm: GraphModule) -> bool:
        first, second = gm(x), gm(x)
        return torch.equal(first, x) and torch.equal(second, 2 * x)

    model, x = Counter(), torch.randn(3)
    found = graphprobe.bisect(model, (x,), pipeline=[passes.idle, passes.idle, passes.idle], check=run_twice)
    assert found.ok and float(model.calls) == 0


def test_a_transform_that_writes_into_weights_spoils_no_other_trial() -> None:
    def spoil(gm: GraphModule) -> None:
        with torch.no_grad():
            gm.get_parameter("weight").mul_(2)

    model, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    was = model.weight.detach().clone()
    found = graphprobe.bisect(model, (x,), pipeline=[passes.idle, spoil, passes.idle])
    assert found.transforms == ("spoil",) and torch.equal(model.weight, was)
    assert {lint.rule for lint in found.lints} == {"weight-written"}


def test_a_graph_goes_in_as_it_is() -> None:
    seen = []

    def look(gm: GraphModule) -> None:
        seen.append([node.op for node in gm.graph.nodes])

    gm = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
    found = graphprobe.bisect(gm, (torch.randn(2, 4),), pipeline=[look])
    assert found.ok and seen[0] == ["placeholder", "call_module", "call_module", "output"]


def test_lints_bear_the_name_of_their_transform() -> None:
    found = search(passes.honest, passes.loses_val)
    assert [(lint.rule, lint.transform) for lint in found.lints] == [("missing-val", "loses_val")]


# --- memory, files, commands -----------------------------------------------------------------------------------------


def test_an_interrupted_bisection_goes_on_where_it_was(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    asked: list[int] = []

    def careful(gm: GraphModule) -> bool:
        asked.append(1)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return passes.node_of(gm, torch.ops.aten.mul.Tensor) is None

    pipeline = [passes.idle, passes.honest, passes.wrong_sin, passes.idle]
    with pytest.raises(KeyboardInterrupt):
        search(*pipeline, check=careful, state=state)
    found = search(*pipeline, check=careful, state=state)
    assert found.transforms == ("wrong_sin",)
    assert sum(step.remembered for step in found.steps) == 2
    before = len(asked)
    again = search(*pipeline, check=careful, state=state)
    assert again.transforms == found.transforms and len(asked) == before
    with pytest.raises(InputError, match="another model, pipeline"):
        search(*pipeline[1:], check=careful, state=state)
    with pytest.raises(InputError, match="another model, pipeline"):
        search(*pipeline, check=functools.partial(careful), state=state)
    state.write_text("{}")
    with pytest.raises(InputError, match="no state file"):
        search(*pipeline, state=state)


def test_an_edited_transform_or_script_is_another_question(tmp_path: Path) -> None:
    def kept(factor: float, word: str = "") -> str:
        return store.described([functools.partial(passes.scaled, factor=factor), Planted(BUGS[0], 1), word])

    assert kept(2.0) == kept(2.0) != kept(3.0)
    assert store.described(Planted(BUGS[0], 0)) != store.described(Planted(BUGS[0], 1))
    script = tmp_path / "check.py"
    script.write_text("one")
    before = store.files_in(f"python {script} {{after}}")
    script.write_text("another")
    assert before != store.files_in(f"python {script} {{after}}") != ""


@pytest.mark.parametrize("check", [None, lambda gm: passes.node_of(gm, torch.ops.aten.mul.Tensor) is None])
def test_python_commands_work_where_the_names_are_known(check: Any) -> None:
    def mine(gm: GraphModule, first: int | None = None) -> Any:
        return passes.rewrites(gm, first, wrong=(2,))

    found = search(("start", passes.idle), mine, passes.honest, check=check, min_coverage=0.5)
    assert found.transforms == ("mine",) and any("first=" in command for command in found.commands)
    model, args = chain()
    names = {"graphprobe": graphprobe, "functools": functools, "model": model, "args": args, "kwargs": {}}
    for step in found.steps:
        printed: list[Any] = []
        exec(step.command, {**names, "idle": passes.idle, "honest": passes.honest, "mine": mine, "check": check,
                            "print": printed.append})  # fmt: skip
        good = printed[0] if check is not None else printed[0].exit_code == 0
        assert good is (step.verdict == "good"), step.command


def test_a_bisection_survives_json() -> None:
    found = search(passes.honest, passes.wrong_sin)
    again = Bisection.from_json(found.to_json())
    assert again == found and json.loads(found.to_json())["commands"] == list(found.commands)
    with pytest.raises(ValueError, match="no graphprobe Bisection"):
        Bisection.from_json("{}")


def test_a_command_judges_by_its_exit_status(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(
        "import sys, zipfile\n"
        "graph = zipfile.ZipFile(sys.argv[1]).read('graph.json').decode()\n"
        "sys.exit(3 if 'aten.mul.Tensor' in graph else 125 if 'aten.clamp_min.default' in graph else 0)\n"
    )
    command = f"{shlex.quote(sys.executable)} -W ignore {shlex.quote(str(script))} {{after}}"
    found = search(passes.wrong_sin, passes.honest, check=command)
    assert found.transforms == ("wrong_sin",)
    assert {"good", "bad", "unknown"} == {step.verdict for step in found.steps}
    with pytest.raises(InputError, match="cannot be run"):
        search(passes.honest, check="there_is_no_such_command")


def test_the_command_line_says_it_and_its_commands_reproduce_each_trial(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    pipeline = "bisect_passes:honest,bisect_passes:wrong_sin,bisect_passes:idle"
    assert main(["bisect", "bisect_passes:chain", "--pipeline", pipeline, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["transforms"] == ["wrong_sin"]
    for step, command in zip(found["steps"], found["commands"], strict=True):
        words = shlex.split(command)
        assert words[0] == "graphprobe"
        assert main(words[1:]) == {"good": 0, "bad": 1}[step["verdict"]]
        capsys.readouterr()


def test_the_command_line_in_a_process_of_its_own() -> None:
    words = ["bisect", "bisect_passes:chain", "--pipeline", "bisect_passes:honest"]
    done = subprocess.run(
        [sys.executable, "-m", "graphprobe", *words],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing is wrong" in done.stdout

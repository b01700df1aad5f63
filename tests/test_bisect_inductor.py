"""Inductor as a pipeline: bugs are named by stage, pass and node, rounding is called rounding, private names exist."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphprobe
from bisect_models import mlp, needs_compiler
from graphprobe import torch_private
from graphprobe.bisection.choice import Choice, is_inductor
from graphprobe.bisection.inductor import recording
from graphprobe.bisection.inductor.recorder import Plan, Recorder
from graphprobe.bisection.records import Bisection
from graphprobe.cli import main
from graphprobe.errors import InputError, PipelineError
from graphprobe.records import RunReport

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
needs_213 = pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the bugs were seen in torch 2.13")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# --- examples --------------------------------------------------------------------------------------------------------


def test_the_pipeline_of_the_example_is_wrong_in_its_second_match(capsys: pytest.CaptureFixture[str]) -> None:
    found = example("bisect_pipeline").main()
    assert (found.transform, found.match) == ("relu_to_clamp", "relu_1")
    assert "relu_to_clamp is to blame" in capsys.readouterr().out


def check_case(name: str) -> Bisection:
    """Bisect a case of the example, and see that the answer is the one that it states."""
    module = example("bisect_inductor")
    found, case = module.bisect(name), module.CASES[name]
    assert found.report is not None and found.report.verdict == case.verdict
    assert (found.transform or "").partition(":")[0] == (case.stage or "")
    assert found.transforms == ((found.transform,) if case.stage else ())
    assert case.match in (found.match or "")
    assert found.ok is (case.stage is None)
    return found


@needs_compiler
@needs_213
def test_permuted_keys_are_named_by_stage_pass_and_node() -> None:
    found = check_case("permuted_keys")
    assert found.transform == "joint: pass_pattern_0"
    assert found.report is not None and found.report.first is not None
    assert "scaled_dot_product" in found.report.first.op


@needs_compiler
@needs_213
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in example("bisect_inductor").CASES if name != "permuted_keys"])
def test_reports_of_the_tracker_are_bugs_or_rounding(name: str) -> None:
    found = check_case(name)
    if name == "remainder":
        assert any("without vectorisation" in note for note in found.notes)
    if found.ok:
        assert found.report is not None
        assert any(note.startswith("the generated code, output") for note in found.report.notes)  # the proof


# --- recording -------------------------------------------------------------------------------------------------------


def test_every_recorded_graph_runs_in_the_place_of_the_code() -> None:
    model, args = mlp()
    recorded = recording.record(model, args, {}, Plan(codegen=False))
    (piece,) = recorded.pieces
    stages = [snapshot.stage for snapshot in piece.snapshots]
    assert stages[:2] == ["dynamo", "aot"] and piece.adapter is not None
    (wanted,) = recorded.eager()
    for place in range(len(stages)):
        (found,) = recorded.run({piece.number: place})
        torch.testing.assert_close(found, wanted)
    torch.compiler.reset()


@needs_compiler
def test_an_honest_compilation_is_rounding_with_a_proof() -> None:
    model, args = mlp()
    found = graphprobe.bisect(model, args, pipeline="inductor")
    assert (found.verdict, found.transform, found.transforms) == ("good", None, ())
    assert found.report is not None and found.report.verdict in ("identical", "rounding")
    assert any(note.startswith("the generated code, output") for note in found.report.notes)


@needs_compiler
@needs_213
def test_a_check_of_ones_own_names_the_same_pass() -> None:
    torch.manual_seed(0)
    model, args = example("bisect_inductor").CASES["permuted_keys"].make()
    with torch.no_grad():
        wanted = model(*args)

    def agrees(function: object) -> bool:
        with torch.no_grad():
            return torch.allclose(function(*args), wanted, atol=1e-4)  # type: ignore[operator]

    found = graphprobe.bisect(model, args, pipeline="inductor", check=agrees)
    assert found.transform == "joint: pass_pattern_0"
    assert found.match is not None and found.match.startswith("_sfdp_pattern_")
    assert graphprobe.bisect(model, args, pipeline="inductor", check=lambda function: True).ok


@pytest.mark.parametrize("options", [{"check": "true"}, {"state": "state.json"}, {"dynamic_shapes": {}}])
def test_what_has_no_meaning_for_inductor_is_refused(options: dict[str, object]) -> None:
    model, args = mlp()
    with pytest.raises(InputError, match="pipeline='inductor'"):
        graphprobe.bisect(model, args, pipeline="inductor", **options)  # type: ignore[arg-type]


@needs_compiler
def test_the_command_line_takes_inductor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["bisect", "bisect_passes:chain", "--pipeline", "inductor"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out


@needs_compiler
@needs_213
def test_a_run_of_inductor_has_a_step_for_each_pass_and_dumps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, args = example("bisect_inductor").CASES["permuted_keys"].make()
    report = graphprobe.run(model, args, pipeline="inductor", check=("diff", "total"), dump_dir=tmp_path / "dumps")
    verdicts = {step.transform: step.report.verdict for step in report.steps if step.report is not None}
    assert verdicts["joint: pass_pattern_0"] == "semantic" and verdicts["aot"] == "rounding"
    assert report.first is not None and report.first.transform == "joint: pass_pattern_0"
    assert any(match.startswith("_sfdp_pattern_") for match in report.first.matches)
    assert report.report is not None and report.report.verdict == "semantic"
    assert (tmp_path / "dumps" / "index.html").exists()
    assert len(list((tmp_path / "dumps").glob("*.txt"))) == len(report.steps) - 1  # code is no graph


@needs_compiler
@needs_213
@pytest.mark.parametrize(
    "name", ["nearest", *(pytest.param(n, marks=pytest.mark.slow) for n in ("strides", "remainder"))]
)
def test_the_command_of_every_step_makes_the_same_trial(name: str) -> None:
    model, args = example("bisect_inductor").CASES[name].make()
    found = graphprobe.bisect(model, args, pipeline="inductor")
    for step in found.steps:
        reports: list[RunReport] = []
        names = {"graphprobe": graphprobe, "model": model, "args": args, "kwargs": {}, "print": reports.append}
        exec(step.command, names)
        assert reports[0].exit_code == {"good": 0, "bad": 1, "unknown": 2}[step.verdict], step


@given(
    before=st.sampled_from(["", "aot", "joint: pass_pattern_0#2", 'a "quoted", {odd} = label']),
    graph=st.integers(0, 3),
    lowered=st.none() | st.integers(0, 9),
    config=st.dictionaries(st.sampled_from(["cpp.simdlen", "epilogue_fusion"]), st.booleans() | st.integers(0, 9)),
)
def test_a_choice_of_points_has_a_text_form(
    before: str, graph: int, lowered: int | None, config: dict[str, Any]
) -> None:
    choice = Choice(before, "codegen", graph, lowered=lowered, config=config)
    assert Choice.parse(str(choice)) == choice and is_inductor(str(choice))


@pytest.mark.parametrize(
    ("text", "message"),
    [("inductor{befor=1}", "no option 'befor'.*before"), ("inductor{after=x}", "no JSON"), ("inductor{", "expected")],
)
def test_a_choice_that_cannot_be_read_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Choice.parse(text)


@needs_compiler
def test_a_point_that_is_not_there_is_named() -> None:
    model, args = mlp()
    with pytest.raises(PipelineError, match=r"no point 'aott'.*aot"):
        graphprobe.run(model, args, pipeline='inductor{before="dynamo", after="aott"}', check=("total",))


@needs_compiler
def test_everything_that_is_listened_to_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a torch that has the names but does other things with them, this fails."""
    heard: set[str] = set()
    for name in ("phase", "enter", "leave", "match", "lowered", "falls_back"):
        honest = getattr(Recorder, name)

        def told(self: Recorder, *args: Any, name: str = name, honest: Any = honest) -> Any:
            heard.add(name if name not in ("phase", "enter") else f"{name} {args[0]}")
            return honest(self, *args)

        monkeypatch.setattr(Recorder, name, told)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.transpose(-1, -2) / 4.0, -1) @ x  # an attention, and a product with a constant

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(x)

    recorded = recording.record(Net(), (torch.randn(2, 4, 8, 16),), {})
    stages = {f"{what} {stage}" for what in ("phase", "enter") for stage in ("joint", "post_grad")}
    assert {*stages, "leave", "match", "lowered", "falls_back"} <= heard
    (piece,) = recorded.pieces
    assert piece.adapter is not None and piece.inner_outputs is not None and piece.outputs is not None
    assert recorded.recorder.lowerings[0]
    torch.compiler.reset()


def test_what_graphprobe_itself_raises_is_no_failure_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Recorder, "_take")
    model, args = mlp()
    with pytest.raises(Exception, match="'Recorder' object has no attribute '_take'"):
        graphprobe.bisect(model, args, pipeline="inductor")


def test_a_torch_that_lacks_a_name_or_an_option_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = mlp()
    monkeypatch.setitem(recording.CONFIG, "no_such_option", 1)
    with pytest.raises(PipelineError, match=r"torch 2.*has no option torch._inductor.config.no_such_option"):
        graphprobe.bisect(model, args, pipeline="inductor")
    monkeypatch.setitem(torch_private.TABLE, "gone", torch_private.Private("torch._inductor.graph:Gone", "go on"))
    with pytest.raises(PipelineError, match=r"has no torch._inductor.graph:Gone"):
        graphprobe.bisect(model, args, pipeline="inductor")


# --- private names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", torch_private.TABLE)
def test_this_torch_has_every_private_name(name: str) -> None:
    assert torch_private.fetch(name) is not None


def test_a_private_name_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch_private.Private("torch._inductor.compile_fx:no_such_name", "try it")
    monkeypatch.setitem(torch_private.TABLE, "gone", row)
    with pytest.raises(PipelineError, match=r"no_such_name.*needs to try it.*2\.13"):
        torch_private.fetch("gone")

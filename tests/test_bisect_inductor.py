"""Inductor as a pipeline: bugs are named by stage, pass and node, rounding is called rounding, private names exist."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import graphprobe
from graphprobe import torch_private
from graphprobe.bisection.inductor import recording
from graphprobe.bisection.inductor.outputs import Reference, compared
from graphprobe.bisection.inductor.recording import Plan
from graphprobe.cli import main
from graphprobe.errors import InputError, PipelineError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ on a CPU")
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


@needs_compiler
@needs_213
def test_permuted_keys_are_named_by_stage_pass_and_node_within_a_minute() -> None:
    started = time.monotonic()
    found = example("bisect_inductor").bisect("permuted_keys")
    assert time.monotonic() - started < 60
    assert found.transform == "joint: pass_pattern_0" and found.transforms == (found.transform,)
    assert found.match is not None and found.match.startswith("_sfdp_pattern_")
    assert found.report is not None and found.report.verdict == "semantic"
    assert found.report.first is not None and "scaled_dot_product" in found.report.first.op


@needs_compiler
@needs_213
@pytest.mark.slow
@pytest.mark.parametrize("name", ["remainder", "pooled_normalised", "norm_of_ones", "condition_number"])
def test_reports_of_the_tracker_are_bugs_or_rounding(name: str) -> None:
    module = example("bisect_inductor")
    found, case = module.bisect(name), module.CASES[name]
    assert found.report is not None and found.report.verdict == case.verdict
    assert (found.transform or "").partition(":")[0] == (case.stage or "")
    if case.stage == "codegen":
        assert found.match is not None and found.match.endswith("at remainder")
        assert any("without vectorisation" in note for note in found.notes)
    else:
        assert found.ok and found.transforms == ()


# --- recording -------------------------------------------------------------------------------------------------------


def mlp() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval(), (torch.randn(4, 8),)


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


def test_every_step_has_a_command() -> None:
    model, args = mlp()
    found = graphprobe.bisect(model, args, pipeline="inductor")
    assert found.commands and all("pipeline='inductor'" in command for command in found.commands)


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_outputs_are_judged_by_their_distance_from_exact_arithmetic() -> None:
    model, args = mlp()
    gm = graphprobe.capture(model, args)
    reference = Reference.of(gm, args)
    (x,) = [v for k, v in reference.native.items() if not k.startswith("state:")]
    step = torch.finfo(x.dtype).eps / 2
    verdicts = [reference.compare([y])[0].kind for y in (x, x * (1 + 2 * step), x * (1 + 100 * step), 1.5 * x, x[:2])]
    assert verdicts == ["identical", "rounding", "precision", "semantic", "structural"]
    spoiled = x.clone()
    spoiled[0, 0] = float("nan")
    assert reference.compare([spoiled])[0].kind == "nonfinite"


def test_the_reference_can_be_the_one_that_is_wrong() -> None:
    truth = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    right = truth.float()
    assert compared("y", 1.5 * right, right, truth).better == "after"
    assert compared("y", right, 1.5 * right, truth).better == "before"


# --- private names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", torch_private.TABLE)
def test_this_torch_has_every_private_name(name: str) -> None:
    assert torch_private.fetch(name) is not None


def test_a_private_name_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch_private.Private("torch._inductor.compile_fx:no_such_name", "try it")
    monkeypatch.setitem(torch_private.TABLE, "gone", row)
    with pytest.raises(PipelineError, match=r"no_such_name.*needs to try it.*2\.13"):
        torch_private.fetch("gone")

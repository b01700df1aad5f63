"""Inductor as a pipeline: bugs are named by stage, pass and node, rounding is called rounding, private names exist."""

from __future__ import annotations

import importlib.util
import shutil
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
import models
from graphprobe import torch_private
from graphprobe.bisection.choice import Choice, is_inductor
from graphprobe.bisection.inductor import recording
from graphprobe.bisection.inductor.noise import Shaking
from graphprobe.bisection.inductor.outputs import Reference, compared
from graphprobe.bisection.inductor.recorder import Plan
from graphprobe.bisection.records import Bisection
from graphprobe.cli import main
from graphprobe.errors import InputError, PipelineError
from graphprobe.records import RunReport

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


# --- models of all kinds ---------------------------------------------------------------------------------------------


class Cached(nn.Module):
    """Attention over a cache in its buffers: each call writes one row and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(4, 8))
        self.register_buffer("length", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.index_copy_(0, self.length.view(1), self.keys(x))
        self.length.add_(1)
        return torch.softmax(x @ self.cache.t(), -1) @ self.cache


class Broken(nn.Module):
    """How it goes on depends on a number, so that Dynamo makes several graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x if x.sum().item() > 1e9 else torch.softmax(self.second(x.relu()), -1)


def seeded(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


@needs_compiler
def test_state_is_compared_and_left_as_it_was() -> None:
    model, x = seeded(Cached), torch.randn(1, 8)
    found = graphprobe.bisect(model, (x,), pipeline="inductor")
    assert found.ok and int(model.length) == 0 and not model.cache.any()  # type: ignore[operator]
    assert found.steps[-1].what == "eager against the compiled model, end to end"


@needs_compiler
def test_graphs_around_a_break_are_judged_each() -> None:
    found = graphprobe.bisect(seeded(Broken), (torch.randn(4, 8),), pipeline="inductor")
    assert found.ok
    assert {"graph 0: dynamo against aot", "graph 1: dynamo against aot"} <= {step.what for step in found.steps}


@needs_compiler
def test_an_exported_program_goes_through_inductor() -> None:
    model, args = mlp()
    assert graphprobe.bisect(torch.export.export(model, args), args, pipeline="inductor").ok


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(7, 7)


class Dropped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True) + x


@needs_compiler
@pytest.mark.parametrize(("kind", "reason"), [(Raises, "the model itself raises"), (Dropped, "draws random numbers")])
def test_what_cannot_be_judged_is_unknown(kind: type[nn.Module], reason: str) -> None:
    found = graphprobe.bisect(seeded(kind), (torch.randn(4, 8),), pipeline="inductor")
    assert (found.verdict, found.transform) == ("unknown", None)
    assert any(reason in text for text in (*found.notes, *(step.reason for step in found.steps)))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "mistral", "mixtral", "conv", "mlp", "branch"])
def test_honest_models_are_not_blamed(name: str, dtype: torch.dtype) -> None:
    if name in models.TEXT:
        pytest.importorskip("transformers")
    model, args, kwargs = models.tiny(name, dtype)
    found = graphprobe.bisect(model, args, kwargs, pipeline="inductor")
    assert (found.verdict, found.transform, found.transforms) == ("good", None, ())
    assert found.report is not None and found.report.verdict in ("identical", "rounding")


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


def test_another_dtype_is_another_output_unless_both_are_floating() -> None:
    x = torch.ones(4, dtype=torch.uint8)
    assert compared("y", x, x.to(torch.int64), x).kind == "structural"
    y = torch.linspace(0, 1, 64)
    assert compared("y", y, y.bfloat16(), y.double(), [y.bfloat16().float()]).kind == "rounding"


def test_noise_reaches_what_is_rounded_and_nothing_else() -> None:
    x = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    with Shaking(0):
        moved, kept, narrowed, added = x * 2, x.view(8, 8).t().flip(0), x.half(), x.clone().add_(1)
    for found, plain in ((moved, x * 2), (narrowed, x.half()), (added, x + 1)):
        assert not torch.equal(found, plain) and torch.allclose(found, plain, rtol=1e-2)
    assert torch.equal(kept, x.view(8, 8).t().flip(0))


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

"""graphprobe.bisect: every planted bug is named by transform and match; what is unknown stays unknown."""

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
from bisect_passes import BUGS, Bug, Planted, chain, planted
from graphprobe.bisection import decompositions, store
from graphprobe.bisection.records import Bisection
from graphprobe.cli import main
from graphprobe.errors import InputError
from transform_tools import captured, with_own_weights


def search(*pipeline: Any, **options: Any) -> Bisection:
    model, args = chain()
    return graphprobe.bisect(model, args, pipeline=list(pipeline), **options)


def said(found: Bisection) -> list[tuple[str, str]]:
    return [(step.what, step.verdict) for step in found.steps]


# --- which transform, which match ------------------------------------------------------------------------------------


def assert_named(bug: Bug, layer: int, gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Bisect the demo's pipeline with a bug planted in one layer: transform and match have to be named."""
    if bug.change is passes.weight_of_another:  # as random as all others, but of another value
        gm = with_own_weights(gm)
        torch.nn.init.normal_(gm.get_parameter("model.norm.weight"), generator=torch.Generator().manual_seed(0))
    found = graphprobe.bisect(gm, args, kwargs, pipeline=planted(bug, layer))
    assert (found.verdict, found.exit_code) == ("bad", 1)
    assert found.transform == bug.host and found.transforms == (bug.host,)
    assert found.match is not None and f".layers.{layer}." in f"{found.match}."
    assert found.report is not None and found.report.verdict == "semantic"
    assert found.report.first is not None and f".layers.{layer}." in found.report.first.module_path
    assert f"{bug.host} is to blame" in str(found) and found.match in str(found)


@pytest.mark.parametrize("number", range(len(BUGS)), ids=lambda i: BUGS[i].change.__name__)
def test_a_bug_in_any_transform_is_named_with_its_match(number: int) -> None:
    assert_named(BUGS[number], number % 2, *captured("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.change.__name__)
def test_a_bug_in_any_transform_at_any_layer_is_named_with_its_match(bug: Bug, layer: int) -> None:
    assert_named(bug, layer, *passes.deep_llama(layers=6))


def test_an_honest_pipeline_is_not_blamed() -> None:
    gm, args, kwargs = captured("llama")
    found = graphprobe.bisect(gm, args, kwargs, pipeline=",".join(passes.HONEST))
    assert (found.verdict, found.exit_code, found.ok) == ("good", 0, True)
    assert found.transform is None and found.transforms == () and found.match is None
    assert found.report is not None and found.report.verdict == "rounding"
    assert len(found.steps) == 1


@pytest.mark.parametrize("at", range(4))
def test_the_position_does_not_matter(at: int) -> None:
    pipeline: list[Any] = [passes.idle, passes.honest, passes.idle]
    pipeline.insert(at, passes.wrong_sin)
    found = search(*pipeline)
    assert found.transforms == ("wrong_sin",)
    ablated = "the first 3 of 4 transforms" if at == 3 else "all but wrong_sin"
    assert {("wrong_sin alone", "bad"), (ablated, "good")} <= set(said(found))


def test_all_that_are_guilty_are_named_the_first_of_them_first() -> None:
    found = search(passes.idle, passes.wrong_tanh, passes.honest, passes.wrong_sin)
    assert found.transform == "wrong_tanh"
    assert found.transforms == ("wrong_tanh", "wrong_sin")
    assert found.together == (("wrong_tanh",), ("wrong_sin",))
    assert "wrong_tanh is to blame" in str(found) and "so is wrong_sin" in str(found)


def test_two_that_are_wrong_only_together_are_both_named() -> None:
    pipeline = [passes.idle, passes.honest, passes.idle, passes.assumes_relu, passes.idle]
    found = search(*pipeline)
    assert found.transforms == ("honest", "assumes_relu") and found.together == (found.transforms,)
    assert found.report is not None and found.report.verdict == "semantic"
    assert "wrong only together" in str(found)
    assert search(*pipeline[2:]).ok and search(*pipeline[:3]).ok


def test_four_that_are_wrong_only_together_are_all_named() -> None:
    def mark(key: str) -> Any:
        def marks(gm: GraphModule) -> None:
            gm.meta[key] = True

        return f"mark {key}", marks

    def wrong_if_all(gm: GraphModule) -> None:
        if all(gm.meta.get(key) for key in "abc"):
            passes.wrong_sin(gm)

    pipeline = [mark("a"), passes.idle, mark("b"), passes.honest, mark("c"), passes.idle, wrong_if_all, passes.idle]
    found = search(*pipeline)
    assert found.together == (("mark a", "mark b", "mark c", "wrong_if_all"),)


@pytest.mark.parametrize(
    "pipeline",
    [
        [passes.doubles, passes.idle, passes.halves, passes.wrong_tanh],
        [passes.wrong_tanh, passes.doubles, passes.halves],
        [passes.doubles, passes.wrong_tanh, passes.halves, passes.idle],
    ],
    ids=["after", "before", "between"],
)
def test_what_a_later_transform_makes_up_for_is_not_blamed(pipeline: list[Any]) -> None:
    found = search(*pipeline)
    assert found.transform == "wrong_tanh" and found.transforms == ("wrong_tanh",)
    assert search(*(one for one in pipeline if one is not passes.wrong_tanh)).ok
    assert search(passes.doubles, passes.idle).transforms == ("doubles",)


def test_a_pipeline_of_thirty_is_searched_in_few_trials() -> None:
    pipeline: list[Any] = [passes.idle] * 30
    pipeline[22] = passes.wrong_sin
    found = search(*pipeline)
    assert found.transforms == ("wrong_sin",) and len(found.steps) <= 9


def test_names_are_those_of_the_pairs_and_repeated_ones_are_numbered() -> None:
    found = search(("first", passes.idle), ("again", passes.idle), ("again", passes.wrong_sin))
    assert found.transform == "again#2"


@pytest.mark.parametrize("wrong", [(0,), (2,), (3,), (1, 3)])
def test_a_transform_that_takes_first_is_limited_until_the_match_is_known(wrong: tuple[int, ...]) -> None:
    def always(gm: GraphModule) -> bool:
        """Judge without graphprobe.diff, which could name the match by itself."""
        return torch.allclose(gm(*args), good, atol=1e-4)

    model, args = chain()
    good = model(*args)
    rewrite = functools.partial(passes.rewrites, wrong=wrong)
    found = graphprobe.bisect(model, args, pipeline=[passes.idle, ("rewrite", rewrite)], check=always)
    assert found.transform == "rewrite"
    assert found.match == ("cos", "sin", "relu", "tanh")[wrong[0]]
    assert any("limited to its first" in step.what and "first=" in step.command for step in found.steps)


def test_decompositions_are_a_pipeline_of_one_operator_each(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(torch.addcmul(x, x, x)).cos()

    args = (torch.randn(4, 4),)
    assert graphprobe.bisect(Net(), args, pipeline="decompositions").ok
    honest = decompositions._table()

    def too_large(*given: Any, **options: Any) -> torch.Tensor:
        return honest[torch.ops.aten.silu.default](*given, **options) * 1.01

    table = {**honest, torch.ops.aten.silu.default: too_large}
    monkeypatch.setattr(decompositions, "_table", lambda: table)
    found = graphprobe.bisect(Net(), args, pipeline="decompositions")
    assert found.transforms == ("decompose aten.silu.default",)
    assert found.report is not None and found.report.verdict == "semantic"


# --- crashes, NaNs, what cannot be judged ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, MemoryError, RecursionError])
def test_a_transform_that_fails_is_bad(error: type[BaseException]) -> None:
    def raises(gm: GraphModule) -> None:
        raise error("out of luck")

    found = search(passes.honest, raises, passes.idle)
    assert found.transforms == ("raises",)
    assert found.report is not None and found.report.verdict == "structural"
    assert "out of luck" in str(found)


@pytest.mark.parametrize("broken", [passes.bad_shape, passes.one_more_input, passes.one_more_output])
def test_a_graph_that_cannot_be_run_or_called_alike_is_bad(broken: Any, capfd: pytest.CaptureFixture[str]) -> None:
    found = search(passes.honest, broken)
    assert found.transforms == (broken.__name__,)
    assert found.report is not None and found.report.verdict == "structural"
    assert "Traceback" not in capfd.readouterr().err


def test_a_transform_that_fails_only_after_another_is_named_with_it() -> None:
    found = search(passes.idle, passes.honest, passes.idle, passes.fails_on_clamp)
    assert found.transforms == ("honest", "fails_on_clamp") and found.together == (found.transforms,)
    assert found.report is not None and "cannot take a clamp" in found.report.notes[0]


def test_a_transform_may_return_another_module() -> None:
    assert search(passes.idle, passes.another_module, passes.idle).transforms == ("another_module",)


def test_a_check_that_is_not_steady_proves_nothing() -> None:
    said: list[bool] = []

    def moody(gm: GraphModule) -> bool:
        said.append(not said or not said[-1])
        return said[-1]

    found = search(passes.idle, passes.wrong_sin, check=moody)
    assert (found.verdict, found.transforms) == ("unknown", ())
    assert any("not steady" in note for note in found.notes)


def test_a_transform_that_is_not_steady_is_named_and_proves_nothing() -> None:
    calls: list[int] = []

    def moody(gm: GraphModule) -> None:
        calls.append(1)
        if len(calls) % 2:
            passes.wrong_sin(gm)

    found = search(passes.idle, moody, passes.honest)
    assert (found.verdict, found.transforms) == ("unknown", ())
    assert any("the transform moody is not steady" in note for note in found.notes)


def test_one_nan_more_is_bad_where_there_were_some_before() -> None:
    class Masked(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(x)

    def spoils(gm: GraphModule) -> None:
        node = passes.node_of(gm, torch.ops.aten.log.default)
        assert node is not None
        node.target = torch.ops.aten.log2.default
        with gm.graph.inserting_before(node):
            node.update_arg(0, gm.graph.call_function(torch.ops.aten.sub.Tensor, (node.args[0], 1.5)))

    x = torch.tensor([-1.0, 1.0, 2.0])
    found = graphprobe.bisect(Masked(), (x,), pipeline=[passes.idle, spoils], check=lambda gm: True)
    assert found.transforms == ("spoils",) and "NaN" in found.steps[-1].reason + found.steps[0].reason


@pytest.mark.parametrize("check", [None, lambda gm: True], ids=["diff", "predicate"])
def test_new_nans_are_bad_whatever_a_check_says(check: Any) -> None:
    found = search(passes.idle, passes.divides_by_zero, check=check)
    assert found.transforms == ("divides_by_zero",)
    assert found.report is not None and found.report.verdict == "nonfinite"


def test_a_transform_that_only_fails_without_the_guilty_one_is_not_blamed() -> None:
    def wrong_clamp(gm: GraphModule) -> None:
        passes.honest(gm)
        passes.scaled(gm, torch.ops.aten.clamp_min.default, 2.0)

    found = search(passes.idle, wrong_clamp, passes.needs_clamp)
    assert found.transforms == ("wrong_clamp",)
    assert any("whether more is wrong cannot be judged" in note for note in found.notes)


def test_what_cannot_be_judged_is_neither_good_nor_bad() -> None:
    def undecided(gm: GraphModule) -> bool | None:
        return None if passes.node_of(gm, torch.ops.aten.clamp_min.default) is not None else True

    found = search(passes.idle, passes.honest, check=undecided)
    assert (found.verdict, found.exit_code, found.transforms) == ("unknown", 2, ())

    def bad_or_undecided(gm: GraphModule) -> bool | None:
        if passes.node_of(gm, torch.ops.aten.mul.Tensor) is not None:
            return False
        return undecided(gm)

    found = search(passes.idle, passes.honest, passes.idle, passes.wrong_sin, check=bad_or_undecided)
    assert found.transforms == ("wrong_sin",)
    assert any("count as neither" in note for note in found.notes)


def test_a_model_that_is_bad_itself_has_no_guilty_transform() -> None:
    found = search(passes.honest, check=lambda gm: False)
    assert (found.verdict, found.transform) == ("unknown", None)
    assert any("no transform is to blame" in note for note in found.notes)


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

"""graphprobe.bisect: every planted bug is named by transform and match; what is unknown stays unknown."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import bisect_passes as passes
import graphprobe
from bisect_passes import BUGS, Bug, chain, planted, search
from graphprobe.bisection import decompositions
from graphprobe.bisection.records import Bisection
from transform_tools import captured, with_own_weights


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

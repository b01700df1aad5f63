"""Pipelines: text and YAML forms, what counts as a transform, settings, and what a run says of each step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_manager import PassManager, pass_result_wrapper, this_before_that_pass_constraint

import graphprobe
import pipeline_models as passes
from graphprobe.errors import PipelineError
from graphprobe.pipeline import STAGES, Applied, NotApplied, Pipeline, Settings, installed
from pipeline_models import KNOWN, Demands, Options, net

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
OPTIONS = st.builds(
    Options,
    count=st.integers(),
    ratio=NUMBERS,
    label=st.text(max_size=8),
    strict=st.booleans(),
    sizes=st.tuples() | st.tuples(st.integers(), st.integers()),
    pairs=st.tuples() | st.tuples(st.tuples(st.text(max_size=3), NUMBERS)),
    limit=st.none() | st.integers(),
)
TRANSFORMS = OPTIONS | st.builds(Demands, amount=st.integers())
SETTINGS = st.builds(
    Settings,
    enabled=st.booleans(),
    stage=st.sampled_from(["", *STAGES]),
    skip_on_error=st.booleans(),
    run_graph_cleanup=st.booleans(),
    run_shape_prop=st.booleans(),
    requires_clean_graph=st.booleans(),
    requires_shape_prop=st.booleans(),
    expect_mem_change=st.booleans(),
)
ENTRIES = st.lists(st.tuples(TRANSFORMS, SETTINGS), max_size=4)


def pipeline(entries: list[tuple[Options | Demands, Settings]]) -> Pipeline:
    return Pipeline(tuple(t for t, _ in entries), tuple(s for _, s in entries))


@pytest.fixture(scope="module")
def captured() -> GraphModule:
    model, args = net()
    return graphprobe.capture(model, args)


# --- forms -----------------------------------------------------------------------------------------------------------


@given(ENTRIES)
@settings(deadline=None)
def test_the_text_form_reads_back_equal(entries: list[tuple[Options | Demands, Settings]]) -> None:
    made = pipeline(entries)
    assert Pipeline.parse(str(made)) == made  # by pkg.mod:Name, since these are not installed


@given(st.lists(st.tuples(TRANSFORMS, SETTINGS), max_size=2, unique_by=lambda e: type(e[0])))
@settings(deadline=None)
def test_the_yaml_form_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, entries: list) -> None:  # type: ignore[type-arg]
    made = pipeline(entries).sorted()
    path = tmp_path_factory.getbasetemp() / "pipeline.yaml"
    path.write_text(made.to_yaml(), encoding="utf-8")
    read = Pipeline.from_yaml(path)
    assert read.transforms == made.transforms
    # YAML always says the stage; it means the same
    assert [s.stage or t.stage for t, s in zip(read.transforms, read.settings, strict=True)] == [
        s.stage or t.stage for t, s in zip(made.transforms, made.settings, strict=True)
    ]
    assert [vars(s) | {"stage": ""} for s in read.settings] == [vars(s) | {"stage": ""} for s in made.settings]


def test_installed_transforms_are_called_by_their_short_name() -> None:
    text = 'fuse_qkv{where="*.3.*", enabled=false},eager_attention_to_sdpa'
    assert str(Pipeline.parse(text)) == text
    assert {"fuse_qkv", "fuse_rmsnorm"} <= installed().keys()


def test_functions_are_called_by_their_module(captured: GraphModule) -> None:
    made = Pipeline.parse("pipeline_models:returned{keep_val=false}")
    assert str(made) == "pipeline_models:returned{keep_val=false}"
    (step,) = made.run(captured).steps
    assert step.transform == "returned{keep_val=false}"


WRONG = {
    "optons": "no transform 'optons'; did you mean 'options'",
    "options{cout=1}": "no option 'cout'; did you mean 'count'",
    "options{count=1.5}": "count is 1.5, but must be int",
    "options{count=true}": "count is True, but must be int",
    'options{sizes=["a"]}': "sizes is",
    'options{stage="shardin"}': "unknown stage 'shardin'; did you mean 'sharding'",
    "options{enabled=1}": "enabled is 1, but must be bool",
    "options{count=1, count=2}": "count is given twice",
    "options{count=": "expected a value",
    "options{count 1}": "expected '=' after the option",
    "options options": "expected ',' between transforms",
    "demands": "needs the option amount",
    "pipeline_models:Missing": "has no 'Missing'",
    "no_such_module:f": "no module 'no_such_module'",
    "pipeline_models:KNOWN": "no transform",
    "pipeline_models:in_place{keep=1}": "no option 'keep'",
}


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("pipeline_models:FxPass", "pipeline_models:FxPass"),
        ("pipeline_models:CallablePass", "pipeline_models:CallablePass"),
        ("pipeline_models:six", "pipeline_models:to_target{six=true}"),
        (
            "pipeline_models:manager",
            "pipeline_models:FxPass,pipeline_models:in_place,pipeline_models:to_target{six=true}",
        ),
    ],
)
def test_passes_of_every_kind_have_a_text_that_reads_back(spec: str, text: str, captured: GraphModule) -> None:
    read = Pipeline.parse(spec)
    assert str(read) == text == str(Pipeline.parse(text))
    assert [t.name for t in Pipeline.parse(text).transforms] == [t.name for t in read.transforms]
    assert isinstance(Pipeline(read.transforms[:1]).run(captured).steps[0].outcome, Applied)


def test_what_has_no_name_is_shown_by_its_own() -> None:
    assert str(Pipeline.of([lambda gm: None, ("mine", passes.CallablePass().__call__)])) == "lambda,mine"


@pytest.mark.parametrize("text", WRONG)
def test_mistakes_in_a_text_are_named(text: str) -> None:
    with pytest.raises(PipelineError) as error:
        Pipeline.parse(text, KNOWN)
    assert WRONG[text] in str(error.value)


def yaml(tmp_path: Path, *texts: str) -> Pipeline:
    paths = [tmp_path / f"{i}.yaml" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return Pipeline.from_yaml(*paths, known=KNOWN)


def test_yaml_is_sorted_by_stage_and_keeps_the_order_within_one(tmp_path: Path) -> None:
    made = yaml(
        tmp_path,
        "transforms: {options: {stage: compile}, pipeline_models:idle: {stage: sharding}, demands: {amount: 3}}",
    )
    assert [t.name for t in made.transforms] == ["idle", "demands", "options"]


def test_yaml_files_are_merged_deeply_from_left_to_right(tmp_path: Path) -> None:
    made = yaml(
        tmp_path,
        "transforms: {options: {stage: compile, count: 2, sizes: [1, 2]}}",
        "transforms: {options: {count: 3, enabled: false}, demands: {amount: 1}}",
    )
    assert made.transforms == (Demands(1), Options(count=3, sizes=(1, 2)))
    assert [s.enabled for s in made.settings] == [True, False]


@pytest.mark.parametrize(
    "silent", ["transforms: {options: }", "transforms: {}", "transforms:", "# transforms: {x: {}}"]
)
def test_a_file_that_says_nothing_takes_nothing_back(tmp_path: Path, silent: str) -> None:
    assert yaml(tmp_path, "transforms: {options: {count: 2}}", silent).transforms == (Options(count=2),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("transforms:", "no mapping 'transforms'"),
        ("transform: {options: {}}", "unknown key 'transform'; did you mean 'transforms'"),
        ("transforms: {options: {enable: false}}", "no option 'enable'; did you mean 'enabled'"),
        ("transforms: {options: 3}", "must be a mapping"),
        ("transforms: {options: {count: 1}, options: {count: 2}}", "is there twice"),
        ("transforms: [options]", "no mapping 'transforms'"),
        ("transforms: {opt", "not valid YAML"),
        ("- 1", "must hold a mapping"),
    ],
)
def test_mistakes_in_yaml_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(PipelineError) as error:
        yaml(tmp_path, text)
    assert said in str(error.value)


def test_keys_without_meaning_here_are_taken_and_noted(tmp_path: Path) -> None:
    made = yaml(tmp_path, "transforms: {options: {run_per_gm: false, debug_visualize_dir: null}}")
    assert made.transforms == (Options(),)
    assert [note.split(":")[0] for note in made.notes] == ["options", "options"]


# --- what is a transform ---------------------------------------------------------------------------------------------

CHANGES: dict[str, object] = {
    "in place": passes.in_place,
    "returned": passes.returned,
    "PassResult": passes.pass_result,
    "Applied": passes.counted,
    "retraced": passes.retraced,
    "replace_pattern": passes.pattern,
    "named": ("mine", passes.in_place),
    "object": passes.CallablePass(),
    "PassManager": PassManager([pass_result_wrapper(passes.in_place)]),
    "list": [passes.idle, passes.in_place],
}


@pytest.mark.parametrize("kind", CHANGES)
def test_every_kind_of_pass_is_run_and_seen_to_change_the_graph(kind: str, captured: GraphModule) -> None:
    made = Pipeline.of(CHANGES[kind])
    done = made.run(captured)
    assert done.steps[-1].status == "applied"
    assert passes.node_of(done.gm, torch.ops.aten.relu6.default)
    x = torch.randn(3, 8)
    torch.testing.assert_close(done.gm(x), captured(x).clamp_max(float("inf")))
    assert passes.node_of(captured, torch.ops.aten.relu.default), "the graph that was given has changed"


@pytest.mark.parametrize("one", [passes.idle, passes.unmodified])
def test_a_pass_that_changes_nothing_matches_nothing(one: Callable[..., object], captured: GraphModule) -> None:
    (step,) = Pipeline.of(one).run(captured).steps
    assert (step.status, type(step.outcome)) == ("matched nothing", NotApplied)


def test_a_function_matches_the_nodes_that_it_replaced(captured: GraphModule) -> None:
    (step,) = Pipeline.of(passes.in_place).run(captured).steps
    assert step.outcome == Applied(("relu",))
    assert [(event.old, event.new) for event in step.observation.replacements] == [("relu", "relu6_default")]


def test_a_pass_manager_is_taken_apart_in_the_order_of_its_constraints() -> None:
    manager = PassManager(
        [passes.in_place, passes.idle], [this_before_that_pass_constraint(passes.idle, passes.in_place)], steps=2
    )
    assert [t.name for t in Pipeline.of(manager).transforms] == ["idle", "in_place", "idle", "in_place"]


@pytest.mark.parametrize("value", [3, Options, [None]])
def test_what_is_no_transform_is_refused(value: object) -> None:
    with pytest.raises(PipelineError):
        Pipeline.of(value)


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (passes.raises, "raises failed: RuntimeError: out of luck"),
        (passes.invalid, "left an invalid graph"),
        (passes.wrong, "returned int"),
    ],
)
def test_a_transform_that_fails_is_named(one: Callable[..., object], said: str, captured: GraphModule) -> None:
    with pytest.raises(PipelineError) as error:
        Pipeline.of(one).run(captured)
    assert said in str(error.value)


@pytest.mark.parametrize("one", [passes.raises, passes.invalid])
def test_a_failed_step_is_undone_and_ends_the_run(one: Callable[..., object], captured: GraphModule) -> None:
    done = Pipeline.of([passes.idle, one, passes.in_place]).run(captured, raising=False)
    assert [step.status for step in done.steps] == ["matched nothing", "failed", "skipped"]
    assert [n.target for n in done.gm.graph.nodes] == [n.target for n in captured.graph.nodes]
    assert "Traceback" in done.steps[1].traceback


def test_skip_on_error_undoes_and_goes_on(captured: GraphModule) -> None:
    done = Pipeline.parse("pipeline_models:raises{skip_on_error=true},pipeline_models:in_place").run(captured)
    assert [step.status for step in done.steps] == ["skipped", "applied"]
    x = torch.randn(3, 8)
    torch.testing.assert_close(done.gm(x), captured(x))


def test_a_disabled_transform_is_not_run(captured: GraphModule) -> None:
    (step,) = Pipeline.parse("pipeline_models:raises{enabled=false}").run(captured).steps
    assert step.status == "disabled"


def test_shape_propagation_and_clean_up_follow_the_settings(captured: GraphModule) -> None:
    lost = "pipeline_models:returned{keep_val=false"
    plain = Pipeline.parse(lost + "}").run(captured)
    healed = Pipeline.parse(lost + ", run_shape_prop=true}").run(captured)
    before = Pipeline.parse(lost + "},pipeline_models:idle{requires_shape_prop=true}").run(captured)
    assert ["val" in passes.node_of(run.gm, torch.ops.aten.relu6.default).meta for run in (plain, healed, before)] == [
        False,
        True,
        True,
    ]


def leave_dead(gm: GraphModule) -> None:
    relu = passes.node_of(gm, torch.ops.aten.relu.default)
    with gm.graph.inserting_after(relu):
        gm.graph.call_function(torch.ops.aten.neg.default, (relu,))


@pytest.mark.parametrize("cleanup", [True, False])
def test_dead_nodes_go_where_clean_up_is_asked_for(cleanup: bool, captured: GraphModule) -> None:
    made = Pipeline(Pipeline.of(leave_dead).transforms, (Settings(run_graph_cleanup=cleanup),))
    left = made.run(captured).gm.graph.find_nodes(op="call_function", target=torch.ops.aten.neg.default)
    assert len(left) == (0 if cleanup else 1)


def test_a_transform_that_says_one_thing_and_does_another_is_noted(captured: GraphModule) -> None:
    def liar(gm: GraphModule) -> object:
        passes.swap_relu(gm)
        return NotApplied("nothing to see")

    def boaster(gm: GraphModule) -> object:
        return Applied(("relu",))

    steps = Pipeline.of([liar, boaster]).run(captured).steps
    assert "says that it matched nothing, but 2 nodes" in steps[0].notes[0]
    assert "says that it matched 1 places, but no node" in steps[1].notes[0]

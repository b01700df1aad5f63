"""graphprobe.run: whose defect is whose, statuses, comparisons, the record."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

import graphprobe
import pipeline_models as passes
import planted_metadata
from graphprobe import checking
from graphprobe.errors import InputError
from graphprobe.linting import RULES
from graphprobe.pipeline import Pipeline
from graphprobe.records import STATUSES, RunReport
from pipeline_models import net
from planted_metadata import DEFECTS, Planted
from transform_tools import captured, with_own_weights


def mend(gm: GraphModule) -> None:
    """Do nothing: what its settings ask for is done around it."""


# --- whose defect is whose -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", DEFECTS, ids=lambda p: p.plant.__name__)
def test_a_planted_defect_is_attributed_to_its_transform_even_if_a_later_one_mends_it(planted: Planted) -> None:
    gm = with_own_weights(captured("llama")[0])  # one of them writes into the weights
    report = graphprobe.run(
        gm, pipeline=["fuse_rmsnorm", planted.plant, "test_run:mend{requires_shape_prop=true}", "fuse_qkv"]
    )
    found = [lint for step in report.steps for lint in step.lints]
    assert {lint.rule for lint in found} == set(planted.rules)
    assert {lint.transform for lint in found} == {planted.plant.__name__}
    assert len(found) == planted.count
    assert report.first is not None and report.first.name == planted.plant.__name__
    assert report.exit_code != 0


def test_a_static_shape_baked_into_a_dynamic_graph_is_seen() -> None:
    def bake(gm: GraphModule) -> None:
        """14781: the replacement was traced with the sizes of its example."""
        view = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.view.default)
        view.args = (view.args[0], [3, 4, 2])
        view.meta["val"] = view.args[0].meta["val"].new_empty((3, 4, 2))

    class Heads(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(x.shape[0], 4, 2).neg()

    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    report = graphprobe.run(Heads(), (torch.randn(3, 8),), pipeline=bake, dynamic_shapes=shapes)
    assert report.first is not None
    assert {lint.transform for lint in report.first.lints} == {"bake"}


@pytest.mark.parametrize("planted", DEFECTS[:7], ids=lambda p: p.plant.__name__)
def test_looking_at_what_changed_finds_what_looking_at_all_finds(planted: Planted) -> None:
    gm = with_own_weights(captured("llama")[0])
    report = graphprobe.run(gm, pipeline=["fuse_rmsnorm{run_graph_cleanup=false}", planted.plant])
    rules = [name for name in checking.CHECKS if name in RULES]
    mine = {(lint.rule, lint.node) for step in report.steps for lint in step.lints}
    assert {(lint.rule, lint.node) for lint in graphprobe.lint(report.gm, rules)} == {m for m in mine if m[0] in rules}


def test_what_was_wrong_before_is_nobodys() -> None:
    model, args = net()
    gm = graphprobe.capture(model, args)
    passes.node_of(gm, torch.ops.aten.relu.default).meta.pop("val")
    report = graphprobe.run(gm, args, pipeline="pipeline_models:idle")
    assert report.ok and report.steps[0].lints == ()


def test_a_defect_that_was_mended_and_made_again_is_the_second_makers() -> None:
    model, args = net()
    lose = "pipeline_models:{}{{keep_val=false, run_shape_prop=true}}"

    def lose_again(gm: GraphModule) -> None:
        passes.node_of(gm, torch.ops.aten.relu6.default).meta.pop("val")

    report = graphprobe.run(model, args, pipeline=[lose.format("returned"), lose_again])
    assert [[lint.transform for lint in step.lints] for step in report.steps] == [
        ["returned{keep_val=false}"],
        ["lose_again"],
    ]


def test_honest_transforms_leave_no_defect() -> None:
    gm, args, kwargs = captured("llama")
    pipeline = "fuse_rmsnorm,fuse_qkv,eager_attention_to_sdpa"
    report = graphprobe.run(gm, args, kwargs, pipeline=pipeline, check=("all",))
    assert report.ok and report.exit_code == 0
    assert [step.report.verdict for step in report.steps if step.report] == ["identical", "identical", "rounding"]
    assert report.report is not None and report.report.verdict == "rounding"


# --- comparisons -----------------------------------------------------------------------------------------------------


def double(gm: GraphModule) -> None:
    """Replace relu(x) by 2 relu(x): a bug."""
    relu = passes.node_of(gm, torch.ops.aten.relu.default)
    with gm.graph.inserting_after(relu):
        new = gm.graph.call_function(torch.ops.aten.mul.Tensor, (relu, 2.0))
    new.meta["val"] = relu.meta["val"]
    relu.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def test_the_transform_that_changes_the_numbers_is_the_one_that_is_named() -> None:
    model, args = net()
    report = graphprobe.run(model, args, pipeline=[passes.in_place, passes.idle], check=["diff"])
    assert report.ok
    report = graphprobe.run(model, args, pipeline=[passes.idle, double, passes.idle], check=["diff", "total"])
    assert report.first is not None and report.first.name == "double"
    finding = report.first.report.first if report.first.report else None
    assert finding is not None and finding.transform == "double"
    assert report.report is not None and report.report.verdict == "semantic"
    assert report.exit_code != 0


def larger_weights(gm: GraphModule) -> None:
    """Put other weights in place, and leave every node as it is."""
    for module in (gm.up, gm.down):
        module.weight = torch.nn.Parameter(1.5 * module.weight.detach(), requires_grad=False)


def test_a_transform_that_changes_nothing_but_weights_is_compared_too(tmp_path: Path) -> None:
    model, args = net()
    report = graphprobe.run(model, args, pipeline=[larger_weights], check=["diff", "total"], dump_dir=tmp_path)
    (step,) = report.steps
    assert (step.status, step.matches) == ("applied", ("up_weight", "down_weight"))
    assert step.report is not None and step.report.verdict == "semantic"
    assert step.report.first is not None and step.report.first.transform == "larger_weights"
    assert report.report is not None and report.report.first is not None
    assert report.report.first.transform == "larger_weights"
    written = graphprobe.load(tmp_path / step.dump.replace(".txt", ".fx"))
    assert torch.equal(written(*args), report.gm(*args))


@pytest.mark.parametrize("check", ["weight-written", "missing-val"])
def test_weights_written_in_place_are_dumped_as_they_are_now(tmp_path: Path, check: str) -> None:
    def write(gm: GraphModule) -> None:
        with torch.no_grad():
            gm.up.weight.mul_(2)

    def write_unseen(gm: GraphModule) -> None:
        gm.up.weight.data.mul_(2)

    model, args = net()
    pipeline = [write, write_unseen] if check == "weight-written" else [write]
    report = graphprobe.run(model, args, pipeline=pipeline, check=[check], dump_dir=tmp_path)
    weights = [graphprobe.load(path).up.weight for path in sorted(tmp_path.glob("*.fx"))]
    for before, after in itertools.pairwise(weights):
        assert torch.equal(2 * before, after)
    assert report.ok is (check == "missing-val")


def test_rows_that_change_places_in_a_weight_are_seen() -> None:
    def swap(gm: GraphModule) -> None:
        gm.up.weight.data.copy_(gm.up.weight.data.flip(0).clone())

    model, args = net()
    report = graphprobe.run(model, args, pipeline=swap)
    assert [lint.rule for lint in report.steps[0].lints] == ["weight-written"]


def test_a_body_of_control_flow_is_changed_in_the_copy_alone() -> None:
    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos() + 1, (x,))

    def other(gm: GraphModule) -> None:
        node = passes.node_of(gm.true_graph_0, torch.ops.aten.sin.default)
        node.target = torch.ops.aten.tan.default
        gm.true_graph_0.recompile()

    x = torch.ones(3)
    gm = graphprobe.capture(Branch(), (x,))
    report = graphprobe.run(gm, (x,), pipeline=other, check=("all",))
    assert torch.equal(gm(x), x.sin()) and torch.equal(report.gm(x), x.tan())
    assert report.steps[0].matches == ("true_graph_0/sin",)
    assert report.steps[0].report is not None and report.steps[0].report.verdict == "semantic"


def test_without_inputs_those_of_the_file_or_drawn_ones_are_compared(tmp_path: Path) -> None:
    model, args = net()
    gm = graphprobe.capture(model, args)
    assert not graphprobe.run(gm, pipeline=double, check=["diff"]).ok
    graphprobe.save(gm, tmp_path / "net.fx", args=args)
    assert not graphprobe.run(tmp_path / "net.fx", pipeline=double, check=["diff"]).ok


def test_a_graph_that_cannot_be_compared_is_structural() -> None:
    def drop_output(gm: GraphModule) -> None:
        output = next(iter(gm.graph.find_nodes(op="output")))
        output.args = ((*output.args[0], output.args[0][0]),)

    model, args = net()
    report = graphprobe.run(model, args, pipeline=drop_output, check=["diff"])
    assert report.steps[0].report is not None and report.steps[0].report.verdict == "structural"
    assert "could not be compared" in report.steps[0].notes[-1]


def body_out_of_order(gm: GraphModule) -> None:
    sine = passes.node_of(gm.true_graph_0, torch.ops.aten.sin.default)
    sine.append(next(iter(gm.true_graph_0.graph.nodes)))


def output_erased(gm: GraphModule) -> None:
    gm.graph.erase_node(gm.graph.output_node())


@pytest.mark.parametrize("broken", [body_out_of_order, output_erased])
def test_a_graph_that_is_none_is_a_failure_of_its_transform_and_undone(broken: Callable[[GraphModule], None]) -> None:
    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos() + 1, (x,))

    x = torch.ones(3)
    report = graphprobe.run(Branch(), (x,), pipeline=[broken, passes.idle], check=("all",))
    assert [step.status for step in report.steps] == ["failed", "skipped"]
    assert "left an invalid graph" in report.steps[0].reason and report.exit_code == 2
    assert torch.equal(report.gm(x), x.sin())


def test_an_input_that_a_transform_adds_is_named() -> None:
    def cache(gm: GraphModule) -> None:
        with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
            node = gm.graph.placeholder("cache_0")
        node.meta["val"] = passes.node_of(gm, torch.ops.aten.relu.default).meta["val"]

    model, args = net()
    report = graphprobe.run(model, args, pipeline=cache, check=["diff"])
    assert report.steps[0].report is not None and report.steps[0].report.verdict == "structural"
    assert "cache_0" in report.steps[0].notes[-1]


# --- the record ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every_status() -> RunReport:
    model, args = net()
    pipeline = [
        passes.in_place,
        'options{label="x"}',
        "pipeline_models:raises{enabled=false}",
        "pipeline_models:unlucky",
        passes.idle,
    ]
    return graphprobe.run(model, args, pipeline=Pipeline.of(pipeline, passes.KNOWN), check=("all",))


def test_every_transform_ends_in_one_of_five_ways(every_status: RunReport) -> None:
    assert [step.status for step in every_status.steps] == [
        "applied",
        "matched nothing",
        "disabled",
        "failed",
        "skipped",
    ]
    assert set(STATUSES) == {step.status for step in every_status.steps}
    applied, nothing, _disabled, failed, skipped = every_status.steps
    assert applied.matches == ("relu",) and applied.created == ("relu6_default",)
    assert (nothing.reason, nothing.near_miss) == ("there is nothing to do", "up_weight")
    assert "out of luck" in failed.reason and "RuntimeError" in failed.error
    assert "unlucky failed before it" in skipped.reason
    assert every_status.exit_code == 2


def test_the_record_says_how_large_how_long_and_how_much(every_status: RunReport) -> None:
    first = every_status.steps[0]
    assert first.nodes_before == first.nodes_after == 9
    assert first.weights_before == first.weights_after == 4 * (8 * 16 + 16 + 16 * 8 + 8)
    assert first.memory_after > 0 and first.seconds > 0 and first.overhead > 0
    assert every_status.seconds >= sum(step.seconds + step.overhead for step in every_status.steps)


def test_the_record_survives_json_but_for_the_graph(every_status: RunReport) -> None:
    again = RunReport.from_json(every_status.to_json())
    assert again == every_status
    assert isinstance(every_status.gm, GraphModule) and again.gm is None
    with pytest.raises(ValueError, match="no graphprobe RunReport"):
        RunReport.from_json("{}")


def test_places_that_were_looked_at_and_left_alone_are_told() -> None:
    gm = captured("llama")[0]
    norm, add = graphprobe.run(gm, pipeline="fuse_rmsnorm,fuse_add_rmsnorm").steps
    assert (norm.missed, norm.reason) == (0, "")
    # what the first norm sees is the embedding, and no sum
    assert (len(add.matches), add.missed, add.near_miss) == (4, 1, "rms_norm_default")
    text = str(RunReport("p", (norm, add)))
    assert "applied, 4 matches; not in 1 more place: what is normalised is not the sum" in " ".join(text.split())


def test_many_defects_of_one_kind_do_not_drown_the_rest(tmp_path: Path) -> None:
    def lose(gm: GraphModule) -> None:
        for node in planted_metadata.calls(gm, torch.ops.aten.mul.Tensor):
            node.meta.pop("val")

    gm, args, kwargs = captured("llama")
    report = graphprobe.run(gm, args, kwargs, pipeline=lose, check=("lint", "total"), dump_dir=tmp_path)
    lost = [lint.node for lint in report.steps[0].lints]
    text, page = " ".join(str(report).split()), (tmp_path / "index.html").read_text()
    assert len(lost) > 20 and f"and {len(lost) - 5} more: {lost[5]}, {lost[6]}" in text
    assert all(f"<code>{node}</code>" in page for node in lost)
    assert page.count("<details>") == page.count("to mend it") == 1
    assert "from the captured graph to the last one: identical" in page


def test_the_text_names_the_first_trouble_first(every_status: RunReport) -> None:
    text = str(every_status)
    assert text.splitlines()[0] == "1 of 5 transforms applied; unlucky failed"
    assert max(map(len, text.splitlines())) <= 100
    for step in every_status.steps:
        assert step.transform in text and step.status.split()[0] in text


def test_the_result_runs_and_keeps_its_events(tmp_path: Path) -> None:
    model, args = net()
    report = graphprobe.run(model, args, pipeline=passes.in_place)
    torch.testing.assert_close(report.gm(*args), model(*args))
    graphprobe.save(report.gm, tmp_path / "after.fx")
    assert graphprobe.load(tmp_path / "after.fx").meta["graphprobe_events"] == report.events


def test_checks_are_a_table_and_unknown_ones_are_refused() -> None:
    model, args = net()
    lost = "pipeline_models:returned{keep_val=false}"
    assert graphprobe.run(model, args, pipeline=lost, check=["stale-val"]).ok
    assert not graphprobe.run(model, args, pipeline=lost, check=["missing-val"]).ok
    with pytest.raises(InputError, match="did you mean 'missing-val'"):
        graphprobe.run(model, args, pipeline=lost, check=["missing-vall"])
    assert set(checking.DEFAULT) | set(checking.COMPARISONS) == set(checking.chosen("all"))


def test_growing_weights_are_noted_unless_expected() -> None:
    def grow(gm: GraphModule) -> None:
        gm.register_buffer("big", torch.zeros(2_000_000))
        with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
            node = gm.graph.get_attr("big")
        node.meta["val"] = planted_metadata.calls(gm, torch.ops.aten.relu.default)[0].meta["val"].new_empty(2_000_000)

    model, args = net()
    report = graphprobe.run(model, args, pipeline=[grow])
    assert "the weights went from 0 to 8 MB" in report.steps[0].notes

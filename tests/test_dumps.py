"""Directories of dumps: what is written, what is never touched, what they tell, and what a configuration is held to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

import graphprobe
from graphprobe import cli
from graphprobe.dumps import comparing
from graphprobe.dumps.conformance import conformance
from graphprobe.dumps.reading import read
from graphprobe.errors import DumpError
from graphprobe.foreign import autodeploy
from graphprobe.foreign.autodeploy import Dump, Line, Section
from graphprobe.pipeline import Pipeline
from transform_tools import captured

PIPELINE = "fuse_rmsnorm,eager_attention_to_sdpa{enabled=false},fuse_qkv,fuse_qkv"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dumps of llama: two transforms that apply, one that is switched off, one that finds nothing."""
    folder = tmp_path_factory.mktemp("dumps")
    gm, args, kwargs = captured("llama")
    graphprobe.run(gm, args, kwargs, pipeline=PIPELINE, dump_dir=folder)
    return folder


# --- writing ---------------------------------------------------------------------------------------------------------


def test_every_transform_has_a_text_and_a_graph_named_by_number_stage_and_name(made: Path) -> None:
    assert sorted(p.name for p in made.iterdir() if p.suffix in (".txt", ".fx")) == sorted(
        f"{stem}.{kind}"
        for stem in (
            "001_export_export_to_gm",
            "002_pattern_matcher_fuse_rmsnorm",
            "003_pattern_matcher_eager_attention_to_sdpa",
            "004_post_load_fusion_fuse_qkv",
            "005_post_load_fusion_fuse_qkv",
        )
        for kind in ("txt", "fx")
    )


def test_text_and_graph_of_one_dump_are_the_same_graph(made: Path) -> None:
    for path in made.glob("*.txt"):
        gm = graphprobe.load(path.with_suffix(".fx"))
        section = autodeploy.read(path).sections[0]
        written = [line.name or "output" for line in section.lines]
        assert written == [n.name for n in gm.graph.nodes if n.op != "get_attr"]


def test_dumped_graphs_run_and_share_their_weights(made: Path) -> None:
    gm, _, kwargs = captured("llama")
    expected = gm(**kwargs).logits
    for path in sorted(made.glob("*.fx")):
        torch.testing.assert_close(graphprobe.load(path)(**kwargs).logits, expected, rtol=1e-4, atol=1e-5)
    weights = sum(p.numel() * p.element_size() for p in gm.parameters())
    assert sum(p.stat().st_size for p in made.glob("*.fx")) < weights
    # the captured weights once, and those that the fusion stacked
    assert len(list(made.glob("*.safetensors"))) == 2


def test_dumps_of_two_transforms_can_be_compared(made: Path) -> None:
    files = sorted(made.glob("*.fx"))
    _, args, kwargs = captured("llama")
    assert graphprobe.diff(files[0], files[-1], args, kwargs).verdict in ("identical", "rounding")


def test_the_page_links_what_lies_beside_it(made: Path) -> None:
    page = (made / "index.html").read_text()
    for path in made.iterdir():
        if path.suffix in (".txt", ".fx"):
            assert f'href="{path.name}"' in page
    for word in ("5 matches", "disabled", "matched nothing", "fuse_rmsnorm,eager_attention_to_sdpa{enabled=false}"):
        assert word.replace("5 matches", "applied, 5 matches") in page


def test_text_in_the_page_is_escaped(tmp_path: Path) -> None:
    from pipeline_models import net

    model, args = net()
    pipeline = Pipeline.parse('pipeline_models:Options{label="<script>alert(1)</script>"}')
    graphprobe.run(model, args, pipeline=pipeline, dump_dir=tmp_path / "d")
    assert "<script>" not in (tmp_path / "d" / "index.html").read_text()


def test_the_environment_variable_turns_dumping_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline_models import net

    monkeypatch.setenv("AD_DUMP_GRAPHS_DIR", str(tmp_path / "d"))
    model, args = net()
    report = graphprobe.run(model, args, pipeline="pipeline_models:in_place")
    assert report.dump_dir == str(tmp_path / "d")
    assert (tmp_path / "d" / "002_pattern_matcher_in_place.txt").is_file()


def test_a_transform_that_raises_leaves_no_dump_and_ends_them(tmp_path: Path) -> None:
    from pipeline_models import net

    model, args = net()
    pipeline = "pipeline_models:raises{skip_on_error=true},pipeline_models:raises,pipeline_models:idle"
    graphprobe.run(model, args, pipeline=pipeline, dump_dir=tmp_path)
    assert sorted(p.stem[:3] for p in tmp_path.glob("*.txt")) == ["001", "002"]


def test_without_weights_dumps_can_be_shown_and_not_run(tmp_path: Path) -> None:
    from pipeline_models import net

    model, args = net()
    graphprobe.run(model, args, pipeline="pipeline_models:in_place", dump_dir=tmp_path, dump_weights=False)
    assert not list(tmp_path.glob("*.safetensors"))
    assert graphprobe.view(graphprobe.load(tmp_path / "001_export_export_to_gm.fx")).nodes


# --- what is never touched -------------------------------------------------------------------------------------------


def dump_into(folder: Path) -> None:
    from pipeline_models import net

    model, args = net()
    graphprobe.run(model, args, pipeline="pipeline_models:in_place", dump_dir=folder)


def test_dumps_of_an_earlier_run_are_replaced(tmp_path: Path, made: Path) -> None:
    folder = tmp_path / "dumps"
    shutil.copytree(made, folder)
    dump_into(folder)
    assert sorted(p.name for p in folder.glob("*.txt")) == [
        "001_export_export_to_gm.txt",
        "002_pattern_matcher_in_place.txt",
    ]


@pytest.mark.parametrize("stranger", ["notes.txt", "001_export_export_to_gm.txt", "graphprobe-dumps.json"])
def test_a_directory_with_files_of_others_is_refused_and_left_alone(tmp_path: Path, stranger: str) -> None:
    (tmp_path / stranger).write_text('{"files": ["' + stranger + '"]}')
    (tmp_path / "sub").mkdir()
    with pytest.raises(DumpError, match="which graphprobe has not written"):
        dump_into(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([stranger, "sub"])


def test_one_stranger_among_our_dumps_saves_them_all(tmp_path: Path) -> None:
    dump_into(tmp_path)
    (tmp_path / "mine.md").write_text("keep")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(DumpError, match=r"mine\.md"):
        dump_into(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_list_that_names_files_elsewhere_touches_none(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    dump_into(folder)
    (tmp_path / "outside.txt").write_text("keep")
    manifest = folder / "graphprobe-dumps.json"
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "files": [*data["files"], "../outside.txt"]}))
    dump_into(folder)
    assert (tmp_path / "outside.txt").read_text() == "keep"


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_directory_tells_what_each_transform_changed(made: Path) -> None:
    dumps = read(made)
    norm, off, qkv, again = (comparing.change(a, b) for a, b in zip(dumps.entries, dumps.entries[1:], strict=False))
    assert norm.operators["aten.rms_norm.default"] == 5 and norm.operators["aten.rsqrt.default"] == -5
    assert norm.added == tuple(f"rms_norm_default{s}" for s in ("", "_1", "_2", "_3", "_4"))
    assert (qkv.operators["aten.linear.default"], qkv.operators["getitem"]) == (-4, 6)
    assert len(qkv.weights_added) == 2 and len(qkv.weights_removed) == 6
    assert not off and not again
    assert not any(change.lost or change.collectives for change in (norm, off, qkv, again))


def test_lost_metadata_is_found_in_foreign_dumps(tmp_path: Path) -> None:
    def lose(gm: GraphModule) -> None:
        node = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.silu.default)
        node.meta.pop("val")

    gm, args, kwargs = captured("llama")
    graphprobe.run(gm, args, kwargs, pipeline=["fuse_rmsnorm", lose], dump_dir=tmp_path)
    for path in [*tmp_path.glob("*.fx"), tmp_path / "run.json"]:  # as AutoDeploy would leave it
        path.unlink()
    dumps = read(tmp_path)
    assert dumps.run is None
    assert comparing.change(dumps.entries[1], dumps.entries[2]).lost == ("silu",)
    assert cli.main(["dumps", str(tmp_path)]) == 1


def test_collectives_and_changed_weights_are_told(tmp_path: Path) -> None:
    def write(number: int, lines: str) -> None:
        section = f"\n{'=' * 80}\n# GraphModule: (root)\n{'=' * 80}\n\n"
        head = f"# Transform: t{number}\n# Stage: sharding\n# GraphModules found: 1\n\n"
        (tmp_path / f"{number:03d}_sharding_t{number}.txt").write_text(head + section + lines)

    x = "2x8 : torch.float32"
    linear = "%y = aten.linear.default(%x : 2x8 : torch.float32, %w : 8x{} : torch.float32) : 2x8 : torch.float32"
    reduce = f"%z = auto_deploy.torch_dist_all_reduce.default(%y : {x}, NCCL) : {x}"
    write(1, f"%x : {x}\n{linear.format(8)}\noutput %y\n")
    write(2, f"%x : {x}\n{linear.format(4)}\n{reduce}\noutput %z\n")
    dumps = read(tmp_path)
    change = comparing.change(*dumps.entries)
    assert change.collectives == {"auto_deploy.torch_dist_all_reduce.default": 1}
    assert (change.weights_changed, change.rewritten) == (("w",), ("y",))
    assert list(comparing.lines(*dumps.entries))[-1] == "+ output %z"


def test_a_dump_is_found_by_number_transform_or_file(made: Path) -> None:
    dumps = read(made)
    assert dumps.find("2") is dumps.find("fuse_rmsnorm") is dumps.find("002_pattern_matcher_fuse_rmsnorm.txt")
    assert dumps.find("fuse_qkv").number == 5
    with pytest.raises(DumpError, match="did you mean 'fuse_qkv'"):
        dumps.find("fuse_qk")


@pytest.mark.parametrize("kind", ["missing", "empty", "damaged"])
def test_what_is_no_dump_directory_is_named(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "d"
    if kind != "missing":
        folder.mkdir()
    if kind == "damaged":
        (folder / "001_export_x.txt").write_text("nonsense")
    assert cli.main(["dumps", str(folder)]) == 2
    assert str(folder) in capsys.readouterr().err


# --- is the configuration in the graphs? -----------------------------------------------------------------------------


def answers(folder: Path, text: str) -> dict[str, str]:
    from graphprobe.pipeline import config

    path = folder.parent / "config.yaml"
    path.write_text(text)
    return {a.transform: a.status for a in conformance(read(folder), config.load([path]))}


def test_what_was_asked_for_and_is_there_is_applied(made: Path) -> None:
    text = (
        "transforms: {fuse_rmsnorm: {}, eager_attention_to_sdpa: {enabled: false}, other: {}, gone: {enabled: false}}"
    )
    assert answers(made, text) == {
        "fuse_rmsnorm": "applied",
        "eager_attention_to_sdpa": "disabled",
        "other": "not found",
        "gone": "disabled",
    }


def test_what_contradicts_the_graphs_is_in_conflict(made: Path) -> None:
    text = "transforms: {fuse_rmsnorm: {enabled: false}, eager_attention_to_sdpa: {}, fuse_qkv: {stage: sharding}}"
    assert answers(made, text) == {
        "fuse_rmsnorm": "in conflict",
        "eager_attention_to_sdpa": "in conflict",
        "fuse_qkv": "in conflict",
    }


def test_a_transform_that_left_the_graph_alone_is_not_found_in_foreign_dumps(made: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(made, foreign, ignore=shutil.ignore_patterns("*.fx", "*.json", "*.html", "*.safetensors"))
    assert answers(foreign, "transforms: {eager_attention_to_sdpa: {}, fuse_rmsnorm: {}}") == {
        "eager_attention_to_sdpa": "not found",
        "fuse_rmsnorm": "applied",
    }


def test_what_the_text_does_not_show_is_told_by_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def other_scale(gm: GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.target is torch.ops.aten.scaled_dot_product_attention.default:
                node.update_kwarg("scale", 0.5)

    gm, args, kwargs = captured("llama")
    folder = tmp_path / "d"
    graphprobe.run(gm, args, kwargs, pipeline=["eager_attention_to_sdpa", other_scale], dump_dir=folder)
    assert answers(folder, "transforms: {other_scale: {}}") == {"other_scale": "applied"}
    assert cli.main(["dumps", str(folder)]) == 0
    assert "does not show" in capsys.readouterr().out


def test_a_fusion_of_autodeploy_is_known_by_autodeploys_operators(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    x = "2x8 : torch.bfloat16"
    for number, (name, target) in enumerate(
        [
            ("match_rmsnorm_pattern", "auto_deploy.torch_rmsnorm.default"),
            ("fuse_rmsnorm", "auto_deploy.flashinfer_rms_norm.default"),
        ],
        1,
    ):
        line = Line("norm", target, (f"%x : {x}", "%w : 8 : torch.bfloat16", "1e-05"), "2x8", "torch.bfloat16")
        root = Section("(root)", (Line("x", "", (), "2x8", "torch.bfloat16"), line, Line("", "output", ("%norm",))))
        text = autodeploy.text(Dump(name, "post_load_fusion", (root,)))
        (folder / f"{number:03d}_post_load_fusion_{name}.txt").write_text(text)
    assert answers(folder, "transforms: {fuse_rmsnorm: {stage: post_load_fusion}}") == {"fuse_rmsnorm": "applied"}


# --- command line ----------------------------------------------------------------------------------------------------


def test_the_command_line_tells_it_all(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dumps", str(made)]) == 0
    text = capsys.readouterr().out
    assert "+5 aten.rms_norm.default" in text and "disabled" in text and max(map(len, text.splitlines())) <= 100
    assert cli.main(["dumps", str(made), "1", "fuse_rmsnorm"]) == 1
    assert "+ %rms_norm_default = aten.rms_norm.default(" in capsys.readouterr().out
    assert cli.main(["dumps", str(made), "2", "2"]) == 0
    (tmp_path / "p.yaml").write_text("transforms: {fuse_rmsnorm: {enabled: false}}")
    capsys.readouterr()
    assert cli.main(["dumps", str(made), "--config", str(tmp_path / "p.yaml"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["status"] == "in conflict"


def test_run_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["run", "pipeline_models:net", "--transform", "pipeline_models:in_place"]
    assert cli.main([*common, "--check", "diff", "-o", "after.fx", "--dump", "d"]) == 0
    assert "1 of 1 transform applied" in capsys.readouterr().out
    assert graphprobe.load("after.fx").graph.find_nodes(op="call_function", target=torch.ops.aten.relu6.default)
    Path("p.yaml").write_text("transforms: {in_place: {enabled: false}}")
    assert cli.main([*common, "--pipeline", "p.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][0]["status"] == "disabled"
    assert cli.main(["run", "after.fx", "--pipeline", "pipeline_models:returned{keep_val=false}"]) == 2  # no relu left
    capsys.readouterr()
    assert cli.main(["run", "pipeline_models:net", "--pipeline", "pipeline_models:returned{keep_val=false}"]) == 1
    assert "missing-val: relu6_default" in capsys.readouterr().out
    assert cli.main(["run", "pipeline_models:net", "--pipeline", "fuse_qk"]) == 2
    assert "did you mean 'fuse_qkv'" in capsys.readouterr().err


def test_installed_transforms_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--list"]) == 0
    assert "fuse_qkv (post_load_fusion)" in capsys.readouterr().out

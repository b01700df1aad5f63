"""``graphprobe show``: every kind of graph it takes, everything that is laid over it, and what it says on trouble."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import graphprobe
from graphprobe import cli
from graphprobe.records import Report
from render_reading import Picture
from render_samples import wrong_scale
from render_traces import chrome

MODELS = """
import torch

class Block(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.scale = scale

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)) * self.scale)

class Net(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(0.5), Block(scale)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

def make(scale=0.5):
    torch.manual_seed(0)
    return Net(scale).eval(), (torch.randn(3, 8),)

def wrong():
    return make(0.5005)

def clamp(gm):
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.relu.default:
            node.target, node.args = torch.ops.aten.clamp_min.default, (node.args[0], 0)
    gm.recompile()
"""
DUMPS = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("show")
    (path / "show_models.py").write_text(MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(str(path))
        for factory, name in (("make", "before"), ("wrong", "after")):
            assert cli.main(["capture", f"show_models:{factory}", "-o", f"{name}.fx"]) == 0
        assert cli.main(["diff", "before.fx", "after.fx", "-o", "report.json"]) == 1
        assert cli.main(["tap", "after.fx", "-o", "taps.json"]) == 0
    return path


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def shown(*arguments: str) -> Picture:
    assert cli.main(["show", *arguments, "-o", "picture.dot"]) == 0
    return Picture(Path("picture.dot").read_text(encoding="utf-8"))


@pytest.mark.parametrize("layer", ["1", "layers.1", "layers.*"])
@pytest.mark.parametrize("what", ["after.fx", "show_models:wrong"])
def test_a_layer_comes_from_a_file_and_from_a_model(what: str, layer: str) -> None:
    picture = shown(what, "--layer", layer)
    linears = [box for box in picture.boxes if picture.text(box).startswith("Linear")]
    assert len(linears) == (4 if "*" in layer else 2)


def test_dumps_are_drawn_and_the_last_of_a_directory_is_chosen(tmp_path: Path) -> None:
    text = (DUMPS / "001_export_export_to_gm.txt").read_text()
    for number in (2, 10):
        (tmp_path / f"{number:03d}_export_x.txt").write_text(text.replace("model_layers_0", f"model_layers_{number}"))
    assert "model.layers.10" in shown(str(tmp_path), "--layer", "10").title
    assert "model.layers.2" in shown(str(tmp_path / "002_export_x.txt"), "--layer", "2").title


def test_of_a_dump_with_several_graphs_the_largest_or_the_one_asked_for_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (DUMPS / "001_export_export_to_gm.txt").read_text()
    rule = "=" * 80
    shell = f"{rule}\n# GraphModule: outer\n{rule}\n\n%x : 4 : torch.float32\noutput %x\n\n"
    (tmp_path / "003_compile_x.txt").write_text(text.replace(rule, shell + rule, 1))
    assert "embedding" in shown(str(tmp_path / "003_compile_x.txt")).boxes
    assert "embedding" not in shown(str(tmp_path / "003_compile_x.txt"), "--section", "outer").boxes
    assert cli.main(["show", str(tmp_path / "003_compile_x.txt"), "--section", "outr"]) == 2
    assert "did you mean 'outer'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--diff", "--report"])
def test_errors_are_laid_over_either_side(flag: str) -> None:
    after = shown("after.fx", "--layer", "1", flag, "report.json")
    before = shown("before.fx", "--layer", "1", flag, "report.json", "--side", "before")
    for picture in (after, before):
        (box,) = (box for box in picture.boxes if picture.text(box).startswith("mul 0.5"))
        assert "semantic: made" in picture.text(box)


@pytest.mark.parametrize("taps", [["--taps"], ["--taps", "taps.json"]])
def test_statistics_come_from_a_file_or_from_a_run(taps: list[str]) -> None:
    picture = shown("after.fx", "--layer", "1", *taps)
    assert all("rms" in picture.text(box) for box in picture.boxes if picture.text(box).startswith(("mul", "Linear")))


def test_kernels_come_from_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    graph = graphprobe.view(graphprobe.load("after.fx"))
    Path("trace.json").write_text(json.dumps(chrome(graph, ranges=True)))
    picture = shown("after.fx", "--layer", "1", "--trace", "trace.json")
    boxes = [box for box in picture.boxes if not box.startswith(("in ", "out "))]
    assert len(boxes) == 5 and all("Kernel2 3.0" in picture.text(box) for box in boxes)
    assert "kernels 15.0" in capsys.readouterr().out


def test_all_overlays_go_over_one_another() -> None:
    picture = shown("after.fx", "--layer", "1", "--diff", "report.json", "--taps")
    (box,) = (box for box in picture.boxes if picture.text(box).startswith("mul 0.5"))
    assert "semantic" in picture.text(box) and "rms" in picture.text(box)


def test_what_was_drawn_is_said_in_words_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "after.fx", "--layer", "1", "-o", "a.dot"]) == 0
    assert capsys.readouterr().out == "a.dot: layers.1, 5 operations and 0 views\n"
    assert cli.main(["show", "after.fx", "--layer", "1", "-o", "a.dot", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["what"] == "layers.1" and facts["operations"] == 5 and facts["without_val"] == []


def test_a_saved_report_is_drawn_without_torch(tmp_path: Path) -> None:
    """The import of torch is blocked, as on a machine that has none."""
    (tmp_path / "report.json").write_text(wrong_scale().to_json())
    program = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from graphprobe import cli, Report
for wanted in (["-o", "c.dot"], ["-o", "c.svg"], ["-o", "r.html"], ["--layer", "1", "-o", "l.dot"]):
    assert cli.main(["show", "report.json", *wanted]) == 0, wanted
report = Report.from_json(open("report.json").read())
report.render("again.dot"); report.to_html("again.html"); assert "semantic" in str(report)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "semantic: layer 1" in done.stdout
    report = Report.from_json((tmp_path / "report.json").read_text())
    report.render(str(tmp_path / "here.dot"))
    assert (tmp_path / "c.dot").read_text() == (tmp_path / "here.dot").read_text()
    assert "scale_1" in Picture((tmp_path / "l.dot").read_text()).boxes


def test_a_run_of_transforms_becomes_a_page_with_a_verdict_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "before.fx", "--transform", "show_models:clamp", "--check", "diff"]
    assert cli.main([*arguments, "--json", "--html", str(tmp_path / "run.html")]) == 0
    (tmp_path / "run.json").write_text(capsys.readouterr().out)
    assert cli.main(["show", str(tmp_path / "run.json"), "-o", str(tmp_path / "again.html")]) == 0
    pages = [(tmp_path / name).read_text() for name in ("run.html", "again.html")]
    for page in pages:
        assert re.search(r'<th scope="row">clamp</th>\s*<td><span class="chip v-identical">', page)
    assert cli.main([*arguments[:-2], "--html", str(tmp_path / "x.html")]) == 2
    assert "--check diff" in capsys.readouterr().err


def test_a_report_holds_the_command_that_gives_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["diff", "before.fx", "after.fx", "--accept", "layers.1*:semantic:1e-9", "--min-coverage", "0.5"]
    assert cli.main([*arguments, "-o", "again.json", "--json"]) == 1
    report = Report.from_json(capsys.readouterr().out)
    assert shlex.split(report.command) == ["graphprobe", *arguments[:3], *arguments[5:], *arguments[3:5]]
    assert cli.main([*shlex.split(report.command)[1:], "--json"]) == 1
    again = Report.from_json(capsys.readouterr().out)
    assert (again.verdict, again.command, again.min_coverage) == (report.verdict, report.command, 0.5)


TROUBLE = {
    "no such layer": (["after.fx", "--layer", "7"], "layers.0, layers.1"),
    "near name": (["after.fx", "--layer", "layers.1.upp"], "did you mean 'layers.1.up'"),
    "another graph": (["before.fx", "--diff", "other.json"], "of another graph"),
    "no report": (["before.fx", "--diff", "taps.json"], "no report"),
    "no taps": (["before.fx", "--taps", "report.json"], "no table of graphprobe tap"),
    "no trace": (["before.fx", "--trace", "taps.json"], "0 kernel launches"),
    "no notes": (["before.fx", "--merge", "nothing.dot"], "cannot read nothing.dot"),
    "no dumps": (["."], "nor a directory of dumps"),
    "nothing to run": ([str(DUMPS), "--taps"], "only an .fx file or a model can be run"),
    "no file": (["nothing.fx"], "nothing.fx"),
    "no picture": (["report.json", "-o", "x.bmp"], ".png"),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_trouble_is_one_sentence(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.json").write_text(wrong_scale().to_json())
    arguments, words = TROUBLE[case]
    output = [] if "-o" in arguments else ["-o", "x.dot"]
    assert cli.main(["show", *arguments, *output]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    assert words in printed.err.replace("\n", " ")
    assert not Path("x.dot").exists()

"""The command line as a user meets it: exit status, one clear sentence on trouble, JSON, whole files, quick help."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import graphprobe
from graphprobe import cli
from graphprobe.cli import output
from graphprobe.errors import RenderError
from graphprobe.records import Report

MODELS = """
import torch

class Net(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.up = torch.nn.Linear(8, 16)
        self.down = torch.nn.Linear(16, 4)
        self.scale = scale

    def forward(self, x):
        return self.down(torch.relu(self.up(x)) * self.scale)

def make(scale=0.5):
    torch.manual_seed(0)
    return Net(scale).eval(), (torch.randn(3, 8),)

def wrong():
    return make(0.5005)

def without_inputs():
    return make()[0]

def text():
    return "no model"

class Branches(torch.nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

def branches():
    return Branches(), (torch.ones(3),)

def integers():
    return make()[0], (torch.ones(3, 8, dtype=torch.int64),)

def exported():
    return torch.export.export(*make())

def bare():
    return torch.fx.symbolic_trace(make()[0])

def nothing():
    return torch.nn.Identity(), (torch.ones(3),)

def breaks():
    raise ZeroDivisionError("in the user's own code")

net = make()[0]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a module of models and three captured graphs."""
    path = tmp_path_factory.mktemp("cli")
    (path / "cli_models.py").write_text(MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(str(path))
        for factory, name in (("make", "before"), ("make", "same"), ("wrong", "after")):
            assert cli.main(["capture", f"cli_models:{factory}", "-o", f"{name}.fx"]) == 0
    return path


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def process(*arguments: str, **options: object) -> subprocess.Popen[str]:
    """Start graphprobe as a process of its own."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "graphprobe", *arguments]
    # a shell starts its background jobs deaf to Ctrl-C, and what they start inherits that
    known = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)  # type: ignore[call-overload]
    finally:
        signal.signal(signal.SIGINT, known)


# --- exit status and what is printed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["diff", "before.fx", "same.fx"], 0),
        (["diff", "before.fx", "after.fx"], 1),
        (["diff", "before.fx", "after.fx", "--allow", "semantic"], 0),
        (["diff", "before.fx", "after.fx", "--accept", "*:semantic:0.1"], 0),
        (["diff", "before.fx", "after.fx", "--accept", "*:semantic:1e-9"], 1),
        (["lint", "before.fx"], 0),
        (["tap", "before.fx"], 0),
        (["tap", "before.fx", "--checksum"], 0),
    ],
)
def test_exit_status(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == status
    printed = capsys.readouterr()
    assert printed.out.strip()
    assert printed.err == ""


TROUBLE = {
    "no such file": (["diff", "nothing.fx", "after.fx"], "nothing.fx"),
    "no .fx file": (["lint", "cli_models.py"], "cli_models.py is not an .fx file"),
    "no module": (["capture", "cli_model:make", "-o", "x.fx"], "no module 'cli_model'"),
    "no factory": (["capture", "cli_models:mak", "-o", "x.fx"], "did you mean 'make'"),
    "no model": (["capture", "cli_models:text", "-o", "x.fx"], "gave a str"),
    "no spec": (["capture", "cli_models", "-o", "x.fx"], "pkg.mod:factory"),
    "no config": (["capture", ".", "-o", "x.fx"], "config.json"),
    "no inputs": (["capture", "cli_models:without_inputs", "-o", "x.fx"], "arguments do not fit"),
    "no folder": (["capture", "cli_models:make", "-o", "no/x.fx"], "no directory no"),
    "prompt for a factory": (["capture", "cli_models:make", "-o", "x.fx", "--prompt", "a"], "--prompt"),
    "bad JSON": (["capture", "cli_models:net", "-o", "x.fx", "--args", "[1"], "not valid JSON"),
    "ragged list": (["capture", "cli_models:net", "-o", "x.fx", "--args", "[[[1], [1, 2]]]"], "cannot become a tensor"),
    "object for list": (["capture", "cli_models:net", "-o", "x.fx", "--args", "{}"], "must be a JSON list"),
    "bad dynamic": (["capture", "cli_models:make", "-o", "x.fx", "--dynamic", "x"], "NAME:DIM"),
    "other dynamic": (["capture", "cli_models:make", "-o", "x.fx", "--dynamic", "xs:0"], "did you mean 'x'"),
    "dynamic beyond": (
        ["capture", "cli_models:make", "-o", "x.fx", "--dynamic", "x:2"],
        "x:2: the input has the shape",
    ),
    "a branch": (["capture", "cli_models:branches", "-o", "x.fx"], "where: Branches.forward (cli_models.py:"),
    "no module to import": (["diff", "before.fx", "after.fx", "--import", "cli_model"], "no module 'cli_model'"),
    "no file to write": (["diff", "before.fx", "after.fx", "-o", "no/x.json"], "no directory no"),
    "no picture to write": (["diff", "before.fx", "after.fx", "--png", "x.gif"], "name it .png, .svg, .dot"),
    "a directory to write": (["diff", "before.fx", "after.fx", "--html", "."], "it is a directory"),
    "no rule": (["diff", "before.fx", "same.fx", "--accept", "semantic"], "NODE:KIND:BOUND"),
    "no kind": (["diff", "before.fx", "same.fx", "--accept", "a:wrong:1"], "'wrong' is no kind"),
    "no bound": (["diff", "before.fx", "same.fx", "--accept", "a:semantic:nan"], "the bound nan"),
    "no values": (["diff", "before.fx", "after.fx", "--device", "meta"], "has shapes, but no values"),
    "no such input": (["diff", "before.fx", "after.fx", "--inputs", "more.json"], "neither graph takes the input 'y'"),
    "misspelt": (["tap", "before.fx", "--inputs", "more.json"], "not 'y'"),
    "twice": (["tap", "before.fx", "--inputs", "twice.json"], "was given twice"),
    "no inputs in it": (["diff", "before.fx", "after.fx", "--inputs", "none.json"], "none.json holds no inputs"),
    "wrong dtype": (["tap", "before.fx", "--inputs", "integers.json"], "has dtype int64, but the graph was captured"),
    "wrong structure": (["tap", "before.fx", "--inputs", "nested.json"], "cannot be run"),
    "wrong shape": (["diff", "before.fx", "after.fx", "--inputs", "wide.json"], "has shape (3, 9)"),
    "unreadable inputs": (["diff", "before.fx", "after.fx", "--inputs", "cli_models.py"], "not from .py"),
    "broken inputs": (["diff", "before.fx", "after.fx", "--inputs", "broken.pt"], "broken.pt cannot be read"),
    "no device": (["diff", "before.fx", "after.fx", "--device", "nowhere"], "the device 'nowhere'"),
    "no layer": (["show", "before.fx", "--layer", "7", "-o", "x.dot"], "no layer 7"),
    "no picture": (["show", "before.fx", "-o", "x.bmp"], ".png"),
    "no report": (["show", "before.fx", "--report", "wide.json"], "no report"),
    "kept nothing": (["tap", "before.fx", "--keep", "zzz*", "-o", "x.safetensors"], "zzz"),
    "kept for nothing": (["tap", "before.fx", "--keep", "up"], "-o FILE.safetensors"),
    "kept as what": (["tap", "before.fx", "-o", "x.txt"], ".safetensors"),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_trouble_is_one_sentence_and_status_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wide.json").write_text(json.dumps([[[0.0] * 9] * 3]))
    rows = [[1] * 8] * 3
    Path("more.json").write_text(json.dumps({"x": [[0.0] * 8] * 3, "y": [1.0]}))
    Path("twice.json").write_text(json.dumps({"args": [[[0.0] * 8] * 3], "kwargs": {"x": [[0.0] * 8] * 3}}))
    Path("none.json").write_text("[]")
    Path("integers.json").write_text(json.dumps([rows]))
    Path("nested.json").write_text(json.dumps([{"y": rows}]))
    Path("broken.pt").write_bytes(b"not a pickle")
    arguments, words = TROUBLE[case]
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("graphprobe: ")
    assert words in printed.err
    assert "Traceback" not in printed.err
    assert not list(Path().glob("x.*")) and not list(Path().glob(".*partial*"))


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("integers", "must have the same dtype"),
        ("bare", "no inputs were given"),
        ("nothing", "nothing was compared"),
    ],
)
def test_graphs_that_cannot_be_compared(factory: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["capture", f"cli_models:{factory}", "-o", "odd.fx"]) == 0
    assert cli.main(["diff", "odd.fx", "odd.fx"]) == 2
    printed = capsys.readouterr()
    assert words in printed.out + printed.err and "Traceback" not in printed.err


def test_an_exported_program_brings_its_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["capture", "cli_models:exported", "-o", "exported.fx"]) == 0
    assert cli.main(["diff", "exported.fx", "before.fx"]) == 0
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(4, 3),))
    assert graphprobe.diff(program, program).verdict == "identical"


def test_what_is_printed_survives_a_picture_that_cannot_be_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RenderError("no layout engine")

    monkeypatch.setattr(Report, "render", fail)
    assert cli.main(["diff", "before.fx", "after.fx", "--png", "x.png"]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("semantic") and "no layout engine" in printed.err


def test_a_dimension_that_the_model_fixes_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["capture", "cli_models:make", "-o", "fixed.fx", "--dynamic", "x:0", "--dynamic", "x:1"]) == 0
    assert capsys.readouterr().err.count("\n") == 1


def test_pairs_need_neither_weights_nor_inputs_where_nothing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["capture", "cli_models:make", "-o", "light.fx", "--weights", "none"]
    assert cli.main(arguments) == 0
    assert cli.main(["capture", "cli_models:bare", "-o", "bare.fx"]) == 0
    assert cli.main(["align", "light.fx", "light.fx", "--no-run"]) == 0
    assert cli.main(["align", "bare.fx", "bare.fx", "--no-run"]) == 0
    assert cli.main(["align", "light.fx", "light.fx"]) == 2
    assert cli.main(["diff", "light.fx", "light.fx"]) == 2
    assert capsys.readouterr().err.count("without the values of 4 weights") == 2


def test_an_error_in_the_users_code_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["capture", "cli_models:breaks", "-o", "x.fx"]) == 2
    assert "ZeroDivisionError: in the user's own code" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["diff", "before.fx"], ["diff", "a", "b", "--min-coverage", "2"]]
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: graphprobe" in capsys.readouterr().err


# --- what commands write ---------------------------------------------------------------------------------------------


def test_diff_writes_report_and_picture(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(
        ["diff", "before.fx", "after.fx", "-o", "report.json", "--png", "culprit.dot", "--html", "r.html"]
    )
    assert status == 1
    report = Report.from_json(Path("report.json").read_text())
    assert (report.verdict, report.exit_code) == ("semantic", 1)
    assert report.first is not None
    assert report.first.op == "aten.mul.Tensor"
    assert Path("culprit.dot").read_text().startswith("digraph")
    assert "<html" in Path("r.html").read_text()
    assert cli.main(["show", "after.fx", "--report", "report.json", "-o", "errors.dot"]) == 0
    assert "semantic" in Path("errors.dot").read_text()


@pytest.mark.parametrize("command", ["diff", "tap", "lint", "show", "capture"])
def test_json_is_json_and_nothing_else(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {
        "diff": ["diff", "before.fx", "after.fx"],
        "tap": ["tap", "before.fx"],
        "lint": ["lint", "before.fx"],
        "show": ["show", "before.fx", "-o", "graph.dot"],
        "capture": ["capture", "cli_models:make", "-o", "again.fx"],
    }[command]
    assert cli.main([*arguments, "--json"]) in (0, 1)
    json.loads(capsys.readouterr().out)


def test_tap_counts_and_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    assert cli.main(["tap", "before.fx", "-o", "taps.json"]) == 0
    assert [row["op"] for row in json.loads(Path("taps.json").read_text())] == [
        "aten.linear.default",
        "aten.relu.default",
        "aten.mul.Tensor",
        "aten.linear.default",
    ]
    assert cli.main(["tap", "before.fx", "--keep", "down", "-o", "kept.safetensors"]) == 0
    gm = graphprobe.load("before.fx")
    args, kwargs = graphprobe.fxfile.load_inputs("before.fx") or ((), {})
    assert torch.equal(load_file("kept.safetensors")["down"], gm(*args, **kwargs))


def save_json(x: torch.Tensor) -> str:
    Path("in.json").write_text(json.dumps({"x": x.tolist()}))
    return "in.json"


def save_positional(x: torch.Tensor) -> str:
    Path("pos.json").write_text(json.dumps({"args": [x.tolist()], "kwargs": {}}))
    return "pos.json"


def save_safetensors(x: torch.Tensor) -> str:
    from safetensors.torch import save_file

    save_file({"x": x}, "in.safetensors")
    return "in.safetensors"


def save_pt(x: torch.Tensor) -> str:
    torch.save((x,), "in.pt")
    return "in.pt"


def save_npz(x: torch.Tensor) -> str:
    import numpy

    numpy.savez("in.npz", x=x.numpy())
    return "in.npz"


def save_fx(x: torch.Tensor) -> str:
    graphprobe.save(graphprobe.load("before.fx"), "in.fx", args=(x,))
    return "in.fx"


@pytest.mark.parametrize("save", [save_json, save_positional, save_safetensors, save_pt, save_npz, save_fx])
def test_inputs_are_read_from_every_form(save: object, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    assert callable(save)
    assert cli.main(["tap", "before.fx", "--inputs", save(x), "--keep", "up", "-o", "up.safetensors"]) == 0
    from safetensors.torch import load_file

    gm = graphprobe.load("before.fx")
    torch.testing.assert_close(
        load_file("up.safetensors")["up"], torch.nn.functional.linear(x, gm.up.weight, gm.up.bias)
    )


def test_capture_takes_inputs_dtype_and_dynamic_dimensions(capsys: pytest.CaptureFixture[str]) -> None:
    given = json.dumps([[[0.5] * 8] * 2])
    arguments = ["capture", "cli_models:net", "--args", given, "--dtype", "float64", "--dynamic", "x:0", "-o", "net.fx"]
    assert cli.main(arguments) == 0
    gm = graphprobe.load("net.fx")
    assert gm(torch.rand(5, 8, dtype=torch.float64)).shape == (5, 4)


# --- terminals, signals, speed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_has_an_example_and_no_long_lines(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"  graphprobe {command or 'capture'} " in text
    assert max(map(len, text.splitlines())) <= 120


def test_help_is_quick_because_torch_is_not_imported() -> None:
    code = "import sys, graphprobe.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert time.monotonic() - start < 5  # 0.06 s where nothing else runs


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.1, 0.6, 0.61, 5.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    terminal = Terminal()
    with output.Progress(terminal) as progress:
        progress(1, 4, "too early")
        progress(2, 4, "layer 1")
        progress(3, 4, "too soon after")
        progress(4, 4, "layer 2")
    frames = terminal.getvalue().split("\r\x1b[K")
    assert [frame.split() for frame in frames if frame] == [
        ["[############------------]", "50", "%", "1", "s", "layer", "1"],
        ["[########################]", "100", "%", "5", "s", "layer", "2"],
    ]
    assert frames[-1] == ""


def test_progress_is_silent_elsewhere() -> None:
    stream = io.StringIO()
    with output.Progress(stream) as progress:
        time.sleep(0.5)
        progress(1, 2, "work")
    assert stream.getvalue() == ""


def test_a_file_appears_whole_or_not_at_all() -> None:
    Path("kept.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), output.whole_file("kept.json") as partial:
        Path(partial).write_text("half")
        raise KeyboardInterrupt
    assert Path("kept.json").read_text() == "old"
    assert not list(Path().glob(".kept*"))


def test_ctrl_c_ends_with_130_and_no_file(folder: Path) -> None:
    source = """
        import time
        def slow():
            print("started", flush=True)
            time.sleep(60)
    """
    (folder / "slow_models.py").write_text(textwrap.dedent(source))
    running = process("capture", "slow_models:slow", "-o", "slow.fx", cwd=folder)
    assert running.stdout is not None
    assert running.stdout.readline() == "started\n"
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in errors
    assert not (folder / "slow.fx").exists()


def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "graphprobe", "tap", "before.fx"], stdout=write, stderr=subprocess.PIPE, cwd=folder
    )
    os.close(write)
    assert done.returncode == cli.BROKEN_PIPE
    assert done.stderr == b""

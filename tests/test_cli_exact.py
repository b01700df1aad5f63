"""`graphprobe exact`: every operator of a graph with the rule that judges it, told by running it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import graphprobe
from graphprobe import api, cli
from graphprobe.lanes import exact
from graphprobe.records import EXACT_RULES
from models import tiny

OPERATORS = """
import torch

def only_float32(x):
    if x.dtype != torch.float32:
        raise RuntimeError("only float32 here")
    return torch.nn.functional.silu(x)

fused = torch.library.custom_op("exact_tests::fused", only_float32, mutates_args=(), schema="(Tensor x) -> Tensor")
fused.register_fake(torch.empty_like)

class Net(torch.nn.Module):
    def forward(self, x):
        y = torch.ops.exact_tests.fused(x + 1)
        return torch.nn.functional.rms_norm(y, (4,)), x.view(torch.int32), torch.cond(
            x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,)
        )

def make():
    return Net(), (torch.linspace(-1, 1, 8).reshape(2, 4),)
"""
REFERENCES = """
import graphprobe
import torch
import exact_operators

@graphprobe.exact_rule(torch.ops.exact_tests.fused)
def fused(x):
    return torch.nn.functional.silu(x)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "exact_operators.py").write_text(OPERATORS)
    (tmp_path / "exact_references.py").write_text(REFERENCES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(exact, "RULES", dict(exact.RULES))
    assert cli.main(["capture", "exact_operators:make", "-o", "net.fx"]) == 0
    return tmp_path


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict]]:
    capsys.readouterr()
    status = cli.main(["exact", *arguments, "--json"])
    return status, {row["operator"]: row for row in json.loads(capsys.readouterr().out)}


def test_each_operator_is_listed_with_what_evaluates_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = listed(capsys, "net.fx")
    assert status == 1
    assert {name: row["rule"] for name, row in rows.items()} == {
        "exact_tests.fused.default": "statistics",
        "aten.view.dtype": "native",
        "higher_order.cond": "bodies",
        "aten.rms_norm.default": "adapted",
        "aten.add.Tensor": "adapted",
        "aten.sum.default": "float64",
        "aten.gt.Scalar": "float64",
        "operator.getitem": "float64",  # of what cond returns
    }
    assert rows["exact_tests.fused.default"]["note"] == "RuntimeError: only float32 here"


def test_an_imported_reference_judges_the_operator(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = listed(capsys, "net.fx", "--import", "exact_references")
    row = rows["exact_tests.fused.default"]
    assert (row["rule"], row["note"]) == ("reference", "exact_references.fused")
    assert status == 1  # the bits that are looked at have no float64 form


def test_without_weights_the_tables_alone_are_asked(tmp_path: Path) -> None:
    model, args, kwargs = tiny("mlp")
    gm = graphprobe.capture(model, args, kwargs)
    graphprobe.save(gm, tmp_path / "bare.fx", args=args, kwargs=kwargs, weights=None)
    rows = api.operators(tmp_path / "bare.fx")
    assert {row.note for row in rows if row.rule == "float64"} == {"not tried"}


@pytest.mark.parametrize("name", ["mlp", "conv", "branch", "custom"])
def test_every_operator_of_the_corpus_is_counted_and_known(name: str) -> None:
    model, args, kwargs = tiny(name, torch.bfloat16)
    gm = graphprobe.capture(model, args, kwargs)
    rows = api.operators(gm, args, kwargs)
    assert {row.rule for row in rows} <= {"view", "float64", "adapted", "reference", "decomposition", "bodies"}
    assert all(row.rule in EXACT_RULES for row in rows)
    assert len({row.operator for row in rows}) == len(rows)
    assert sum(row.count for row in rows) > 0


def test_the_list_of_rules_needs_no_graph(capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = listed(capsys, "--list")
    assert status == 0
    assert rows["aten.scaled_dot_product_attention"]["rule"] == "reference"
    assert rows["aten.view.dtype"]["rule"] == "native"
    assert rows["higher_order.scan"]["rule"] == "bodies"
    assert cli.main(["exact", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{rule} " in text for rule in ("native", "reference", "bodies", "adapted"))


@pytest.mark.parametrize(
    ("arguments", "words"), [([], "--list"), (["--list", "--inputs", "x.json"], "give a FILE.fx"), (["no.fx"], "no.fx")]
)
def test_trouble_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["exact", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and words in printed.err and "Traceback" not in printed.err

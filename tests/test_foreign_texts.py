"""Graphs as other tools print them: what is read is the graph that was printed, and it aligns, whatever its names."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

from graphprobe import api
from graphprobe.cli import main
from graphprobe.errors import DumpError
from graphprobe.foreign import graphs
from models import tiny

PREFIX = "V1130 06:27:31.753000 13954 torch/_inductor/compile_fx.py:1382] [0/0] [__post_grad_graphs] "


def readable(program: ExportedProgram) -> str:
    return str(program.module().print_readable(print_output=False))


def logged(program: ExportedProgram) -> str:
    """As ``TORCH_LOGS=post_grad_graphs`` writes it."""
    lines = ["TRACED GRAPH", " ===== AFTER POST GRAD =====", *readable(program).splitlines(), "", ""]
    return "".join(f"{PREFIX}{line}\n" for line in lines)


def coloured(program: ExportedProgram) -> str:
    return str(program.module().print_readable(print_output=False, colored=True, include_stride=True))


def table(program: ExportedProgram) -> str:
    pytest.importorskip("tabulate")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        program.module().graph.print_tabular()
    return out.getvalue()


TYPED: dict[str, Callable[[ExportedProgram], str]] = {
    "readable": readable, "logged": logged, "coloured": coloured, "program": str,
}  # fmt: skip
UNTYPED: dict[str, Callable[[ExportedProgram], str]] = {
    "listed": lambda program: str(program.module().graph),
    "code": lambda program: str(program.module().code),
    "table": table,
}
NAMES = ("conv", pytest.param("gpt2", marks=pytest.mark.slow))


@pytest.fixture(scope="module", params=NAMES)
def exported(request: Any) -> ExportedProgram:
    model, args, kwargs = tiny(request.param)
    return torch.export.export(model, args, kwargs, strict=False)


def written(folder: Path, content: str, name: str = "graph.txt") -> Path:
    path = folder / name
    path.write_text(content)
    return path


@pytest.mark.parametrize("form", [*TYPED, *UNTYPED])
def test_what_is_read_is_the_graph_that_was_printed(form: str, exported: ExportedProgram, tmp_path: Path) -> None:
    path = written(tmp_path, (TYPED | UNTYPED)[form](exported))
    printed = exported.graph if form == "program" else exported.module().graph
    read = {n.name: n for n in graphs.load(path).graph.nodes}
    for node in printed.nodes:
        if node.op not in ("call_function", "output"):
            continue
        mine = read[node.name]
        assert str(mine.target) == str(node.target), node
        assert [n.name for n in mine.all_input_nodes] == [n.name for n in node.all_input_nodes], node
        value = node.meta.get("val")
        if form in TYPED and isinstance(value, torch.Tensor):
            assert (mine.meta["val"].shape, mine.meta["val"].dtype) == (value.shape, value.dtype), node
    found = api.alignment(path, path)
    assert not found.unmatched and not found.left_before and found.claims and not found.ran
    assert all(claim.before == claim.after for claim in found.claims)


def test_nodes_of_other_names_are_aligned_by_what_they_do(exported: ExportedProgram, tmp_path: Path) -> None:
    before = written(tmp_path, readable(exported))
    renamed, names = exported.module(), {}
    for i, node in enumerate(renamed.graph.nodes):
        if node.op in ("call_function", "get_attr"):
            old = node.name
            node._rename(f"n{i}")
            names[old] = node.name
    renamed.recompile()
    after = written(tmp_path, str(renamed.print_readable(print_output=False)), "renamed.py")
    found = api.alignment(before, after)
    assert not found.unmatched and all(names[c.before] == c.after for c in found.claims)
    assert main(["align", str(before), str(after)]) == 0


def test_weights_that_are_inputs_are_told_from_inputs(exported: ExportedProgram, tmp_path: Path) -> None:
    """A compiler's graphs take weights as inputs, under names that say nothing."""
    before = written(tmp_path, readable(exported))
    lifted = exported.module()
    for i, node in enumerate([n for n in lifted.graph.nodes if n.op == "get_attr"]):
        with lifted.graph.inserting_before(next(iter(lifted.graph.nodes))):
            new = lifted.graph.placeholder(f"arg{i}_1")
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        lifted.graph.erase_node(node)
    lifted.graph.set_codegen(torch.fx.graph.CodeGen())
    lifted.recompile()
    after = written(tmp_path, str(lifted.print_readable(print_output=False)), "lifted.log")
    found = api.alignment(before, after)
    assert not found.unmatched and not found.left_before


def _dropped(lines: list[str]) -> list[str]:
    at = next(i for i, line in enumerate(lines) if " = torch.ops.aten.conv2d" in line)
    return lines[:at] + lines[at + 1 :]


def _broken(lines: list[str]) -> list[str]:
    at = next(i for i, line in enumerate(lines) if " = torch.ops.aten.conv2d" in line)
    return [*lines[:at], lines[at][:-60], *lines[at + 1 :]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_dropped, r"line \d+: conv2d is used before the text says what it is. Give the graph whole"),
        (_broken, r"line \d+: .* is not Python as torch.fx prints it"),
        (lambda lines: lines[:12], "returns nothing: its end is missing"),
        (lambda lines: [*lines, *lines], r"holds 2 graphs: one at line 2, one at line \d+. Save the lines of one"),
        (lambda lines: ["hello", "world"], r"holds no graph. What can be read is .*print_readable"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_line_and_how_to_mend_it(change: Any, said: str, tmp_path: Path) -> None:
    model, args, kwargs = tiny("conv")
    lines = readable(torch.export.export(model, args, kwargs)).splitlines()
    with pytest.raises(DumpError, match=said):
        graphs.load(written(tmp_path, "\n".join(change(lines))))


def test_nothing_in_a_text_is_executed(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    body = [f"y = open({str(flag)!r}, 'w')", "z = torch.ops.aten.relu.default(y)", "return z"]
    text = "\n".join(["def forward(self, x):", *(f"    {line}" for line in body)])
    assert len(graphs.load(written(tmp_path, text)).graph.nodes) == 4
    assert not flag.exists()

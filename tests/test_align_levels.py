"""The same program at other levels: on its way through Inductor, prepared for calibration, as the text of a dump."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import graphprobe
from graphprobe import api, nodes
from graphprobe.bisection.inductor import recording
from graphprobe.bisection.inductor.segments import segments_of
from graphprobe.cli import main
from graphprobe.errors import DumpError
from graphprobe.foreign import graphs
from models import tiny


class ObserverBase(torch.nn.Module):
    """Named as the observers of torch.ao and torchao: looks at a value with branches that export cannot follow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.min() == x.max():
            raise ValueError("constant")
        return x


class Observed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.observer = torch.nn.Linear(16, 16), torch.nn.Linear(16, 4), ObserverBase()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_observers_hand_on_what_they_are_given() -> None:
    model, x = Observed(), torch.randn(3, 16)
    prepared = torch.export.export(model, (x,)).module()
    prepared.add_module("observer", ObserverBase())
    for node in [n for n in prepared.graph.nodes if n.op == "call_function"]:
        with prepared.graph.inserting_after(node):
            seen = prepared.graph.call_module("observer", (node,))
        node.replace_all_uses_with(seen, lambda user, seen=seen: user is not seen)
    prepared.recompile()
    report = graphprobe.diff(model, prepared, (x,))
    assert report.verdict == "identical" and report.coverage.resolution == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dynamo", "joint", "post_grad"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "conv"])
def test_graphs_of_inductor_align_with_the_export(name: str, stage: str) -> None:
    model, args, kwargs = tiny(name)
    piece = recording.record(model, args, kwargs).pieces[0]
    found = [
        (gm, segment.inputs)
        for segment in segments_of(piece)
        for gm, label in zip(segment.graphs, segment.labels, strict=True)
        if label.startswith(stage)
    ]
    if not found:
        pytest.skip(f"no pass of {stage} has changed the graph")
    given = dict(kwargs) or {"x": args[0]}
    report = graphprobe.diff(model, _with_weights(found[-1][0], found[-1][1], given), args, kwargs)
    assert report.verdict in ("identical", "rounding"), report.findings
    assert report.coverage.resolution >= 0.95


def _with_weights(gm: GraphModule, inputs: tuple[Any, ...], given: dict[str, Any]) -> GraphModule:
    """Put the weights, which the compiler takes as inputs, back into the graph; name the others as before does."""
    for i, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)):
        name = next((k for k, v in given.items() if v is not None and v is not False and _same(v, value)), None)
        if name is not None:
            node.target = node.name = name
            continue
        gm.register_buffer(f"weight_{i}", value.detach())
        with gm.graph.inserting_before(node):
            read = gm.graph.get_attr(f"weight_{i}")
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
        gm.graph.erase_node(node)
    gm.graph.set_codegen(torch.fx.graph.CodeGen())
    gm.recompile()
    return gm


def _same(one: Any, other: Any) -> bool:
    return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("dumps")
    model, args, kwargs = tiny("llama")
    graphprobe.run(model, args, kwargs, pipeline="fuse_rmsnorm,fuse_gate_up", dump_dir=folder)
    return sorted(folder.glob("*.txt"))


def test_a_text_dump_claims_itself_operation_by_operation(dumps: list[Path]) -> None:
    found = api.alignment(dumps[0], dumps[0])
    assert not found.unmatched and not found.left_before and not found.ran
    assert all(claim.before == claim.after for claim in found.claims) and len(found.claims) > 80


def test_text_dumps_claim_what_their_graphs_claim(dumps: list[Path]) -> None:
    by_text = {(c.before, c.after) for c in api.alignment(dumps[0], dumps[1]).claims}
    by_graph = api.alignment(dumps[0].with_suffix(".fx"), dumps[1].with_suffix(".fx"), run=False).claims
    wanted = {(c.before, c.after) for c in by_graph}
    assert by_text <= wanted and len(by_text) >= 0.95 * len(wanted)


def test_align_takes_text_dumps(dumps: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", str(dumps[0]), str(dumps[1])]) == 0
    said = capsys.readouterr().out
    assert "rms_norm_default" in said and "nothing was run" in said
    assert main(["align", str(dumps[0]), str(dumps[0].with_suffix(".fx"))]) == 0
    assert main(["align", str(dumps[0]), str(dumps[2]), "--explain", "silu"]) == 0
    assert main(["diff", str(dumps[0]), str(dumps[1])]) == 2


def test_a_symbolic_size_is_the_same_in_every_place(tmp_path: Path) -> None:
    path = tmp_path / "dump.txt"
    path.write_text(
        "# Transform: t\n# Stage: s\n# GraphModules found: 1\n\n# GraphModule: (root)\n"
        "%x : s4x8 : torch.float32\n%y = aten.mul.Tensor(%x : s4x8 : torch.float32, -0.5) : s4x8 : torch.float32\n"
        "%z = my.fused.default(%y : s4x8 : torch.float32, [1, y], None) : 2*s4x8 : torch.float32\noutput %z\n"
    )
    made = {n.name: n for n in graphs.load(path).graph.nodes}
    size = made["x"].meta["val"].shape[0]
    assert made["y"].args == (made["x"], -0.5) and made["z"].args == (made["y"], [1, made["y"]], None)
    assert made["y"].meta["val"].shape == (size, 8) and made["z"].meta["val"].shape == (2 * size, 8)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], lines[6], lines[5], *lines[7:]]))
    with pytest.raises(DumpError, match="%x"):
        graphs.load(path)


def test_below_a_difference_symbolic_sizes_are_counted_too() -> None:
    class Stack(torch.nn.Module):
        def __init__(self, act: Any) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
            self.act = act

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for place, layer in enumerate(self.layers):
                x = layer(x)
                x = self.act(x) if place == 1 else torch.relu(x)
            return x

    x = torch.randn(6, 16)
    dims = ({0: torch.export.Dim.AUTO},)
    before = graphprobe.capture(Stack(torch.relu), (x,), dynamic_shapes=dims)
    assert {type(nodes.elements(n)) for n in before.graph.nodes if n.op == "call_function"} == {str}  # never a SymInt
    after = graphprobe.capture(Stack(lambda x: 3 * torch.sigmoid(x)), (x,), dynamic_shapes=dims)
    report = graphprobe.diff(before, after, (torch.randn(9, 16),))
    assert [f.kind for f in report.findings] == ["semantic"] and "relu_1" in str(report.findings[0].outputs)
    assert report.coverage.resolution == 1.0

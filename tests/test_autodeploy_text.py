"""AutoDeploy's text form: what is written is what AutoDeploy would write, and what is read is written back equal."""

from __future__ import annotations

import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphprobe
from graphprobe.dumps.writing import dump_of
from graphprobe.errors import DumpError
from graphprobe.foreign import autodeploy
from graphprobe.foreign.autodeploy import Dump, Line, Section
from models import tiny
from transform_tools import captured

#: A dump in AutoDeploy's layout, of a toy model.
EXAMPLE = (Path(__file__).parent / "data" / "001_export_export_to_gm.txt").read_text()


def named(target: str) -> Any:
    """Return a callable that prints as an operator of AutoDeploy does."""

    class Target:
        __name__ = target

        def __str__(self) -> str:
            return target

        def __call__(self, *args: object) -> None: ...

    return Target()


def value(shape: str, dtype: str) -> Any:
    """Return what the writer asks of a fake tensor, or something that is none, or None for a missing val."""
    if dtype in ("N/A", "unknown"):
        return None
    if shape.startswith("("):
        return [value(s, d) for s, d in zip(shape[1:-1].split(", "), dtype[1:-1].split(", "), strict=True)]
    if shape == "?":
        return type(dtype, (), {})()
    dims = () if shape == "scalar" else tuple(shape.split("x"))
    return SimpleNamespace(shape=dims, dtype=getattr(torch, dtype.removeprefix("torch.")))


def rebuilt(section: Section) -> torch.fx.GraphModule:
    """Build the FX graph that a section describes, from its lines alone."""
    graph = torch.fx.Graph()
    nodes: dict[str, torch.fx.Node] = {}

    def set_val(node: torch.fx.Node, shape: str, dtype: str) -> None:
        found = value(shape, dtype)
        if found is not None:
            node.meta["val"] = found

    for node_view, line in zip(*paired(section), strict=True):
        if line is None:  # a weight
            node = graph.get_attr(node_view.name)
            shape = "x".join(map(str, node_view.shape)) if node_view.shape is not None else "?"
            set_val(node, shape, f"torch.{node_view.dtype}" if node_view.dtype else "unknown")
        elif line.target == "output":
            graph.output(tuple(nodes[arg[1:]] for arg in line.args))
            continue
        elif not line.target:
            node = graph.placeholder(line.name)
            set_val(node, line.shape, line.dtype)
        else:
            args = tuple(argument(arg, nodes) for arg in line.args)
            node = graph.call_function(named(line.target), args)
            set_val(node, line.shape, line.dtype)
        node.name = node_view.name
        nodes[node.name] = node
    owner = torch.nn.Module()
    for node in graph.find_nodes(op="get_attr"):
        owner.register_buffer(str(node.target), torch.empty(0))
    return torch.fx.GraphModule(owner, graph)


def paired(section: Section) -> tuple[list[Any], list[Line | None]]:
    """Return the nodes of a section's view, weights included, each with its line or None."""
    lines = {line.name or "output": line for line in section.lines}
    nodes = list(autodeploy.view(section).nodes)
    return nodes, [lines.get(node.name) for node in nodes]


def argument(text: str, nodes: dict[str, torch.fx.Node]) -> Any:
    if text.startswith("%"):
        return nodes[text[1:].partition(" : ")[0]]
    if text.startswith("["):
        return [nodes.get(part) or plain(part) for part in text[1:-1].split(", ") if part]
    return plain(text)


def plain(text: str) -> Any:
    words = {"None": None, "True": True, "False": False}
    if text in words:
        return words[text]
    if text.startswith("torch."):
        return getattr(torch, text.removeprefix("torch."))
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_the_lines_of_the_example_are_written_byte_for_byte() -> None:
    gm = rebuilt(autodeploy.parse(EXAMPLE).sections[0])
    assert autodeploy.text(dump_of(gm, "export_to_gm", "export")) == EXAMPLE


def test_the_example_is_read_and_written_back_equal() -> None:
    dump = autodeploy.parse(EXAMPLE)
    assert (dump.transform, dump.stage, [s.name for s in dump.sections]) == ("export_to_gm", "export", ["(root)"])
    assert autodeploy.text(dump) == EXAMPLE


def test_the_example_is_a_graph_with_weights_shapes_and_edges() -> None:
    graph = autodeploy.view(autodeploy.parse(EXAMPLE).sections[0])
    node = graph.by_name["torch_fake_quant_fp8_linear"]
    assert node.target == "auto_deploy.torch_fake_quant_fp8_linear.default"
    assert node.shape == ("s44", "s70", 64) and node.dtype == "bfloat16"
    # scales are named inside lists only
    assert node.inputs == (
        "mul",
        "model_layers_0_mlp_down_proj_weight",
        "model_layers_0_mlp_down_proj_input_scale",
        "model_layers_0_mlp_down_proj_weight_scale",
    )
    assert graph.by_name["model_embed_tokens_weight"].op == "get_attr"
    assert graph.by_name["view"].inputs == ("torch_linear_simple", "sym_size_int_4", "sym_size_int_3")
    assert graph.by_name["getitem"].target == "getitem"
    assert graph.by_name["output"].inputs == ("to",)
    assert all(node.has_val for node in graph.nodes)


LOST = """\
%fused = <function fused_add_rms_norm at 0x7fc0a7ff3e20>(%sum : 2x4 : torch.bfloat16, 1e-05) : ? : N/A
%item = <built-in function getitem>(%fused : ? : unknown, 0) : ? : NoneType
%check = aten._assert_tensor_metadata.default(%sum : 2x4 : torch.bfloat16) : ? : NoneType
%part = <function _fused_gemm.<locals>.split_output at 0x7f21>(%sum : 2x4 : torch.bfloat16) : 2x2 : torch.bfloat16
%odd = dist.reduce(%sum : 2x4 : torch.bfloat16, bsnd, Max(1, u0), [item, None]) : Max(1, u0)x4 : torch.float8_e4m3fn
%n = aten.sym_size.int(%sum : 2x4 : torch.bfloat16, 0) : ? : SymInt
output %odd, None
"""


def test_lost_metadata_closures_and_odd_sizes_are_understood() -> None:
    head = autodeploy.text(Dump("fuse_add_rms_norm", "post_load_fusion", (Section("monolithic.model", ()),)))
    dump = autodeploy.parse(head + LOST)
    assert autodeploy.text(dump) == head + LOST
    graph = autodeploy.view(dump.sections[0])
    assert [node.name for node in graph.nodes if not node.has_val] == ["fused", "item"]
    assert graph.by_name["part"].target == "_fused_gemm.<locals>.split_output"
    assert graph.by_name["odd"].shape == ("Max(1, u0)", 4)
    assert graph.by_name["odd"].inputs == ("sum", "item")
    assert graph.by_name["n"].shape is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "conv", "mlp", "branch", "tied"])
def test_what_we_write_is_read_back_equal(name: str) -> None:
    gm = captured(name)[0]
    text = autodeploy.text(dump_of(gm, "export_to_gm", "export"))
    dump = autodeploy.parse(text)
    assert autodeploy.text(dump) == text
    mine = graphprobe.view(gm)
    theirs = {node.name: node for node in autodeploy.view(dump.sections[0]).nodes}
    for node in mine.nodes:
        if node.op in ("call_function", "placeholder", "output"):
            read = theirs[node.name]
            assert (read.shape, read.dtype, read.op) == (node.shape, node.dtype, node.op)
            assert set(read.inputs) <= set(node.inputs)  # keyword arguments are not written


def test_symbolic_sizes_and_nested_graphs_are_read_back() -> None:
    model, args, kwargs = tiny("llama")
    shapes = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, "use_cache": None}
    shapes["attention_mask"] = shapes["input_ids"]
    gm = graphprobe.capture(model, args, kwargs, dynamic_shapes=shapes)
    text = autodeploy.text(dump_of(gm, "export_to_gm", "export"))
    dump = autodeploy.parse(text)
    assert autodeploy.text(dump) == text
    assert [n.shape for n in autodeploy.view(dump.sections[0]).nodes] == [
        n.shape for n in _written_order(graphprobe.view(gm), dump)
    ]
    assert len(dump_of(captured("branch")[0], "x", "export").sections) == 3


def _written_order(graph: Any, dump: Dump) -> list[Any]:
    return [graph.by_name[node.name] for node in autodeploy.view(dump.sections[0]).nodes]


def test_an_enum_argument_looks_like_a_node_as_it_does_in_autodeploy() -> None:
    strategy = enum.Enum("Strategy", "NCCL")
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(named("dist.all_reduce"), (x, SimpleNamespace(name="NCCL"), torch.float32)))
    assert hasattr(strategy.NCCL, "name")
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    (section,) = dump_of(gm, "t", "sharding").sections
    assert section.lines[1].text.endswith("(%x : ? : unknown, %NCCL : ? : unknown, torch.float32) : ? : N/A")


WORDS = st.text("abcdefgh_0123456789", min_size=1, max_size=6).map(lambda s: "n" + s)
SHAPES = st.lists(st.sampled_from(["1", "64", "s44", "s44*s70", "Max(1, u0)", "(s0//2)"]), max_size=3).map(
    lambda dims: "x".join(dims) or "scalar"
)
DTYPES = st.sampled_from(["torch.bfloat16", "torch.int64", "torch.float8_e4m3fn"])
ARGS = st.builds("%{} : {} : {}".format, WORDS, SHAPES, DTYPES) | st.sampled_from(
    ["None", "1e-05", "NCCL", "torch.float32", "slice(None, 2, None)", "[]", "[a, 4, [b, c]]", "(1, 2)"]
)
TARGETS = st.sampled_from(
    ["aten.add.Tensor", "dist.x", "<built-in function getitem>", "<function f.<locals>.g at 0x7f>", "linear.0"]
)
LINES = st.builds(Line, WORDS, TARGETS, st.lists(ARGS, max_size=4).map(tuple), SHAPES, DTYPES) | st.builds(
    Line, WORDS, st.just(""), st.just(()), SHAPES, DTYPES
)


@given(st.lists(st.lists(LINES, max_size=5), min_size=1, max_size=3))
@settings(deadline=None)
def test_any_dump_is_read_back_equal(sections: list[list[Line]]) -> None:
    dump = Dump("t", "compile", tuple(Section(f"m.{i}", tuple(lines)) for i, lines in enumerate(sections)))
    assert autodeploy.parse(autodeploy.text(dump)) == dump


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("hello", "line 1: expected '# Transform: NAME'"),
        ("# Transform: x\n", "is no graph dump"),
        (EXAMPLE + "%x = aten.add(1\n", "line 40: the arguments of %x do not end"),
        (EXAMPLE + "nonsense\n", "expected '%name = target"),
        (EXAMPLE + "%x 3\n", "expected '%name : shape : dtype'"),
    ],
)
def test_damaged_dumps_are_named_with_their_line(content: str, said: str) -> None:
    with pytest.raises(DumpError) as error:
        autodeploy.parse(content, "a.txt")
    assert said in str(error.value) and "a.txt" in str(error.value)

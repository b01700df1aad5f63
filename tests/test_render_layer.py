"""Pictures of layers and graphs: read back by pydot and asked about structure, never about strings of DOT."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprobe import capture, render, view
from graphprobe.errors import RenderError
from graphprobe.records import GraphView, NodeView, Tap
from graphprobe.render.roles import COLOURS, NO_VALUE
from models import tiny
from render_reading import Picture
from render_samples import calls, llama, wrong_scale

MODELS = ("llama", "gpt2", "bert", "mixtral", "conv", "branch")


@pytest.fixture(scope="module")
def graphs() -> dict[str, GraphView]:
    found = {}
    for name in MODELS:
        model, args, kwargs = tiny(name)
        found[name] = view(capture(model, args, kwargs), name)
    return found


def _within(graph: GraphView, module: str) -> list[NodeView]:
    """Return what a picture of the module must show: no checks, and no views of weights, which labels tell."""
    used = {i for node in graph.nodes for i in node.inputs}
    weights = {node.name for node in graph.nodes if node.op == "get_attr"}
    found = []
    for node in graph.nodes:
        check = node.name not in used and "_assert_tensor_metadata" in node.target
        of_weights = node.is_view and weights.issuperset(node.inputs) and bool(node.inputs)
        if (
            (not module or (node.module_path + ".").startswith(module + "."))
            and node.op == "call_function"
            and not (check or of_weights)
        ):
            found.append(node)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_shows_each_of_its_operations_once_and_each_edge(graphs: dict[str, GraphView], name: str) -> None:
    graph = graphs[name]
    for module in render.layers_of(graph):
        picture = Picture(render.dot_layer(graph, module))
        drawn = {n: box for box in picture.boxes if not box.startswith(("in ", "out ")) for n in picture.members(box)}
        wanted = _within(graph, module)
        assert set(drawn) == {node.name for node in wanted}
        edges = {
            (drawn[i], drawn[n.name]) for n in wanted for i in n.inputs if i in drawn and drawn[i] != drawn[n.name]
        }
        inner = {pair for pair in picture.links if not any(end.startswith(("in ", "out ")) for end in pair)}
        assert inner == edges


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_graph_shows_each_operation_once(graphs: dict[str, GraphView], name: str) -> None:
    picture = Picture(render.dot_graph(graphs[name], limit=10_000))
    drawn = Counter(n for box in picture.boxes if not box.endswith(" takes") for n in picture.members(box))
    ends = {node.name for node in graphs[name].nodes if node.op in ("placeholder", "output")}
    assert set(drawn) - ends == {node.name for node in _within(graphs[name], "")} and set(drawn.values()) == {1}


def test_labels_are_words_that_people_read() -> None:
    picture = Picture(render.dot_layer(llama(), 1))
    query = picture.text(picture.box_with("q_proj"))
    assert query.splitlines() == ["Linear (q_proj)", "W[64×64]", "[1×5×64] bf16"]  # noqa: RUF001
    for text in ("mul 0.25", "softmax dim -1", "to fp32", "slice dim 3 [0:8]", "silu (act_fn)", "view · transpose"):
        assert any(text in picture.text(box) for box in picture.boxes), text
    assert not any("weight" in picture.text(box) or "aten" in picture.text(box) for box in picture.boxes)


def test_roles_have_their_colours() -> None:
    picture = Picture(render.dot_layer(llama(), 1))
    roles = {colour.fill: role for role, colour in COLOURS.items()}
    expected = {
        "k_proj": "attention",
        "softmax": "attention",
        "down_proj": "MLP",
        "act_fn": "MLP",
        "W[64]": "norm",
        "mul cos": "rotary",
        "cat": "rotary",
        "neg": "rotary",
        "to bf16": "cast",
    }
    for text, role in expected.items():
        found = {roles[picture.boxes[b]["fillcolor"]] for b in picture.boxes if text in picture.text(b)}
        assert found == {role}, text


def test_every_kind_of_operation_has_a_role() -> None:
    targets = {
        "aten.convolution.default": "convolution",
        "c10d_functional.all_reduce.default": "collective",
        "trtllm.quant_fp8_linear.default": "quantisation",
        "aten._int_mm.default": "quantisation",
        "mylib.fused_moe.default": "MoE",
        "flashinfer.rms_norm": "norm",
        "aten.embedding.default": "embedding",
        "mylib.apply_rope.default": "rotary",
    }
    nodes = [NodeView("x", "placeholder", "x", shape=(4,), dtype="float32")]
    nodes += [NodeView(f"n{i}", "call_function", target, ("x",), shape=(4,)) for i, target in enumerate(targets)]
    picture = Picture(render.dot_graph(GraphView("g", tuple(nodes))))
    for i, role in enumerate(targets.values()):
        assert picture.boxes[f"n{i}"]["fillcolor"] == COLOURS[role].fill, role


def test_clusters_follow_the_modules() -> None:
    picture = Picture(render.dot_layer(llama(), 1))
    path = picture.clusters[picture.box_with("softmax")]
    assert list(path) == ["model.layers.1  LlamaDecoderLayer", "self_attn  LlamaAttention"]
    assert picture.clusters["scale_1"] == path and picture.clusters["gated_1"] != path
    assert len(picture.clusters["layer_out_1"]) == 1


def test_shared_sources_are_drawn_once_and_by_their_meaning() -> None:
    picture = Picture(render.dot_layer(llama(), 1))
    sources = sorted(picture.text(box).split("\n")[0] for box in picture.boxes if box.startswith("in "))
    assert sources == ["in: attention mask", "in: cos", "in: residual stream", "in: sin"]


def test_the_residual_stream_leads_from_the_input_through_both_additions_to_the_output() -> None:
    picture = Picture(render.dot_layer(llama(), 1))
    thick = {pair for pair, attributes in picture.links.items() if float(attributes.get("penwidth", "1")) > 2}
    assert thick == {
        ("in layer_out_0", "attended_1"),
        ("attended_1", "layer_out_1"),
        ("layer_out_1", "out layer_out_1"),
    }


def test_the_residual_stream_goes_on_through_a_fused_norm_without_a_shape() -> None:
    def node(name: str, target: str, *inputs: str, shape: tuple[int, ...] | None = (1, 5, 64)) -> NodeView:
        return NodeView(
            name, "call_function", target, inputs, f"({', '.join('%' + i for i in inputs)})", "layers.0", shape=shape
        )

    nodes = (
        NodeView("x", "placeholder", "x", shape=(1, 5, 64)),
        NodeView("y", "placeholder", "y", shape=(1, 5, 64)),
        node("fused", "lib.fused_add_rms_norm", "y", "x", shape=None),
        node("normed", "operator.getitem", "fused", shape=None),
        node("added", "operator.getitem", "fused", shape=None),
        node("attention", "lib.attention", "normed"),
        node("total", "aten.add.Tensor", "added", "attention"),
        NodeView("output", "output", "output", ("total",)),
    )
    picture = Picture(render.dot_layer(GraphView("g", nodes), 0))
    thick = {pair for pair, attributes in picture.links.items() if float(attributes.get("penwidth", "1")) > 2}
    assert {("fused", "added"), ("added", "total"), ("total", "out total")} <= thick
    assert not any("attention" in end or "normed" in end for pair in thick for end in pair)


@pytest.mark.parametrize("victim", ["scale_1", "q_t_1", "model_layers_1_mlp_up_proj_weight", "layer_out_0", "cos"])
def test_a_node_without_a_value_is_red_and_nothing_else_is(victim: str) -> None:
    graph = llama()
    nodes = tuple(dataclasses.replace(n, has_val=n.name != victim) for n in graph.nodes)
    for dot in (render.dot_layer(GraphView("g", nodes), 1), render.dot_graph(GraphView("g", nodes), limit=1000)):
        picture = Picture(dot)
        red = picture.with_fill(NO_VALUE.fill)
        assert [picture.members(box)[-1] for box in red] == [victim]
        assert "meta" in picture.text(red[0])
    assert NO_VALUE.fill not in render.dot_layer(graph, 1)


def test_a_folded_module_is_red_when_something_in_it_lacks_its_value() -> None:
    graph = llama(layers=40)
    nodes = tuple(dataclasses.replace(n, has_val=n.name != "scale_7") for n in graph.nodes)
    picture = Picture(render.dot_graph(GraphView("g", nodes)))
    red = picture.with_fill(NO_VALUE.fill)
    assert red == ["module model.layers.7"]


@pytest.mark.parametrize(
    ("layer", "modules"),
    [
        (1, {"model.layers.1"}),
        ("1", {"model.layers.1"}),
        ("model.layers.0.mlp", {"model.layers.0.mlp"}),
        ("*.self_attn", {"model.layers.0.self_attn", "model.layers.1.self_attn"}),
        ("model.layers.*", {"model.layers.0", "model.layers.1"}),
    ],
)
def test_a_layer_is_chosen_by_number_path_or_pattern(layer: str | int, modules: set[str]) -> None:
    graph = llama()
    picture = Picture(render.dot_layer(graph, layer))
    drawn = {n for box in picture.boxes if not box.startswith(("in ", "out ")) for n in picture.members(box)}
    assert drawn == {node.name for module in modules for node in _within(graph, module)}


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (7, "no layer 7 in this graph. There are model.layers.0 to model.layers.2"),
        ("model.layer.1", "did you mean 'model.layers.1'"),
        ("nothing.*", "There are model.layers.0 to"),
    ],
)
def test_a_wrong_layer_is_answered_with_those_there_are(layer: str | int, said: str) -> None:
    with pytest.raises(RenderError, match=re.escape(said)):
        render.dot_layer(llama(3), layer)


def test_two_stacks_make_a_number_ambiguous(graphs: dict[str, GraphView]) -> None:
    nodes = [
        NodeView(f"{s}{i}", "call_function", "aten.relu.default", (), module_path=f"{s}.block.{i}")
        for s in "ab"
        for i in (0, 1)
    ]
    with pytest.raises(RenderError, match=r"a\.block\.1 or b\.block\.1"):
        render.dot_layer(GraphView("t5", tuple(nodes)), 1)
    with pytest.raises(RenderError, match="its modules are stem, norm, deep, head"):
        render.dot_layer(graphs["conv"], 1)


def test_a_graph_without_module_paths_finds_its_layers_by_its_weights() -> None:
    graph = llama(3, modules=False)
    assert render.layers_of(graph) == ("model.layers.0", "model.layers.1", "model.layers.2")
    flat = tuple(
        dataclasses.replace(n, target=n.target.replace(".", "_")) if n.op == "get_attr" else n for n in graph.nodes
    )
    assert render.layers_of(GraphView("dump", flat)) == render.layers_of(graph)
    drawn = Picture(render.dot_layer(graph, 1))
    inside = {n for box in drawn.boxes if not box.startswith(("in ", "out ")) for n in drawn.members(box)}
    assert {"self_attn_q_proj_1", "softmax_1", "gated_1", "layer_out_1"} <= inside
    assert not any(name.endswith(("_0", "_2")) and "proj" in name for name in inside)


def test_depth_folds_what_lies_deeper() -> None:
    picture = Picture(render.dot_layer(llama(), 1, depth=1))
    assert {"module model.layers.1.self_attn", "module model.layers.1.mlp", "layer_out_1"} <= set(picture.boxes)
    assert "scale_1" not in picture.boxes and len(picture.boxes) < 16


@pytest.mark.parametrize("modules", [True, False])
def test_ten_thousand_operations_are_drawn_in_few_boxes(modules: bool) -> None:
    graph = llama(230)
    if not modules:
        graph = GraphView(
            "flat",
            tuple(dataclasses.replace(n, module_path="", module_type="") for n in graph.nodes if n.op != "get_attr"),
        )
    assert len(calls(graph)) > 8000
    picture = render.draw(render.dot_graph(graph), format="svg")
    layer = render.dot_layer(graph, 100) if modules else render.dot_graph(graph, limit=20)
    assert len(Picture(layer).boxes) < 80 and picture.count(b'class="node"') < 500


def test_a_source_for_many_layers_makes_no_long_edges() -> None:
    picture = Picture(render.dot_graph(llama(20), limit=60))
    reach = Counter(tail for tail, _ in picture.links)
    assert max(reach.values()) <= 6
    takes = [box for box in picture.boxes if box.endswith(" takes")]
    assert len(takes) == 20 and all(picture.text(box) == "cos, sin, attention mask" for box in takes)


def test_overlays_write_figures_and_colours_over_a_layer() -> None:
    report = wrong_scale()
    picture = Picture(render.dot_layer(report.after, 1, overlay=render.overlay_report(report)))
    assert "semantic: made 9.2e-04, total 9.2e-04" in picture.text("scale_1")
    assert "identical" in picture.text("scores_1") and picture.boxes["scores_1"]["style"] != "striped"
    assert picture.boxes["softmax_1"]["style"] == "striped" and "passed on" in picture.text("softmax_1")
    fills = {picture.boxes[name]["fillcolor"] for name in ("scores_1", "q_add_1")}
    assert len(fills) == 1 and picture.boxes["scale_1"]["fillcolor"] not in fills
    tap = Tap(
        "model.layers.1/scale_1",
        "aten.mul.Tensor",
        "model.layers.1",
        (1, 4, 5, 5),
        "bfloat16",
        -1.0,
        2.0,
        0.5,
        1.5,
        nan=3,
    )
    picture = Picture(render.dot_layer(report.after, 1, overlay=render.overlay_taps([tap])))
    assert "-1 to 2, rms 1.5" in picture.text("scale_1") and "3 NaN" in picture.text("scale_1")


_text = st.text(max_size=30)


@st.composite
def _wild_graphs(draw: st.DrawFn) -> GraphView:
    size = draw(st.integers(0, 12))
    nodes = []
    for index in range(size):
        inputs = draw(st.lists(st.integers(0, size - 1).map(lambda i: f"n{i}"), max_size=3)) if index else []
        nodes.append(
            NodeView(
                name=f"n{index}",
                op=draw(st.sampled_from(["call_function", "placeholder", "get_attr", "output", "call_module"])),
                target=draw(_text | st.sampled_from(["aten.add.Tensor", "operator.getitem", "aten.to.dtype"])),
                inputs=tuple(i for i in inputs if int(i[1:]) < index),
                args=draw(_text),
                module_path=draw(_text | st.sampled_from(["layers.0", "layers.0.mlp", "layers.1"])),
                module_type=draw(_text),
                shape=draw(st.none() | st.just((1, "s0")) | st.just(())),
                dtype=draw(st.none() | st.just("bfloat16")),
                source=draw(_text),
                has_val=draw(st.booleans()),
                is_view=draw(st.booleans()),
            )
        )
    return GraphView(draw(_text), tuple(nodes))


def test_pydot_reads_the_same_picture() -> None:
    dot = render.dot_layer(llama(), "model.layers.1.self_attn")
    with warnings.catch_warnings():
        # pydot calls pyparsing by names that newer versions of it deprecate
        warnings.simplefilter("ignore", DeprecationWarning)
        import pydot

        parsed = pydot.graph_from_dot_data(dot)
    assert parsed is not None
    graphs = [parsed[0]]
    for graph in graphs:
        graphs.extend(graph.get_subgraphs())
    names = {n.get_name().strip('"') for g in graphs for n in g.get_nodes() if n.get_attributes().get("label")}
    links = {(e.get_source().strip('"'), e.get_destination().strip('"')) for g in graphs for e in g.get_edges()}
    picture = Picture(dot)
    assert names - {"graph"} == set(picture.boxes) and links == set(picture.links)


@given(_wild_graphs())
@settings(max_examples=60, deadline=None)
def test_any_text_in_a_graph_makes_valid_dot(graph: GraphView) -> None:
    dot = render.dot_graph(graph)
    Picture(dot)
    assert render.draw(dot, format="svg").lstrip().startswith(b"<?xml")


class _Detector(torch.nn.Module):
    """Most of it is written without modules: boxes, their overlaps, and which of them stay."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.score, self.box, self.kept = torch.nn.Linear(8, 3), torch.nn.Linear(8, 4), kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [anchors, 8]
        best, which = self.score(x).max(-1)[0].topk(self.kept)
        box = self.box(x)[which]
        corner = torch.maximum(box[:, None, :2], box[None, :, :2])
        over = (torch.minimum(box[:, None, 2:], box[None, :, 2:]) - corner).clamp(min=0).prod(-1)
        stays = [over[0, 0] >= 0]
        for i in range(1, self.kept):
            stays.append(~(over[i, :i] * torch.stack(stays) > 0.5).any())
        return best * torch.stack(stays)


@pytest.mark.parametrize("kept", [6, 12, pytest.param(40, marks=pytest.mark.slow)])
def test_a_model_written_without_modules_is_shown_and_not_folded_away(kept: int) -> None:
    dot = render.dot_graph(view(capture(_Detector(kept).eval(), (torch.randn(50, 8),)), "detector"))
    picture = Picture(dot)
    assert 20 <= len(picture.boxes) <= 130
    assert kept > 12 or "prod" in dot  # by name, until there are too many
    assert "MoE" not in dot

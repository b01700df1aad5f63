"""Roles, places and words where a graph says little: text dumps, caches, quantised weights, fused norms, sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from graphprobe import capture, render, view
from graphprobe.foreign import autodeploy
from graphprobe.pipeline import Pipeline
from graphprobe.records import GraphView, NodeView
from graphprobe.render.labels import title, weight_lines
from graphprobe.render.places import weight_module
from graphprobe.render.roles import COLOURS, role_of
from graphprobe.render.wiring import wire
from models import tiny
from render_reading import Picture
from render_samples import Builder, llama

DUMP = Path(__file__).parent / "data" / "001_export_export_to_gm.txt"


def dumped() -> GraphView:
    return autodeploy.view(autodeploy.read(DUMP).sections[0])


def test_operations_of_a_dump_lie_in_the_block_around_them() -> None:
    places = wire(dumped()).place
    attention = ("view", "view_1", "torch_attention", "reshape")
    assert {places[name] for name in attention} == {"model.layers.0.self_attn"}
    assert {places[name] for name in ("silu", "mul")} == {"model.layers.0.mlp"}
    # what joins two blocks belongs to the layer
    assert {places[name] for name in ("add", "add_1", "trtllm_dist_all_reduce")} == {"model.layers.0"}


def test_a_graph_that_lost_its_modules_gets_most_of_them_back() -> None:
    known, lost = wire(llama()).place, wire(llama(modules=False)).place
    blocks = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    within = [name for name, path in known.items() if any(f".{block}" in path for block in blocks)]
    wrong = [name for name in within if lost[name].split(".")[:4] != known[name].split(".")[:4]]
    assert not wrong


@pytest.mark.parametrize(
    ("target", "module"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj"),
        ("model_layers_3_self_attn_q_proj_weight", "model.layers.3.self_attn.q_proj"),
        ("p_transformer_h_11_attn_c_attn_bias", "transformer.h.11.attn.c_attn"),
        ("scale", ""),
    ],
)
def test_a_weight_tells_its_module(target: str, module: str) -> None:
    assert weight_module(target) == module


def test_sizes_are_no_boxes_and_no_edges() -> None:
    graph = dumped()
    picture = Picture(render.dot_graph(graph))
    assert any("sym_size" in node.name for node in graph.nodes)
    assert not any("sym_size" in name for pair in picture.links for name in pair)
    assert {member for box in picture.boxes for member in picture.members(box)}.isdisjoint(
        node.name for node in graph.nodes if node.dtype is None and "sym_size" in node.target
    )


def test_a_size_that_lost_its_value_or_is_an_output_stays() -> None:
    x = NodeView("x", "placeholder", "x", shape=(4,), dtype="float32")
    lost = NodeView("lost", "call_function", "aten.sym_size.int", ("x",), has_val=False)
    given = NodeView("given", "call_function", "aten.sym_size.int", ("x",))
    end = NodeView("output", "output", "output", ("given", "lost"))
    picture = Picture(render.dot_graph(GraphView("g", (x, lost, given, end))))
    assert {"lost", "given"} <= set(picture.boxes) and "no meta" in picture.text("lost")


def test_words_for_a_dump_are_those_of_people() -> None:
    picture = Picture(render.dot_layer(dumped(), 0))
    query = picture.text("torch_linear_simple").splitlines()
    assert query[0] == "Linear (q_proj)" and query[1] == "W[64×64]"  # noqa: RUF001
    assert picture.text("torch_rmsnorm").splitlines()[0] == "RMSNorm (input_layernorm)"
    assert "eps 1e-05" in picture.text("torch_rmsnorm")
    assert picture.text("torch_attention").splitlines()[0] == "attention 0.25"
    fake = picture.text("torch_fake_quant_fp8_linear")
    assert "input_scale" in fake and "weight_scale" in fake
    assert picture.boxes["torch_fake_quant_fp8_linear"]["fillcolor"] == COLOURS["quantisation"].fill
    assert picture.boxes["trtllm_dist_all_reduce"]["fillcolor"] == COLOURS["collective"].fill


@pytest.mark.parametrize("recipe", ["quantize_int8", "quantize_nvfp4", "quantize_fp8,fuse_quantized_linear"])
def test_quantised_weights_are_seen(recipe: str) -> None:
    model, args, kwargs = tiny("llama")
    graph = view(Pipeline.parse(recipe).run(capture(model, args, kwargs)).gm)
    wiring = wire(graph)
    made = [name for name in wiring.shown if role_of(wiring, name) == "quantisation"]
    assert len(made) >= 14  # each linear layer of two layers of seven
    coded = [line for name in made for line in weight_lines(wiring, name) if line.endswith(("int8", "e4m3"))]
    assert len(coded) >= 14
    linears = [title(wiring, name) for name in wiring.shown if title(wiring, name).startswith("Linear")]
    assert all("(" in text for text in linears)  # dequantised or not, a projection has a name


class _Decode(torch.nn.Module):
    """One step of attention with a cache, written in place or joined to what came before."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.attn = torch.nn.Linear(8, 8)
        self.joined = joined
        self.register_buffer("keys", torch.zeros(1, 2, 16, 4))

    def forward(self, x: torch.Tensor, at: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        new = self.attn(x).view(1, 2, 1, 4)
        keys = torch.cat([past, new], 2) if self.joined else self.keys.index_copy_(2, at, new)
        return (keys * x.view(1, 2, 1, 4)).sum((-1, -2))


@pytest.mark.parametrize(("joined", "target"), [(False, "index_copy"), (True, "cat")])
def test_what_goes_into_a_cache_has_a_colour(joined: bool, target: str) -> None:
    gm = capture(_Decode(joined), (torch.randn(1, 8), torch.tensor([3]), torch.randn(1, 2, 5, 4)))
    wiring = wire(view(gm))
    cached = [name for name in wiring.shown if role_of(wiring, name) == "KV cache"]
    assert len(cached) == 1 and target in wiring.node(cached[0]).target


def test_results_of_a_fused_norm_lie_where_it_does() -> None:
    b = Builder()
    b.within("model.layers.1.input_layernorm", "RMSNorm")
    x, y = (b.add(name, "aten.relu.default", [], (4, 8)) for name in "xy")
    both = b.add("both", "flashinfer.add_rms_norm.default", [x, y], None, dtype=None)
    b.within("model.layers.0", "Layer")  # the addition that it took in came from there
    b.add("stream", "operator.getitem", [both], (4, 8), constants="1")
    assert wire(GraphView("g", tuple(b.nodes))).place["stream"] == "model.layers.1.input_layernorm"


def test_a_whole_graph_folds_evenly() -> None:
    for layers, limit in ((6, 60), (6, 30), (2, 90), (2, 300), (12, 100)):
        boxes = Picture(render.dot_graph(llama(layers), limit=limit)).boxes
        kinds = [{box.replace(f"_{i}", "").replace(f"layers.{i}", "") for box in boxes if _in(box, i)} for i in (0, 1)]
        assert kinds[0] == kinds[1], (layers, limit)
        assert not any(box.startswith("run ") for box in boxes)
    small = set(Picture(render.dot_graph(llama(2), limit=90)).boxes)
    # the operations of a block are shown rather than those of a norm
    assert {"softmax_0", "softmax_1", "module model.layers.0.input_layernorm"} <= small


def _in(box: str, layer: int) -> bool:
    return f"layers.{layer}" in box.split() or f"layers.{layer}." in box or box.endswith(f"_{layer}")


def test_a_box_without_links_stands_beside_its_neighbour() -> None:
    graph = llama()
    write = NodeView(
        "write", "call_function", "aten.add_.Tensor", (), "(1)", "model.layers.1.self_attn", "LlamaAttention", ()
    )
    at = next(i for i, node in enumerate(graph.nodes) if node.name == "softmax_1")
    graph = dataclasses.replace(graph, nodes=(*graph.nodes[: at + 1], write, *graph.nodes[at + 1 :]))
    picture = Picture(render.dot_layer(graph, 1))
    assert {"write", "softmax_1"} in picture.levels


def test_an_operation_asked_for_by_name_is_drawn_with_what_is_around_it() -> None:
    picture = Picture(render.dot_layer(llama(8), "scale_5"))
    shown = {member for box in picture.boxes for member in picture.members(box)}
    assert {"q_add_5", "scores_5", "scale_5", "softmax_5", "mixed_5"} <= shown
    assert not any(name.endswith(("_4", "_6")) for name in shown)
    assert float(picture.boxes["scale_5"]["penwidth"]) == 3.0

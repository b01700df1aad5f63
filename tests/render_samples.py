"""Hand-made graphs and reports for the tests of pictures and texts: no torch, no model, any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from graphprobe.records import (
    ClaimRecord,
    Coverage,
    Finding,
    GraphView,
    NodeView,
    OutputRow,
    RegionRow,
    Report,
)

HIDDEN, HEADS, HEAD = 64, 4, 16


class Builder:
    """Appends nodes and gives back their names."""

    def __init__(self) -> None:
        self.nodes: list[NodeView] = []
        self.path, self.kind = "", "Llama"

    def add(
        self, name: str, target: str, inputs: Sequence[str] = (), shape: tuple[int, ...] | None = None, **more: object
    ) -> str:
        """Append one call_function; `constants` go behind the inputs in the argument text."""
        constants = more.pop("constants", "")
        args = ", ".join([*(f"%{i}" for i in inputs), *([str(constants)] if constants else [])])
        fields: dict[str, object] = {"op": "call_function", "args": f"({args})", "dtype": "bfloat16"}
        fields |= {"module_path": self.path, "module_type": self.kind, "source": "modeling.py:12 in forward"}
        self.nodes.append(NodeView(name, target=target, inputs=tuple(inputs), shape=shape, **(fields | more)))  # type: ignore[arg-type]
        return name

    def weight(self, path: str, shape: tuple[int, ...]) -> str:
        """Append a parameter."""
        name = path.replace(".", "_")
        self.nodes.append(NodeView(name, "get_attr", path, shape=shape, dtype="bfloat16"))
        return name

    def within(self, path: str, kind: str) -> None:
        """Lay what follows into a module."""
        self.path, self.kind = path, kind


def llama(layers: int = 2, scale: str = "0.25", modules: bool = True) -> GraphView:
    """Return a Llama-like graph: 40 operations a layer, with cos, sin and a mask that every layer uses."""
    b = Builder()
    b.nodes.append(NodeView("tokens", "placeholder", "tokens", shape=(1, 5), dtype="int64"))
    b.nodes.append(NodeView("attention_mask", "placeholder", "attention_mask", shape=(1, 5), dtype="int64"))
    b.within("model.embed_tokens", "Embedding")
    x = b.add(
        "embedding",
        "aten.embedding.default",
        [b.weight("model.embed_tokens.weight", (99, HIDDEN)), "tokens"],
        (1, 5, HIDDEN),
    )
    b.within("model", "LlamaModel")
    mask = b.add("mask", "aten.expand.default", ["attention_mask"], (1, 1, 5, 5), dtype="bool", is_view=True)
    b.within("model.rotary_emb", "LlamaRotaryEmbedding")
    angles = b.add("arange", "aten.arange.default", [], (1, 5, HEAD), dtype="float32")
    cos = b.add("cos", "aten.cos.default", [angles], (1, 5, HEAD))
    sin = b.add("sin", "aten.sin.default", [angles], (1, 5, HEAD))
    for number in range(layers):
        x = _layer(b, f"model.layers.{number}", str(number), x, (cos, sin, mask), scale)
    b.within("lm_head", "Linear")
    x = b.add("logits", "aten.linear.default", [x, b.weight("lm_head.weight", (99, HIDDEN))], (1, 5, 99))
    b.nodes.append(NodeView("output", "output", "output", (x,), args=f"([%{x}],)"))
    nodes = b.nodes
    if not modules:
        nodes = [dataclasses.replace(n, module_path="", module_type="") for n in nodes]
    return GraphView("llama", tuple(nodes))


def _layer(b: Builder, path: str, tag: str, x: str, shared: tuple[str, str, str], scale: str) -> str:
    def norm(name: str, source: str) -> str:
        b.within(f"{path}.{name}", "LlamaRMSNorm")
        wide = b.add(
            f"{name}_to_{tag}", "aten.to.dtype", [source], (1, 5, HIDDEN), constants="float32", dtype="float32"
        )
        square = b.add(
            f"{name}_pow_{tag}", "aten.pow.Tensor_Scalar", [wide], (1, 5, HIDDEN), constants="2", dtype="float32"
        )
        mean = b.add(
            f"{name}_mean_{tag}", "aten.mean.dim", [square], (1, 5, 1), constants="[-1], True", dtype="float32"
        )
        scaled = b.add(f"{name}_mul_{tag}", "aten.mul.Tensor", [wide, mean], (1, 5, HIDDEN), dtype="float32")
        back = b.add(f"{name}_back_{tag}", "aten.to.dtype", [scaled], (1, 5, HIDDEN), constants="bfloat16")
        return b.add(
            f"{name}_out_{tag}", "aten.mul.Tensor", [b.weight(f"{path}.{name}.weight", (HIDDEN,)), back], (1, 5, HIDDEN)
        )

    def linear(module: str, source: str, rows: int, columns: int) -> str:
        b.within(f"{path}.{module}", "Linear")
        weight = b.weight(f"{path}.{module}.weight", (rows, columns))
        return b.add(f"{module.replace('.', '_')}_{tag}", "aten.linear.default", [source, weight], (1, 5, rows))

    def rotate(name: str, source: str) -> str:
        cos, sin, _ = shared
        heads = (1, HEADS, 5, HEAD)
        near = b.add(f"{name}_cos_{tag}", "aten.mul.Tensor", [source, cos], heads)
        half = b.add(
            f"{name}_slice_{tag}", "aten.slice.Tensor", [source], (1, HEADS, 5, 8), constants="3, 0, 8", is_view=True
        )
        rest = b.add(
            f"{name}_rest_{tag}",
            "aten.slice.Tensor",
            [source],
            (1, HEADS, 5, 8),
            constants="3, 8, 9223372036854775807",
            is_view=True,
        )
        turned = b.add(f"{name}_neg_{tag}", "aten.neg.default", [rest], (1, HEADS, 5, 8))
        joined = b.add(f"{name}_cat_{tag}", "aten.cat.default", [turned, half], heads, constants="-1")
        far = b.add(f"{name}_sin_{tag}", "aten.mul.Tensor", [joined, sin], heads)
        return b.add(f"{name}_add_{tag}", "aten.add.Tensor", [near, far], heads)

    normed = norm("input_layernorm", x)
    queries, keys, values = (linear(f"self_attn.{n}_proj", normed, HIDDEN, HIDDEN) for n in "qkv")
    b.within(f"{path}.self_attn", "LlamaAttention")
    split = []
    for name, source in (("q", queries), ("k", keys), ("v", values)):
        view = b.add(
            f"{name}_view_{tag}",
            "aten.view.default",
            [source],
            (1, 5, HEADS, HEAD),
            constants="[1, 5, -1, 16]",
            is_view=True,
        )
        split.append(
            b.add(f"{name}_t_{tag}", "aten.transpose.int", [view], (1, HEADS, 5, HEAD), constants="1, 2", is_view=True)
        )
    q, k = rotate("q", split[0]), rotate("k", split[1])
    scores = b.add(f"scores_{tag}", "aten.matmul.default", [q, k], (1, HEADS, 5, 5))
    scaled = b.add(f"scale_{tag}", "aten.mul.Tensor", [scores], (1, HEADS, 5, 5), constants=scale)
    masked = b.add(f"masked_{tag}", "aten.add.Tensor", [scaled, shared[2]], (1, HEADS, 5, 5))
    soft = b.add(f"softmax_{tag}", "aten.softmax.int", [masked], (1, HEADS, 5, 5), constants="-1")
    mixed = b.add(f"mixed_{tag}", "aten.matmul.default", [soft, split[2]], (1, HEADS, 5, HEAD))
    joined = b.add(
        f"joined_{tag}", "aten.reshape.default", [mixed], (1, 5, HIDDEN), constants="[1, 5, -1]", is_view=True
    )
    out = linear("self_attn.o_proj", joined, HIDDEN, HIDDEN)
    b.within(path, "LlamaDecoderLayer")
    x = b.add(f"attended_{tag}", "aten.add.Tensor", [x, out], (1, 5, HIDDEN))
    normed = norm("post_attention_layernorm", x)
    gate = linear("mlp.gate_proj", normed, 96, HIDDEN)
    b.within(f"{path}.mlp.act_fn", "SiLUActivation")
    gate = b.add(f"silu_{tag}", "aten.silu.default", [gate], (1, 5, 96))
    up = linear("mlp.up_proj", normed, 96, HIDDEN)
    b.within(f"{path}.mlp", "LlamaMLP")
    both = b.add(f"gated_{tag}", "aten.mul.Tensor", [gate, up], (1, 5, 96))
    down = linear("mlp.down_proj", both, HIDDEN, 96)
    b.within(path, "LlamaDecoderLayer")
    return b.add(f"layer_out_{tag}", "aten.add.Tensor", [x, down], (1, 5, HIDDEN))


def calls(graph: GraphView) -> list[NodeView]:
    """Return the operations of a graph that make new values."""
    return [node for node in graph.nodes if node.op == "call_function" and not node.is_view]


def wrong_scale(layers: int = 4, layer: int = 1) -> Report:
    """Return the report of an attention scale that is 0.1 % too large in one layer."""
    before = llama(layers)
    culprit = f"scale_{layer}"
    changed = tuple(
        dataclasses.replace(n, args=n.args.replace("0.25", "0.25025")) if n.name == culprit else n for n in before.nodes
    )
    after = GraphView("after", changed)
    names = [node.name for node in calls(before)]
    at = names.index(culprit)
    rows = tuple(_row(node, index, at) for index, node in enumerate(calls(before)))
    finding = Finding(
        kind="semantic",
        before=(culprit,),
        after=(culprit,),
        module_path=f"model.layers.{layer}.self_attn",
        op="aten.mul.Tensor",
        introduced=9.2e-4,
        total=9.2e-4,
        exact=1.0e-3,
        floor=1.7e-3,
        cures=0.998,
        rule="same function",
        hint="looks like an attention scale: 0.25025 in place of 0.25",
        explanation="In exact arithmetic the two sides still differ. Replacing this region alone mends the output.",
        culprit=culprit,
        source="modeling.py:12 in forward",
        outputs=(culprit, culprit),
        frontier=((f"scores_{layer}", f"scores_{layer}"),),
        transform="scale_attention",
    )
    return Report(
        verdict="semantic",
        findings=(finding,),
        coverage=Coverage(len(names), 9, len(names), fraction=1.0, resolution=1.0, evidence={"id": len(names)}),
        regions=rows,
        outputs=(OutputRow("logits", (1, 5, 99), "bfloat16", 1.2e-2, 0.41, False),),
        before=dataclasses.replace(before, name="before"),
        after=after,
        claims=tuple(ClaimRecord(name, name, "id") for name in names),
        notes=("compared on the CPU",),
        environment={"torch": "2.13.0"},
        command="graphprobe diff before.fx after.fx",
    )


def _row(node: NodeView, index: int, culprit: int) -> RegionRow:
    verdict = "semantic" if index == culprit else "rounding" if index > culprit else "identical"
    introduced = 9.2e-4 if index == culprit else 1e-5 if index > culprit else 0.0
    total = 9.2e-4 + 1e-4 * (index - culprit) if index >= culprit else 0.0
    exact = 1e-3 if index == culprit else 0.0
    return RegionRow(
        node.name, node.name, node.target, node.module_path, verdict, introduced, total, exact, 1.7e-3, "id", 1, 1
    )

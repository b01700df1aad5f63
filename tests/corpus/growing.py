"""Graphs of any size, made without export, to see how the cost of something grows with the number of nodes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from corpus import rewrites
from graphprobe import align, inputs, nodes, provenance
from graphprobe.execute import run_program
from graphprobe.program import copied, program

aten = torch.ops.aten
WIDTH, TOKENS = 16, 4


def stack(layers: int, seed: int = 0) -> GraphModule:
    """Build a stack of small blocks (norm, three projections, attention, gated MLP): 40 nodes a layer."""
    generator = torch.Generator().manual_seed(seed)
    root, graph = torch.nn.Module(), Graph()

    def weight(name: str, *shape: int) -> Node:
        value = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
        root.register_buffer(name, value)
        node = graph.get_attr(name)
        node.meta["val"] = value.to("meta")
        return node

    def call(path: str, target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        made = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
        node.meta["val"] = made
        node.meta["nn_module_stack"] = {path: (path, "torch.nn.Module")}
        return node

    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(TOKENS, WIDTH, device="meta")
    h = x
    for i in range(layers):
        attention, mlp = f"layers.{i}.attention", f"layers.{i}.mlp"
        normed = norm(call, f"layers.{i}.norm_1", h, weight(f"n1_{i}", WIDTH))
        q, k, v = (call(attention, aten.linear.default, normed, weight(f"{c}_{i}", WIDTH, WIDTH)) for c in "qkv")
        scores = call(
            attention,
            aten.mul.Tensor,
            call(attention, aten.matmul.default, q, call(attention, aten.t.default, k)),
            0.25,
        )
        mixed = call(attention, aten.matmul.default, call(attention, aten.softmax.int, scores, -1), v)
        h = call(
            f"layers.{i}",
            aten.add.Tensor,
            h,
            call(attention, aten.linear.default, mixed, weight(f"o_{i}", WIDTH, WIDTH)),
        )
        normed = norm(call, f"layers.{i}.norm_2", h, weight(f"n2_{i}", WIDTH))
        gate = call(mlp, aten.silu.default, call(mlp, aten.linear.default, normed, weight(f"g_{i}", 24, WIDTH)))
        up = call(mlp, aten.linear.default, normed, weight(f"u_{i}", 24, WIDTH))
        down = call(mlp, aten.linear.default, call(mlp, aten.mul.Tensor, gate, up), weight(f"d_{i}", WIDTH, 24))
        h = call(f"layers.{i}", aten.add.Tensor, h, down)
    graph.output(h)
    gm = GraphModule(root, graph)
    provenance.stamp(gm)
    return gm


def norm(call: Any, path: str, x: Node, weight: Node) -> Node:
    """Normalise by the root of the mean square, written out."""
    mean = call(path, aten.mean.dim, call(path, aten.pow.Tensor_Scalar, x, 2), [-1], True)
    scale = call(path, aten.rsqrt.default, call(path, aten.add.Tensor, mean, 1e-6))
    return call(path, aten.mul.Tensor, call(path, aten.mul.Tensor, x, scale), weight)


def timed(size: int, level: str) -> dict[str, Any]:
    """Align a stack of about `size` nodes with a reordered copy of itself; the forwards are timed apart."""
    before = stack(max(1, size // 39))
    after = rewrites.stripped(rewrites.shuffled(before), level)
    left, right = program(before, (), {}), copied(program(after, (), {}))
    bound: inputs.Inputs = {"x": torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))}
    started = time.perf_counter()
    if level == "values":
        for one in (left, right):
            run_program(one, bound, list(one.outputs.values()))
    forwards = time.perf_counter() - started
    started = time.perf_counter()
    found = align.align(left, right, (), bound if level == "values" else None)
    seconds = time.perf_counter() - started - forwards
    making = [n for n in right.live if nodes.makes_values(n)]
    claimed = sum(bool(found.of_after.get(n)) for n in making) / len(making)
    return {"nodes": len(left.live), "level": level, "seconds": seconds, "forwards": forwards, "claimed": claimed}

"""Graphs of any size, made without export, to see how the cost of something grows with the number of nodes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from corpus import rewrites
from graphprobe import align, inputs, nodes, provenance
from graphprobe.execute import run_program
from graphprobe.program import copied, program

aten = torch.ops.aten
WIDTH, TOKENS = 16, 4


def stack(layers: int, seed: int = 0, other: bool = False) -> GraphModule:
    """Build a stack of small blocks (norm, three projections, attention, gated MLP): 40 nodes a layer.

    `other` writes the norms and the attention in another way, so that hardly a term is the same and values must tell.
    """
    generator = torch.Generator().manual_seed(seed)
    root, graph = torch.nn.Module(), Graph()
    made: dict[str, torch.Tensor] = {}

    def weight(name: str, *shape: int) -> Node:
        value = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
        root.register_buffer(name, value)
        node = graph.get_attr(name)
        node.meta["val"] = value.to("meta")
        return node

    def call(path: str, target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        kind = repr((target, torch.fx.map_arg(args, lambda n: tuple(n.meta["val"].shape))))
        if kind not in made:  # one layer is like another
            made[kind] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
        node.meta["val"] = made[kind]
        node.meta["nn_module_stack"] = {path: (path, "torch.nn.Module")}
        return node

    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(TOKENS, WIDTH, device="meta")
    h = x
    for i in range(layers):
        attention, mlp = f"layers.{i}.attention", f"layers.{i}.mlp"
        normed = norm(call, f"layers.{i}.norm_1", h, weight(f"n1_{i}", WIDTH), other)
        q, k, v = (call(attention, aten.linear.default, normed, weight(f"{c}_{i}", WIDTH, WIDTH)) for c in "qkv")
        if other:  # k q^T with the scale on k, the other way round
            turned = call(attention, aten.t.default, q)
            scores = call(attention, aten.matmul.default, call(attention, aten.div.Tensor, k, 4.0), turned)
            scores = call(attention, aten.t.default, scores)
        else:
            turned = call(attention, aten.t.default, k)
            scores = call(attention, aten.mul.Tensor, call(attention, aten.matmul.default, q, turned), 0.25)
        mixed = call(attention, aten.matmul.default, call(attention, aten.softmax.int, scores, -1), v)
        h = call(
            f"layers.{i}",
            aten.add.Tensor,
            h,
            call(attention, aten.linear.default, mixed, weight(f"o_{i}", WIDTH, WIDTH)),
        )
        normed = norm(call, f"layers.{i}.norm_2", h, weight(f"n2_{i}", WIDTH), other)
        gate = call(mlp, aten.silu.default, call(mlp, aten.linear.default, normed, weight(f"g_{i}", 24, WIDTH)))
        up = call(mlp, aten.linear.default, normed, weight(f"u_{i}", 24, WIDTH))
        down = call(mlp, aten.linear.default, call(mlp, aten.mul.Tensor, gate, up), weight(f"d_{i}", WIDTH, 24))
        h = call(f"layers.{i}", aten.add.Tensor, h, down)
    graph.output(h)
    gm = GraphModule(root, graph)
    provenance.stamp(gm)
    return gm


def norm(call: Any, path: str, x: Node, weight: Node, other: bool) -> Node:
    """Normalise by the root of the mean square, written out."""
    mean = call(path, aten.mean.dim, call(path, aten.pow.Tensor_Scalar, x, 2), [-1], True)
    if other:
        total = call(path, aten.sum.dim_IntList, call(path, aten.mul.Tensor, x, x), [-1], True)
        mean = call(path, aten.div.Tensor, total, float(WIDTH))
        root = call(path, aten.sqrt.default, call(path, aten.add.Tensor, mean, 1e-6))
        return call(path, aten.div.Tensor, call(path, aten.mul.Tensor, x, weight), root)
    scale = call(path, aten.rsqrt.default, call(path, aten.add.Tensor, mean, 1e-6))
    return call(path, aten.mul.Tensor, call(path, aten.mul.Tensor, x, scale), weight)


def timed(size: int, levels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Align a stack of about `size` nodes with a reordered copy of itself, or with another way to write it ("other").

    Seconds are those of the process; the forward runs are timed apart and taken off.
    """
    before = stack(max(1, size // 39))
    bound: inputs.Inputs = {"x": torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))}
    for level in levels:
        copy = stack(max(1, size // 39), other=True) if level == "other" else before
        after = rewrites.stripped(rewrites.shuffled(copy), "values" if level == "other" else level)
        left, right = program(before, (), {}), copied(program(after, (), {}))
        runs = level in ("values", "other")
        started = time.process_time()
        for one in (left, right) if runs else ():
            run_program(one, bound, list(one.outputs.values()))
        forwards = time.process_time() - started
        started = time.process_time()
        found = align.align(left, right, (), bound if runs else None)
        seconds = time.process_time() - started - forwards
        making = [n for n in right.live if nodes.makes_values(n)]
        claimed = sum(bool(found.of_after.get(n)) for n in making) / len(making)
        yield {"nodes": len(left.live), "level": level, "seconds": seconds, "forwards": forwards, "claimed": claimed}

"""Terms and weights: two ways to write one thing have one number; what is not the same has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from graphprobe import align, nodes
from graphprobe.align.matching import Matching
from graphprobe.calling import input_paths, output_paths
from graphprobe.program import Program

aten = torch.ops.aten
Build = Callable[..., Node]


def graph(build: Callable[[Build, Build, Node], Any], *shape: int, seed: int = 0) -> Program:
    """Build a graph over one input x: `build(call, weight, x)` returns its output."""
    generator = torch.Generator().manual_seed(seed)
    root, made = torch.nn.Module(), Graph()

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        node = made.call_function(target, args, kwargs)
        read = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*read[0], **read[1])
        return node

    def weight(name: str, value: torch.Tensor | tuple[int, ...]) -> Node:
        held = value if isinstance(value, torch.Tensor) else torch.randn(value, generator=generator)
        root.register_buffer(name, held)
        node = made.get_attr(name)
        node.meta["val"] = held.to("meta")
        return node

    x = made.placeholder("x")
    x.meta["val"] = torch.empty(shape or (2, 5, 8), device="meta")
    made.output(build(call, weight, x))
    gm = GraphModule(root, made)
    return Program(gm, input_paths(gm), output_paths(gm), {})


def same(before: Program, after: Program) -> bool:
    """Whether the outputs of two graphs have one number."""
    matching = Matching(before, after)
    x, y = (next(iter(one.outputs.values())) for one in (before, after))
    return matching.numbers_before()[x] == matching.numbers_after()[y]


W = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
B = torch.randn(6, generator=torch.Generator().manual_seed(2))
G = torch.randn(8, generator=torch.Generator().manual_seed(3))


def by_addmm(call: Any, weight: Any, x: Node) -> Node:
    product = call(
        aten.addmm.default, weight("b", B), call(aten.view.default, x, [10, 8]), weight("wt", W.t().contiguous())
    )
    return call(aten.view.default, product, [2, 5, 6])


def norm_by_hand(call: Any, weight: Any, x: Node) -> Node:
    mean = call(aten.mean.dim, call(aten.mul.Tensor, x, x), [2], True)
    scaled = call(aten.mul.Tensor, call(aten.rsqrt.default, call(aten.add.Tensor, mean, 1e-6)), x)
    return call(aten.mul.Tensor, weight("g", G), scaled)


EQUAL: dict[str, tuple[Any, Any]] = {
    "linear and addmm with a stored transpose": (
        lambda call, weight, x: call(aten.linear.default, x, weight("w", W), weight("b", B)),
        by_addmm,
    ),
    "linear and matmul with a transpose": (
        lambda call, weight, x: call(aten.linear.default, x, weight("w", W)),
        lambda call, weight, x: call(aten.matmul.default, x, call(aten.t.default, weight("other", W))),
    ),
    "a sum the other way round": (
        lambda call, weight, x: call(aten.add.Tensor, x, call(aten.neg.default, x)),
        lambda call, weight, x: call(aten.add.Tensor, call(aten.neg.default, x), x),
    ),
    "silu written out": (
        lambda call, weight, x: call(aten.silu.default, x),
        lambda call, weight, x: call(aten.mul.Tensor, call(aten.sigmoid.default, x), x),
    ),
    "rms norm written out": (
        lambda call, weight, x: call(aten.rms_norm.default, x, [8], weight("scale", G), 1e-6),
        norm_by_hand,
    ),
    "transposed there and back": (
        lambda call, weight, x: call(aten.exp.default, x),
        lambda call, weight, x: call(
            aten.exp.default, call(aten.permute.default, call(aten.transpose.int, x, 1, 2), [0, 2, 1])
        ),
    ),
    "a cast between": (
        lambda call, weight, x: call(aten.exp.default, x),
        lambda call, weight, x: call(aten.exp.default, call(aten.to.dtype, x, torch.float64)),
    ),
    "softmax over the last dimension, counted from either end": (
        lambda call, weight, x: call(aten.softmax.int, x, -1),
        lambda call, weight, x: call(aten._softmax.default, x, 2, False),
    ),
    "a part, sliced or narrowed": (
        lambda call, weight, x: call(aten.exp.default, call(aten.slice.Tensor, x, -1, 2, 6)),
        lambda call, weight, x: call(aten.exp.default, call(aten.narrow.default, x, 2, 2, 4)),
    ),
}
UNEQUAL: dict[str, tuple[Any, Any]] = {
    "another constant": (
        lambda call, weight, x: call(aten.mul.Tensor, x, 0.5),
        lambda call, weight, x: call(aten.mul.Tensor, x, 0.5005),
    ),
    "a difference the other way round": (
        lambda call, weight, x: call(aten.sub.Tensor, x, call(aten.exp.default, x)),
        lambda call, weight, x: call(aten.sub.Tensor, call(aten.exp.default, x), x),
    ),
    "another weight of the same shape": (
        lambda call, weight, x: call(aten.linear.default, x, weight("w", W)),
        lambda call, weight, x: call(aten.linear.default, x, weight("v", W + 1)),
    ),
    "another part": (
        lambda call, weight, x: call(aten.slice.Tensor, x, -1, 0, 4),
        lambda call, weight, x: call(aten.slice.Tensor, x, -1, 4, 8),
    ),
    "transposed once": (
        lambda call, weight, x: call(aten.exp.default, x),
        lambda call, weight, x: call(aten.exp.default, call(aten.transpose.int, x, 1, 2)),
    ),
    "bits read as another dtype": (
        lambda call, weight, x: call(aten.abs.default, x),
        lambda call, weight, x: call(aten.abs.default, call(aten.view.dtype, x, torch.int32)),
    ),
}


@pytest.mark.parametrize("case", EQUAL)
def test_two_ways_to_write_one_thing_are_one(case: str) -> None:
    assert same(*(graph(build) for build in EQUAL[case]))


@pytest.mark.parametrize("case", UNEQUAL)
def test_what_differs_is_not_one(case: str) -> None:
    assert not same(*(graph(build) for build in UNEQUAL[case]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_parts_of_a_joined_weight_are_told_by_their_rows_not_their_place(
    order: tuple[int, ...], dtype: torch.dtype
) -> None:
    parts = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (6, 4, 4)]
    parts[2] = parts[2] + 1

    def apart(call: Any, weight: Any, x: Node) -> Any:
        return tuple(call(aten.linear.default, x, weight(f"w{i}", part)) for i, part in enumerate(parts))

    def joined(call: Any, weight: Any, x: Node) -> Any:
        whole = torch.cat([parts[i] for i in order]).to(dtype).float()
        made = call(aten.linear.default, x, weight("whole", whole))
        split = call(aten.split_with_sizes.default, made, [len(parts[i]) for i in order], -1)
        import operator

        return tuple(call(operator.getitem, split, k) for k in range(3))

    before, after = graph(apart), graph(joined)
    matching = Matching(before, after)
    xs, ys = (list(one.outputs.values()) for one in (before, after))
    for k, i in enumerate(order):
        assert matching.numbers_before()[xs[i]] == matching.numbers_after()[ys[k]]


def test_without_a_run_nothing_is_claimed_that_has_another_shape() -> None:
    before = graph(lambda call, weight, x: call(aten.exp.default, x))
    after = graph(lambda call, weight, x: call(aten.exp.default, call(aten.view.default, x, [10, 8])))
    found = align.align(before, after)
    assert all(nodes.shape(c.before) == nodes.shape(c.after) for c in found.claims if c.evidence != "output")


@pytest.mark.parametrize("value", [0.0, 1.0], ids=str)
def test_ties_are_never_claimed_on_values_alone(value: float) -> None:
    """Two constants and a two-valued mask on each side hold the same; nothing says which is which."""

    def build(call: Any, weight: Any, x: Node) -> Node:
        masks = [call(aten.gt.Scalar, call(target, x), 100.0) for target in (aten.exp.default, aten.sin.default)]
        filled = [call(aten.where.ScalarOther, mask, x, value) for mask in masks]
        return call(aten.add.Tensor, *filled)

    def other(call: Any, weight: Any, x: Node) -> Node:
        masks = [call(aten.lt.Scalar, call(target, x), -100.0) for target in (aten.cos.default, aten.tanh.default)]
        filled = [call(aten.where.ScalarOther, mask, x, value) for mask in masks]
        return call(aten.add.Tensor, *filled)

    before, after = graph(build), graph(other)
    found = align.align(before, after, (), {"x": torch.linspace(-1, 1, 80).reshape(2, 5, 8)})
    assert not [c for c in found.claims if c.evidence in ("value", "layout")]


@pytest.mark.parametrize("first", ["cos", "sin"])
def test_of_two_equal_values_the_one_in_the_wrong_place_is_not_meant(first: str) -> None:
    """A sine in the cosine's place, and the sine itself: which is which, only what is done with them can tell."""

    def turned(wrong: bool) -> Callable[..., Any]:
        def build(call: Any, weight: Any, x: Node) -> Node:
            tables = {}
            for name in ("cos", "sin") if first == "cos" else ("sin", "cos"):
                target = aten.sin.default if wrong or name == "sin" else aten.cos.default
                tables[name] = call(aten.mul.Tensor, call(target, x), 1.0)
            straight = call(aten.mul.Tensor, weight("w", G), tables["cos"])
            return call(aten.add.Tensor, straight, call(aten.mul.Tensor, call(aten.neg.default, x), tables["sin"]))

        return build

    before, after = graph(turned(False)), graph(turned(True))
    found = align.align(before, after)
    trigonometric = [n for n in before.live if n.target in (aten.cos.default, aten.sin.default)]
    assert all(found.of_before.get(n) for n in trigonometric)
    assert all(before.order[c.before] == after.order[c.after] for c in found.claims)


def test_a_wrong_constant_that_makes_it_another_mask_leaves_the_other_masks_in_their_places() -> None:
    """Two layers, each with both masks; one of the first is made equal to those of the other kind."""

    def layers(wrong: bool) -> Callable[..., Any]:
        def build(call: Any, weight: Any, x: Node) -> Node:
            for layer in range(2):
                first = 0 if wrong and not layer else -1
                for diagonal in (first, 0):
                    triangle = call(aten.tril.default, call(aten.ones_like.default, x), diagonal)
                    mask = call(aten.eq.Scalar, triangle, 0.0)
                    x = call(aten.cumsum.default, call(aten.masked_fill.Scalar, x, mask, 2.0), -1)
            return x

        return build

    before, after = graph(layers(False)), graph(layers(True))
    found = align.align(before, after, (), {"x": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(5))})
    assert len(found.claims) >= 20
    assert all(before.order[c.before] == after.order[c.after] for c in found.claims)

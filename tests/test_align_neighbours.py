"""Nearest rows of two matrices, against all distances; and what has the same part to play on both sides."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.fx import Node

from graphprobe.align import align, counterparts
from graphprobe.align.matching import Matching
from graphprobe.align.neighbours import FLOOR, TIE, nearest
from test_align_terms import aten, graph


@pytest.mark.parametrize("agree", [1e-3, 0.05], ids=["fine", "coarse"])
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_the_nearest_rows_are_those_of_all_distances(rows: int, agree: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(600, 32, generator=generator) * torch.rand(600, 1, generator=generator).mul(5).exp()
    b = a[torch.randint(0, 600, (rows,), generator=generator)]
    b = b * (1 + agree * torch.randn(rows, 32, generator=generator))
    near = nearest(a, b, agree)
    apart = torch.cdist(b.double(), a.double()) / torch.linalg.vector_norm(b.double(), dim=1, keepdim=True)
    for row in range(rows):
        best = float(apart[row].min())
        close = {i for i, d in enumerate(apart[row].tolist()) if best <= agree and d <= max(best, FLOOR) * TIE}
        assert {i for i, _ in near.of_y.get(row, ())} == close


def test_many_rows_that_all_have_a_partner() -> None:
    """More than any limit of pairs, and nothing is left for a second look."""
    rows = torch.randn(2500, 16, generator=torch.Generator().manual_seed(1))
    near = nearest(rows, rows, 1e-3)
    assert all(found == [(row, 0.0)] for row, found in near.of_y.items()) and len(near.of_y) == 2500


def split_up(call: Any, weight: Any, x: Node) -> Node:
    """A norm written out and a product, then a bias by itself."""
    mean = call(aten.mean.dim, call(aten.mul.Tensor, x, x), [-1], True)
    wide = call(aten.mul.Tensor, x, call(aten.rsqrt.default, mean))
    scaled = call(aten.mul.Tensor, wide, weight("n", (8,)))
    product = call(aten.matmul.default, scaled, call(aten.t.default, weight("w", (4, 8))))
    return call(aten.add.Tensor, product, weight("b", (4,)))


def in_one(call: Any, weight: Any, x: Node) -> Node:
    """The same by one operator each, after something else was done to x."""
    normed = call(aten.rms_norm.default, call(aten.tanh.default, x), [8], weight("n", (8,)), 0.0)
    return call(aten.linear.default, normed, weight("w", (4, 8)), weight("b", (4,)))


def test_a_product_and_its_bias_are_the_counterpart_of_one_operator_and_a_norm_is_not_of_its_scale() -> None:
    before, after = graph(split_up), graph(in_one)
    matching = Matching(before, after)
    found = {(x.name, y.name): evidence for x, y, evidence in counterparts.counterparts(matching)}
    assert found[("add_tensor", "linear_default")] == "weight"
    # what goes into the scale of a norm is not what goes into a norm
    assert all("tanh" not in y for _, y in found), found


def norm(call: Any, weight: Any, x: Node, *, twice: bool) -> Node:
    square = call(aten.mul.Tensor, x, x)
    mean = call(aten.mean.dim, call(aten.add.Tensor, square, 1e-2) if twice else square, [-1], True)
    return call(aten.mul.Tensor, x, call(aten.rsqrt.default, call(aten.add.Tensor, mean, 1e-2)))


def test_a_value_that_runs_across_is_paired_straight() -> None:
    """With its epsilon added twice, a mean is what the sum behind the mean was; each claims its own kind."""
    before, after = (graph(functools.partial(norm, twice=twice)) for twice in (False, True))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    claims = [(c.before, c.after) for c in align(before, after, bound={"x": x}).claims]
    kinds = {str(b.target): str(a.target) for b, a in claims if b.target in (aten.mean.dim, aten.add.Tensor)}
    assert kinds == {"aten.mean.dim": "aten.mean.dim", "aten.add.Tensor": "aten.add.Tensor"}

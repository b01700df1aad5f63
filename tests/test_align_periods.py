"""Layers read off the graph alone: where module paths say which layer a node is in, what repeats says the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
import torch

import graphprobe
from corpus import rewrites
from graphprobe import align, provenance
from graphprobe.align.periods import repeats
from graphprobe.program import as_is
from models import tiny
from plain_layers import two_styles


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("name", ["decoder", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_layers_are_those_of_the_module_paths(name: str, shuffled: bool) -> None:
    model, args, kwargs = (*two_styles("", 0, torch.float32)[:1], (torch.ones(2, 12, dtype=torch.int64),), {})
    if name != "decoder":
        model, args, kwargs = tiny(name)
    gm = graphprobe.capture(model, args, kwargs)
    paths = {n.name: provenance.repeated(provenance.module_path(n)) for n in gm.graph.nodes}
    gm = rewrites.shuffled(gm) if shuffled else gm
    found = repeats(gm.graph.output_node().all_input_nodes)
    assert found is not None
    layers = found.layers(found.rows[0])
    offsets: dict[Any, set[int]] = defaultdict(set)  # a layer may begin anywhere, but in all in the same place
    met: Counter[Any] = Counter()
    for node in found.order:
        pattern, index = paths[node.name]
        if index and node in layers:
            role = pattern, node.target, index
            offsets[(*role[:2], met[role])].add(int(index[0]) - layers[node])
            met[role] += 1
    assert sum(len(found) == 1 for found in offsets.values()) >= 0.9 * len(offsets) > 10
    assert set.union(*offsets.values()) <= {0, 1}


def test_what_repeats_nowhere_has_no_layers() -> None:
    gm = graphprobe.capture(torch.nn.Sequential(torch.nn.Linear(8, 9), torch.nn.Tanh()), (torch.ones(2, 8),))
    assert repeats(gm.graph.output_node().all_input_nodes) is None


class Tables(torch.nn.Module):
    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.cat([x, 2 * x], -1)
        angles = angles.roll(self.shift, -1) if self.shift else angles
        return (angles.cos() * 1.5).exp() @ (angles.sin() * 0.5).exp().mT


def test_an_operation_too_many_is_seen_through() -> None:
    x = torch.randn(2, 6, 8)
    before, after = (as_is(graphprobe.capture(Tables(shift), (x,))) for shift in (0, 1))
    claims = {(c.before.name, c.after.name) for c in align.align(before, after).claims}
    assert {("cos", "cos"), ("sin", "sin")} <= claims


class Filled(torch.nn.Module):
    def __init__(self, fill: Any) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.fill(x).cos().exp()


def test_what_only_takes_a_shape_is_not_seen_through() -> None:
    x = torch.randn(2, 6, 8)
    before, after = (as_is(graphprobe.capture(Filled(fill), (x,))) for fill in (torch.zeros_like, torch.ones_like))
    assert ("mul", "mul") in {(c.before.name, c.after.name) for c in align.align(before, after).claims}

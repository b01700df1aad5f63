"""Taps observe every value at the right moment, change nothing, and say what the numbers are."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.fx import GraphModule, Interpreter, Node

import graphprobe
import models
from graphprobe import nodes
from tap_tools import assert_describes, same, tensors_of


class Recorder(Interpreter):
    """Runs a graph node by node and clones what each returns at once."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


# --- the corpus -------------------------------------------------------------------------------------------------------

CASES = [(name, torch.float32) for name in models.NAMES] + [(name, torch.bfloat16) for name in ("llama", "gpt2", "mlp")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_every_value_is_observed_once_and_rightly(name: str, dtype: torch.dtype) -> None:
    model, args, kwargs = models.tiny(name, dtype)
    gm = graphprobe.capture(model, args, kwargs)
    probe = graphprobe.instrument(model)
    found = probe(*args, **kwargs)

    with torch.no_grad():
        expected = gm(*args, **kwargs)
        recorder = Recorder(gm)
        recorder.run(*pytree.tree_leaves((args, kwargs)))
    assert type(found) is type(expected) and same(expected, found)
    assert probe.distance == 0.0

    rows = {tap.name: tap for tap in probe.taps}
    assert len(rows) == len(probe.taps)
    makers = {node.name for node in gm.graph.nodes if nodes.makes_values(node)}
    measured = {name for name, tap in rows.items() if not tap.derived and "@" not in name}
    assert measured == makers
    views = {node.name for node in gm.graph.nodes if nodes.is_view(node) and nodes.tensor_val(node) is not None}
    assert views <= rows.keys() - measured
    for name in measured:
        assert_describes(rows[name], recorder.values[name])
    for tap in probe.taps:
        if tap.derived:
            assert (tap.min, tap.rms, tap.zeros) == (None, None, 0)
            known = tap.of in rows and not rows[tap.of].derived
            assert known or tap.of in {n.name for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")}


@pytest.mark.parametrize("name", [name for name in models.NAMES if name != "branch"])
def test_kept_tensors_are_what_modules_returned(name: str) -> None:
    model, args, kwargs = models.tiny(name)
    returned: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, i, out, path=path: returned.update({path: tensors_of(out)}))
        for path, module in model.named_modules()
        if path
    ]
    with torch.no_grad():
        returned_copies = model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    del returned_copies
    probe = graphprobe.instrument(model, keep="*")
    probe(*args, **kwargs)
    assert returned
    for path, values in returned.items():
        kept = [tensor for name, tensor in probe.tensors.items() if name == path or name.startswith(f"{path}[")]
        assert kept, path
        if name != "mlp":  # its values are changed in place after they were returned
            assert all(any(torch.equal(tensor, value) for value in values) for tensor in kept), path


def test_values_inside_modules_are_kept_under_path_and_node_name() -> None:
    model, args, kwargs = models.tiny("llama")
    probe = graphprobe.instrument(model, keep=["*.0.mlp/*", "model.layers.1.self_attn"])
    probe(*args, **kwargs)
    rows = {tap.name: tap for tap in probe.taps}
    inside = [name for name in probe.tensors if name.startswith("model.layers.0.mlp/")]
    assert inside and set(probe.tensors) == {*inside, "model.layers.1.self_attn"}
    for name in inside:
        path, _, node = name.partition("/")
        assert rows[node].module_path == path
        assert_describes(rows[node], probe.tensors[name])


# --- in place ---------------------------------------------------------------------------------------------------------


def test_a_value_is_read_before_it_is_changed_in_place() -> None:
    model, (x,), _ = models.tiny("mlp")
    probe = graphprobe.instrument(model, keep="up")
    probe(x)
    with torch.no_grad():
        linear = model.up(x)
        shifted = linear + model.shift
    rows = {tap.name: tap for tap in probe.taps}
    assert torch.equal(probe.tensors["up"], linear)
    assert_describes(rows["linear"], linear)
    assert_describes(rows["add_"], shifted)
    assert_describes(rows["relu_"], shifted.relu())


def test_a_written_part_gives_a_row_for_the_part_and_one_for_the_whole() -> None:
    model, (x,), _ = models.tiny("mlp")
    probe = graphprobe.instrument(model)
    probe(x)
    with torch.no_grad():
        halves = (model.up(x) + model.shift).relu().view(4, 8, 2, 32)
        part = halves[..., 0, :] * 0.5
        whole = torch.stack([part, halves[..., 1, :]], dim=-2).flatten(-2)
    rows = {tap.name: tap for tap in probe.taps}
    assert_describes(rows["mul_"], part)
    assert_describes(rows["linear@mul_"], whole)
    assert rows["view"].of == "relu_"  # made before the write
    assert rows["flatten"].of == "linear@mul_"


class Writes(nn.Module):
    """Every way to write that export leaves in a graph, and values without a number in them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(3, 7, 5))

    def forward(self, x: torch.Tensor) -> Any:
        self.memory[:, : x.shape[1]] = x
        spectrum = torch.fft.fft(x)
        largest, places = x.topk(2)
        copied = x.clone()
        copied[0] = math.nan
        copied[..., 1:3].mul_(math.inf)
        out = torch.empty_like(x)
        torch.add(x, 1, out=out)
        return spectrum.abs(), largest, places, copied, self.memory.sum(), None, out, x > 0, x[:0] * 2


def test_writes_of_every_kind_are_observed() -> None:
    x = torch.randn(3, 7, 5)
    probe = graphprobe.instrument(Writes())
    _, _, _, copied, _, nothing, out, _, _ = probe(x)
    assert nothing is None
    rows = {tap.name: tap for tap in probe.taps}
    assert_describes(rows["clone@mul_"], copied)
    assert_describes(rows["fft_fft"], torch.fft.fft(x))
    assert_describes(next(tap for tap in probe.taps if tap.op == "aten.add.out"), out)
    assert_describes(next(tap for tap in probe.taps if tap.op == "aten.copy_.default"), x)
    assert rows["clone"].of in ("x", "copy_")
    empty = next(tap for tap in probe.taps if tap.shape == (0, 7, 5) and not tap.derived)
    assert (empty.min, empty.mean, empty.nan, empty.zeros) == (None, None, 0, 0)


def test_an_operator_that_writes_and_returns_nothing_has_a_row() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    copy = graph.call_function(torch.ops.aten.clone.default, (x,))
    graph.call_function(torch.ops.aten._foreach_mul_.Scalar, ([copy], 2.0))
    graph.call_function(operator.setitem, (copy, 0, 9.0))
    graph.output(copy)
    x_value = torch.randn(4, 3)
    probe = graphprobe.instrument(GraphModule(nn.Module(), graph))
    y = probe(x_value)
    rows = {tap.name: tap for tap in probe.taps}
    assert_describes(rows["clone_default@_foreach_mul__scalar"], x_value * 2)
    assert_describes(rows["clone_default@setitem"], y)


def test_checksums_tell_which_values_are_bitwise_the_same() -> None:
    """Two runs of one model agree everywhere; after a weight changed, all that depends on it differs, and no more."""
    model, args, kwargs = models.tiny("llama", torch.bfloat16)
    probes = [graphprobe.instrument(model, checksum=on) for on in (True, True, False)]
    first, again, without = ([probe(*args, **kwargs), probe.taps][1] for probe in probes)
    measured = [tap for tap in first if not tap.derived]
    assert all(0 <= tap.checksum < 2**32 for tap in measured) and all(t.checksum is None for t in first if t.derived)
    assert first == again and all(tap.checksum is None for tap in without)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.neg_()
    try:
        probes[0](*args, **kwargs)
        changed = [new for old, new in zip(first, probes[0].taps, strict=True) if old.checksum != new.checksum]
    finally:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.neg_()
    assert "up_proj" in changed[0].module_path
    last = next(i for i, tap in enumerate(first) if tap.name == changed[0].name)
    assert {tap.name for tap in changed} <= {tap.name for tap in first[last:]} and len(changed) > 5

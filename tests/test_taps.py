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
from graphprobe.errors import CaptureError, InputError
from graphprobe.records import Tap
from graphprobe.taps import instrument_graph, read
from graphprobe.taps.rows import META


def tensors_of(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def same(before: Any, after: Any) -> bool:
    pairs = list(zip(tensors_of(before), tensors_of(after), strict=True))
    return bool(pairs) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


class Recorder(Interpreter):
    """Runs a graph node by node and clones what each returns at once."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def assert_describes(tap: Tap, value: torch.Tensor) -> None:
    """Compare a row with sums that are exact."""
    numbers = (value.abs() if value.is_complex() else value).double().flatten()
    finite = numbers[numbers.isfinite()].tolist()
    assert (tap.shape, tap.dtype) == (tuple(value.shape), nodes.dtype_name(value.dtype))
    assert (tap.nan, tap.inf) == (int(numbers.isnan().sum()), int(numbers.isinf().sum()))
    assert tap.zeros == int((numbers == 0).sum())
    if not finite:
        assert (tap.min, tap.max, tap.mean, tap.rms) == (None, None, None, None)
        return
    scale = max(abs(x) for x in finite) or 1.0
    rms = math.sqrt(math.fsum((x / scale) ** 2 for x in finite) / len(finite)) * scale
    mean = math.fsum(x / scale for x in finite) / len(finite) * scale
    assert (tap.min, tap.max) == (min(finite), max(finite))
    assert tap.mean == pytest.approx(mean, abs=3e-6 * rms) and tap.rms == pytest.approx(rms, rel=3e-6)


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


# --- calls ------------------------------------------------------------------------------------------------------------


def test_inputs_of_another_kind_are_captured_again_and_equal_kinds_once() -> None:
    model, _, kwargs = models.tiny("llama")
    probe = graphprobe.instrument(model, keep="model.layers.0")
    probe(**kwargs)
    first, kept = probe.graph, probe.tensors["model.layers.0"].clone()
    short = {**kwargs, "input_ids": kwargs["input_ids"][:, :7], "attention_mask": kwargs["attention_mask"][:, :7]}
    probe(**short)
    assert probe.graph is not first and probe.tensors["model.layers.0"].shape == (2, 7, 64)
    assert {tap.shape[1] for tap in probe.taps if tap.op == "aten.linear.default"} == {7}
    y = probe(**dict(reversed(kwargs.items())))
    assert probe.graph is first and torch.equal(probe.tensors["model.layers.0"], kept)
    with torch.no_grad():
        assert torch.equal(y.logits, model(**kwargs).logits)
    without_mask = probe(input_ids=kwargs["input_ids"], use_cache=False)
    assert probe.graph is not first and without_mask.logits.shape == y.logits.shape


def test_a_later_call_leaves_tensors_of_an_earlier_one_alone() -> None:
    model, (x,), _ = models.tiny("conv")
    probe = graphprobe.instrument(model, keep="stem")
    probe(x)
    before = probe.tensors["stem"]
    copy, taps = before.clone(), probe.taps
    probe(x * 2)
    assert torch.equal(before, copy) and not torch.equal(probe.tensors["stem"], copy)
    assert probe.taps != taps and probe.taps is probe.taps


def test_changed_weights_dtypes_and_modes_are_noticed() -> None:
    model, (x,), _ = models.tiny("mlp")
    probe = graphprobe.instrument(model)
    probe(x)
    model.down.weight = nn.Parameter(torch.zeros_like(model.down.weight))
    assert same(probe(x), model(x))
    model.double()
    probe(x.double())
    assert {tap.dtype for tap in probe.taps} == {"float64"}


def test_gradient_modes_do_not_matter() -> None:
    model, (x,), _ = models.tiny("conv")
    probe = graphprobe.instrument(model)
    with torch.inference_mode():
        expected, taps = probe(x).clone(), probe.taps
    found = probe(x.requires_grad_())
    assert torch.equal(found, expected) and not found.requires_grad and probe.taps == taps
    free = probe.graph(x)  # the graph itself is as differentiable as the captured one
    free.sum().backward()
    assert x.grad is not None and probe.taps == taps


def test_training_mode_random_numbers_and_buffers_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)).train()
    twin = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)).train()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(8, 6)
    probe = graphprobe.instrument(model)
    for _ in range(2):
        torch.manual_seed(3)
        found = probe(x)
        torch.manual_seed(3)
        with torch.no_grad():
            assert torch.equal(found, twin(x))
        assert probe.distance == 0.0
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_a_cache_given_as_input_is_not_used_up() -> None:
    model, _, kwargs = models.tiny("llama")
    tokens = kwargs["input_ids"]
    with torch.no_grad():
        past = model(input_ids=tokens, use_cache=True).past_key_values
        expected = model(input_ids=tokens).logits
    probe = graphprobe.instrument(model)
    y = probe(input_ids=tokens[:, :1], past_key_values=past, use_cache=True)
    assert probe.distance == 0.0 and type(y.past_key_values) is type(past)
    assert y.past_key_values.get_seq_length() == past.get_seq_length() + 1 == tokens.shape[1] + 1
    assert y.logits.shape == expected[:, :1].shape


# --- graphs instead of modules ----------------------------------------------------------------------------------------


def test_one_capture_of_a_dynamic_program_serves_all_sizes() -> None:
    model, _, kwargs = models.tiny("llama")
    size = torch.export.Dim("size", min=4, max=60)
    dynamic = {"input_ids": {1: size}, "attention_mask": {1: size}, "use_cache": None}
    program = torch.export.export(model, (), kwargs, dynamic_shapes=dynamic)
    probe = graphprobe.instrument(program)
    keeping = graphprobe.instrument(program, keep="*.mlp")
    graphs = set()
    for length in (16, 9, 31):
        tokens = torch.randint(3, 99, (2, length))
        call = {"attention_mask": torch.ones_like(tokens), "use_cache": False, "input_ids": tokens}
        y = probe(**call)
        graphs.add(probe.graph)
        with torch.no_grad():
            assert torch.equal(y.logits, graphprobe.capture(program)(**call).logits)
        assert {tap.shape[1] for tap in probe.taps if tap.op == "aten.linear.default"} == {length}
        assert all(size > 0 for tap in probe.taps for size in tap.shape)
        keeping(**call)
        assert keeping.tensors["model.layers.1.mlp"].shape == (2, length, 64)
    assert len(graphs) == 1 and probe.distance is None


class Selects(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.nonzero() * 2


def test_a_size_that_depends_on_data_is_counted_and_cannot_be_kept() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    probe = graphprobe.instrument(Selects())
    probe(x)
    assert [tap.shape for tap in probe.taps] == [(3, 2), (3, 2)]
    with pytest.raises(InputError, match="depends on data"):
        graphprobe.instrument(Selects(), keep="nonzero")(x)


class Traced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        rows = x.size(0)
        hidden = self.linear(x).relu()
        hidden.add_(1)
        left, right = torch.split(hidden.view(rows, -1), 2, dim=1)
        return torch.cat([left * 2, right], 1)[0], rows


def test_a_graph_without_metadata_is_observed_with_shapes() -> None:
    gm = torch.fx.symbolic_trace(Traced())
    probe = graphprobe.instrument(gm, keep="linear")
    for rows in (3, 5):
        x = torch.randn(rows, 4)
        y, count = probe(x)
        assert count == rows and torch.equal(y, gm(x)[0])
        taps = {tap.name: tap for tap in probe.taps}
        linear = gm.linear(x).detach()
        assert torch.equal(probe.tensors["linear"], linear)
        assert_describes(taps["linear"], linear)
        assert_describes(taps["add_"], linear.relu() + 1)
        assert "size" not in taps and "split" not in taps
    assert all("val" not in node.meta for node in gm.graph.nodes)


def test_an_operation_that_has_no_fake_form_is_observed_with_its_shape() -> None:
    def host(x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum().item())

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(host, (x,))
    graph.output(graph.call_function(torch.max, (made, 0)))
    probe = graphprobe.instrument(GraphModule(nn.Module(), graph))
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    probe(value)
    assert len(probe.taps) == 1
    assert_describes(probe.taps[0], value * 10)


def test_the_graph_given_is_not_changed() -> None:
    model, args, kwargs = models.tiny("mlp")
    gm = graphprobe.capture(model, args, kwargs)
    code, names = gm.code, [node.name for node in gm.graph.nodes]
    weights = dict(gm.named_parameters())
    tapped = instrument_graph(gm)
    assert gm.code == code and [node.name for node in gm.graph.nodes] == names
    assert all(weights[name] is parameter for name, parameter in tapped.named_parameters())
    assert not set(tapped.state_dict()) - set(gm.state_dict())
    with torch.no_grad():
        assert same(gm(*args), tapped(*args))
    assert len(read(tapped, tapped.meta[META])) > 0


def test_arguments_that_do_not_fit_are_told_apart() -> None:
    model, _, kwargs = models.tiny("llama")
    probe = graphprobe.instrument(graphprobe.capture(model, (), kwargs))
    tokens, mask = kwargs["input_ids"], kwargs["attention_mask"]
    with pytest.raises(InputError, match="needs the input 'attention_mask'"):
        probe(input_ids=tokens)
    with pytest.raises(InputError, match="captured with"):
        probe(input_ids=tokens[:, :4], attention_mask=mask[:, :4], use_cache=False)
    with pytest.raises(InputError, match="did you mean 'input_ids'"):
        probe(input_id=tokens)
    with pytest.raises(InputError, match="must be a tensor"):
        probe(input_ids=3, attention_mask=mask, use_cache=False)
    probe(tokens, mask, use_cache=False)


def test_errors_say_what_to_do() -> None:
    model, args, _ = models.tiny("mlp")
    probe = graphprobe.instrument(model)
    for read_early in ("taps", "tensors", "graph", "distance"):
        with pytest.raises(InputError, match="call it first"):
            getattr(probe, read_early)
    assert "not called yet" in str(probe)
    with pytest.raises(InputError, match="did you mean 'up'"):
        graphprobe.instrument(model, keep="upp")(*args)
    with pytest.raises(CaptureError, match=r"Mlp\.forward"):
        probe()
    with pytest.raises(CaptureError, match="cannot capture a int"):
        graphprobe.instrument(3)  # type: ignore[arg-type]
    keeping = graphprobe.instrument(model, keep="up")
    keeping(*args)
    with pytest.raises(KeyError, match="did you mean 'up'"):
        keeping.tensors["upp"]
    assert "linear" in str(keeping)

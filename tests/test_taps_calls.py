"""A probe is called like the model: other inputs, caches, modes and graphs, and errors that say what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import graphprobe
import models
from graphprobe.errors import CaptureError, InputError
from graphprobe.taps import instrument_graph, read
from graphprobe.taps.rows import META
from tap_tools import assert_describes, same

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

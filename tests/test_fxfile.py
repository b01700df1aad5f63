"""``.fx`` files: what is saved comes back, runs to the same bits, and takes no more room than it must."""

from __future__ import annotations

import copy
import operator
import os
import weakref
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import graphprobe
from fx_tools import bitwise_equal, captured, edit, node_row, outputs, read_graph, same_bits
from graphprobe import fxfile
from graphprobe.errors import FxFileError, OperatorError
from graphprobe.fxfile import archive
from graphprobe.records import Replacement
from models import NAMES, PLAIN, TEXT, tiny

KEPT = ("custom", "nn_module_stack", "stack_trace", "torch_fn")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "graph.fx"


def graph_of(model: nn.Module, *args: Any) -> torch.fx.GraphModule:
    return graphprobe.capture(model, args)


# --- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_comes_back_whole(name: str, path: Path) -> None:
    _, args, kwargs = tiny(name)
    gm = captured(name)
    graphprobe.save(gm, path, args=args, kwargs=kwargs)
    loaded = graphprobe.load(path)
    stored = fxfile.load_inputs(path)
    assert stored is not None
    with torch.no_grad():
        assert type(loaded(*args, **kwargs)) is type(gm(*args, **kwargs))
    assert bitwise_equal(outputs(gm, args, kwargs), outputs(loaded, *stored))
    assert loaded.code == gm.code
    assert graphprobe.view(loaded) == graphprobe.view(gm)
    assert not loaded.meta["graphprobe_notes"]
    assert list(loaded.state_dict()) == list(gm.state_dict())
    for mine, theirs in zip(loaded.graph.nodes, gm.graph.nodes, strict=True):
        for key in KEPT:
            assert mine.meta.get(key) == theirs.meta.get(key), (mine.name, key)
        assert str(mine.meta.get("val")) == str(theirs.meta.get("val")), mine.name
        origins = [[source.name for source in node.meta.get("from_node", [])] for node in (mine, theirs)]
        assert origins[0] == origins[1]


@pytest.mark.parametrize("name", ["qwen3", "mixtral", *PLAIN])
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, when a pytree structure is copied
def test_a_loaded_graph_is_a_graph_like_any_other(name: str, path: Path) -> None:
    _, args, kwargs = tiny(name)
    graphprobe.save(captured(name), path)
    loaded = graphprobe.load(path)
    wanted = outputs(loaded, args, kwargs)
    assert bitwise_equal(wanted, outputs(copy.deepcopy(loaded), args, kwargs))
    assert bitwise_equal(wanted, outputs(graphprobe.capture(loaded.eval()), args, kwargs))
    with torch.no_grad():
        program = torch.export.export(loaded, args, kwargs)
    assert bitwise_equal(wanted, outputs(program.module(), args, kwargs))


@pytest.mark.parametrize("name", ["llama", "mixtral", "branch", "tied"])
def test_saving_what_was_loaded_gives_the_same_bytes(name: str, path: Path) -> None:
    graphprobe.save(captured(name), path)
    again = path.with_name("again.fx")
    graphprobe.save(graphprobe.load(path), again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_symbolic_shapes_stay_symbolic(name: str, path: Path) -> None:
    gm = captured(name, dynamic=True)
    graphprobe.save(gm, path)
    loaded = graphprobe.load(path)
    assert graphprobe.view(loaded) == graphprobe.view(gm)
    _, args, kwargs = tiny(name)
    longer = {key: value.repeat(2, 2) if torch.is_tensor(value) else value for key, value in kwargs.items()}
    assert bitwise_equal(outputs(gm, args, longer), outputs(loaded, args, longer))
    inputs = [node.meta["val"] for node in loaded.graph.find_nodes(op="placeholder")]
    before = [str(node.meta.get("val")) for node in loaded.graph.nodes if node.op == "call_function"]
    FakeTensorProp(loaded, inputs[0].fake_mode).propagate_dont_convert_inputs(*inputs)
    assert [str(node.meta.get("val")) for node in loaded.graph.nodes if node.op == "call_function"] == before


class Modes(nn.Module):
    """Autocast, no_grad and vmap, which export writes as bodies and as calls of private functions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float() + torch.vmap(lambda row: row.sin() * row.sum())(x)


class Loops(nn.Module):
    """A loop and a scan, whose bodies are graphs of their own."""

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        steps, y = while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t * 2), (torch.tensor(0), x))
        return steps, scan(lambda carry, t: (carry + t, (carry * t).sin()), torch.zeros(4), y)


class DataDependent(nn.Module):
    """Sizes and numbers that only the data tell."""

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        return x.nonzero().float().sum(0), x[x > 0].exp(), x.sum().item() + 1


class Arithmetic(nn.Module):
    """Sizes that are computed from other sizes, and arguments that JSON has no word for."""

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        size = x.shape[0] * 2 + 1
        lowest = x.masked_fill(x < 0, float("-inf"))
        halves = x.repeat_interleave(2, 0).reshape(x.shape[0], -1, 4)
        return x.new_zeros(size // 2), torch.arange(x.shape[0] % 3 + 1), lowest, halves, x.unbind(1), x * (1 + 2j)


@pytest.mark.parametrize("model", [Modes(), Loops(), DataDependent(), Arithmetic()], ids=lambda m: type(m).__name__)
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, when a pytree structure is copied
def test_odd_operators_and_sizes(model: nn.Module, path: Path) -> None:
    shapes = ({0: torch.export.Dim.AUTO},) if isinstance(model, Arithmetic) else None
    gm = graphprobe.capture(model, (torch.randn(5, 4),), dynamic_shapes=shapes)
    graphprobe.save(gm, path)
    loaded = graphprobe.load(path)
    for length in (5, 8) if shapes else (5,):
        args = (torch.randn(length, 4),)
        assert bitwise_equal(outputs(gm, args, {}), outputs(loaded, args, {}))
    if not isinstance(model, Modes):  # the value of a batched tensor is recorded without its batch
        assert graphprobe.view(loaded) == graphprobe.view(gm)
    assert graphprobe.lint(gm) == graphprobe.lint(loaded) == ()


def test_a_symbol_keeps_its_range_and_hint(path: Path) -> None:
    length = torch.export.Dim("length", min=2, max=100)
    model, args = nn.Linear(4, 4), (torch.randn(7, 4),)
    gm = graphprobe.capture(model, args, dynamic_shapes=({0: length},))
    graphprobe.save(gm, path)
    (size, _) = next(iter(graphprobe.load(path).graph.find_nodes(op="placeholder"))).meta["val"].shape
    env, symbol = size.node.shape_env, size.node.expr
    assert size.node.hint == 7
    assert (env.var_to_range[symbol].lower, env.var_to_range[symbol].upper) == (2, 100)


def test_modules_of_torch_nn_that_a_graph_calls(path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.GELU("tanh"), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).eval()
    gm = torch.fx.symbolic_trace(model)
    graphprobe.save(gm, path)
    inputs = (torch.randn(2, 3, 8, 8),)
    assert bitwise_equal(outputs(model, inputs, {}), outputs(graphprobe.load(path), inputs, {}))


class Foreign(nn.Module):
    """A module that is not torch's own, kept whole by the tracer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_a_module_that_is_not_torchs_own_can_be_shown_but_not_run(path: Path) -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Foreign)

    model = nn.Sequential(Foreign())
    graphprobe.save(torch.fx.GraphModule(model, Tracer().trace(model)), path)
    loaded = graphprobe.load(path)
    assert [node.op for node in graphprobe.view(loaded).nodes] == ["placeholder", "call_module", "output"]
    with pytest.raises(OperatorError, match=r"'0' .*Foreign.*graphprobe\.capture"):
        loaded(torch.zeros(1))


def test_export_with_its_guards_still_runs(path: Path) -> None:
    model, args, _ = tiny("mlp")
    gm = torch.export.export(model, args).module()
    graphprobe.save(gm, path)
    assert bitwise_equal(outputs(gm, args, {}), outputs(graphprobe.load(path), args, {}))


def test_replacement_events_are_kept(path: Path) -> None:
    gm = graph_of(nn.Linear(2, 2), torch.ones(1, 2))
    gm.meta["graphprobe_events"] = (Replacement("linear", "addmm", "decompose"), Replacement("x", "y"))
    graphprobe.save(gm, path)
    assert graphprobe.load(path).meta["graphprobe_events"] == gm.meta["graphprobe_events"]


def test_an_output_class_that_is_unknown_here_becomes_a_dict(path: Path) -> None:
    _, args, kwargs = tiny("llama")
    gm = captured("llama")
    graphprobe.save(gm, path)
    edit(path, lambda graph: graph["graphs"][0]["call"]["out"].update(type="nowhere.Output"))
    loaded = graphprobe.load(path)
    with torch.no_grad():
        found = loaded(*args, **kwargs)
    assert type(found) is dict
    assert same_bits(found["logits"], outputs(gm, args, kwargs)[0])
    assert "nowhere.Output" in loaded.meta["graphprobe_notes"][0]


def test_a_device_that_this_machine_lacks_becomes_the_cpu(path: Path) -> None:
    model, args, _ = tiny("custom")
    graphprobe.save(captured("custom"), path)

    def move(graph: Any) -> None:
        for row in graph["tensors"] + graph["vals"]:
            row["device"] = "xpu:3"

    loaded = graphprobe.load(edit(path, move))
    assert bitwise_equal(outputs(model, args, {}), outputs(loaded, args, {}))
    assert "xpu:3" in loaded.meta["graphprobe_notes"][0]
    for device, wanted in (("xpu:3", "is not available"), ("nowhere", "is no device")):
        with pytest.raises(FxFileError, match=wanted):
            graphprobe.load(path, device=device)


# --- operators that are not available --------------------------------------------------------------------------------


def test_an_operator_that_is_not_registered_can_be_shown_and_given(path: Path) -> None:
    model, args, _ = tiny("custom")
    graphprobe.save(captured("custom"), path)

    def rename(graph: Any) -> None:
        node_row(graph, "torch.ops.graphprobe_tests.scaled_silu.default")["target"] = "torch.ops.elsewhere.silu.default"

    loaded = graphprobe.load(edit(path, rename))
    assert "elsewhere.silu.default" in [node.target for node in graphprobe.view(loaded).nodes]
    with pytest.raises(OperatorError, match=r"'elsewhere\.silu\.default' cannot be run.*Import the package"):
        loaded(*args)
    again = path.with_name("again.fx")
    graphprobe.save(loaded, again)  # an operator that is unknown here is not lost
    given = {"elsewhere.silu.default": lambda x, scale: torch.nn.functional.silu(x) * scale}
    assert bitwise_equal(outputs(model, args, {}), outputs(graphprobe.load(again, operators=given), args, {}))


def test_a_python_function_can_be_shown_and_given(path: Path) -> None:
    gm = copy.deepcopy(torch.fx.symbolic_trace(lambda x: operator.add(x, 1)))
    next(iter(gm.graph.find_nodes(op="call_function", target=operator.add))).target = double_plus
    gm.recompile()
    graphprobe.save(gm, path)
    loaded = graphprobe.load(path)
    assert f"{__name__}.double_plus" in [node.target for node in graphprobe.view(loaded).nodes]
    with pytest.raises(OperatorError, match=r"double_plus.*names but does not contain.*custom_op"):
        loaded(torch.ones(2))
    given = graphprobe.load(path, operators={f"{__name__}.double_plus": double_plus})
    assert torch.equal(given(torch.ones(2)), torch.full((2,), 3.0))


def double_plus(x: torch.Tensor, y: float) -> torch.Tensor:
    return 2 * x + y


# --- tensors ---------------------------------------------------------------------------------------------------------

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.uint8,
    torch.bool,
)
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(-1, -2),
    "strided": lambda t: t[..., ::2],
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "column of a larger one": lambda t: t[..., 1],
    "empty": lambda t: t[:0],
    "scalar": lambda t: t.flatten()[3],
    "channels last": lambda t: t.view(1, *t.shape).contiguous(memory_format=torch.channels_last),
}


class Holder(nn.Module):
    """Returns the buffers it was given."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        for index, tensor in enumerate(tensors):
            self.register_buffer(f"t{index}", tensor)


def holding(*tensors: torch.Tensor) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    graph.output(tuple(graph.get_attr(f"t{index}") for index in range(len(tensors))))
    return torch.fx.GraphModule(Holder(*tensors), graph)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from(sorted(LAYOUTS)), st.booleans())
def test_every_dtype_and_layout_comes_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, layout: str, conjugate: bool
) -> None:
    path = tmp_path_factory.mktemp("tensors") / "t.fx"
    tensor = LAYOUTS[layout](torch.arange(-36, 36).view(2, 6, 6).to(dtype))
    tensor = tensor.conj() if conjugate else tensor
    graphprobe.save(holding(tensor), path)
    (found,) = graphprobe.load(path)()
    assert same_bits(found, tensor)
    wasteful = layout == "column of a larger one"  # stored without the gaps between its elements
    if not tensor.is_conj():  # torch itself resolves a conjugate view into new memory
        assert found.stride() == (tensor.contiguous().stride() if wasteful else tensor.stride())


def test_equal_contents_are_stored_once_but_stay_apart(path: Path) -> None:
    ones = [torch.ones(256, 256) for _ in range(8)]
    graphprobe.save(holding(*ones), path)
    assert os.path.getsize(path) < 1.5 * ones[0].nbytes
    loaded = graphprobe.load(path)
    loaded.t0.add_(1)
    assert all(torch.equal(getattr(loaded, f"t{i}"), ones[i]) for i in range(1, 8))


@pytest.mark.parametrize(
    "view",
    [lambda t: t[2:5], lambda t: t.t(), lambda t: t.view(torch.int32), lambda t: t[1:3].view(torch.uint8), lambda t: t],
)
def test_aliases_stay_aliases(view: Any, path: Path) -> None:
    base = torch.randn(8, 8)
    graphprobe.save(holding(base, view(base)), path)
    loaded = graphprobe.load(path)
    assert same_bits(loaded.t1, view(base))
    loaded.t0.fill_(3.0)
    assert torch.equal(loaded.t1, view(torch.full((8, 8), 3.0)))


def test_tied_weights_stay_one_parameter(path: Path) -> None:
    model, _, _ = tiny("tied")
    gm = graphprobe.capture(*tiny("tied"))
    graphprobe.save(gm, path)
    loaded = graphprobe.load(path)
    assert loaded.get_parameter("table.weight") is loaded.get_parameter("head.weight")
    assert sum(row["bytes"] for row in read_graph(path)["contents"]) == model.table.weight.nbytes


class Marked(torch.Tensor):
    """A tensor subclass without data of its own."""


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: torch.ones(2).as_subclass(Marked), r"Marked.*as_subclass\(torch\.Tensor\)"),
        (lambda: torch.eye(3).to_sparse(), r"to_dense\(\)"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), r"int_repr\(\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*deprecated.*", "ignore:.*quantiz.*")
def test_a_tensor_that_cannot_be_stored_is_named_with_what_to_do(make: Any, advice: str, path: Path) -> None:
    with pytest.raises(FxFileError, match=f"'t0'.*{advice}"):
        graphprobe.save(holding(make()), path)
    assert not list(path.parent.iterdir())


# --- weights elsewhere, or nowhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_referred_to(dtype: torch.dtype, path: Path) -> None:
    model, args, kwargs = tiny("llama", dtype)
    state = {key: value.to(torch.float32) for key, value in tiny("llama")[0].state_dict().items()}
    source = path.with_name("model.safetensors")
    save_file(state, source)
    gm = graphprobe.capture(model, args, kwargs)
    graphprobe.save(gm, path, weights="reference", weights_from=source)
    assert os.path.getsize(path) < 0.1 * os.path.getsize(source)
    assert bitwise_equal(outputs(gm, args, kwargs), outputs(graphprobe.load(path), args, kwargs))
    moved = source.rename(path.with_name("moved.safetensors"))
    with pytest.raises(FxFileError, match=r"model\.safetensors, which is not there.*weights_from"):
        graphprobe.load(path)
    found = outputs(graphprobe.load(path, weights_from=moved), args, kwargs)
    assert bitwise_equal(outputs(gm, args, kwargs), found)
    save_file({**state, "lm_head.weight": state["lm_head.weight"] * 1.001}, source)
    with pytest.raises(FxFileError, match=r"'lm_head\.weight'.*is not the one"):
        graphprobe.load(path)
    assert graphprobe.view(graphprobe.load(path, weights=False)) == graphprobe.view(gm)


def test_a_reference_that_fits_nothing_is_refused(path: Path) -> None:
    source = path.with_name("other.safetensors")
    save_file({"weight": torch.ones(3)}, source)
    with pytest.raises(FxFileError, match=r"none of the graph's tensors"):
        graphprobe.save(captured("mlp"), path, weights="reference", weights_from=[source])
    with pytest.raises(FxFileError, match="go together"):
        graphprobe.save(captured("mlp"), path, weights="reference")
    source.write_bytes(b"no tensors here")
    with pytest.raises(FxFileError, match="not a readable safetensors file"):
        graphprobe.save(captured("mlp"), path, weights="reference", weights_from=source)


@pytest.mark.parametrize("when", ["saving", "loading"])
def test_a_graph_without_weights_can_be_shown_but_not_run(when: str, path: Path) -> None:
    model, _, kwargs = tiny("qwen3")
    gm = captured("qwen3")
    graphprobe.save(gm, path, kwargs=kwargs, weights=None if when == "saving" else "store")
    loaded = graphprobe.load(path, weights=when == "saving")
    assert graphprobe.view(loaded) == graphprobe.view(gm)
    assert not graphprobe.lint(loaded)
    stored = fxfile.load_inputs(path)
    assert stored is not None
    with pytest.raises(OperatorError, match=r"without the values of \d+ weights"):
        loaded(*stored[0], **stored[1])
    if when == "saving":
        small = sum(parameter.nbytes for parameter in model.parameters()) / 10
        assert os.path.getsize(path) < small


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_inputs_of_every_shape_come_back(path: Path) -> None:
    args = (torch.randn(2, 3), [1, 2.5, None, "text", (True, torch.tensor(3, dtype=torch.int8))])
    kwargs = {"flag": False, "nested": {"a": torch.zeros(0, 4), "b": {"c": float("inf")}}}
    graphprobe.save(captured("conv"), path, args=args, kwargs=kwargs)
    found = fxfile.load_inputs(path)
    assert found is not None
    assert same_bits(found[0][0], args[0])
    assert found[0][1][:4] == args[1][:4]
    assert found[0][1][4][0] is True
    assert same_bits(found[1]["nested"]["a"], kwargs["nested"]["a"])
    assert found[1]["nested"]["b"] == {"c": float("inf")}


def test_a_cache_is_an_input_like_another(path: Path) -> None:
    model, _, kwargs = tiny("llama")
    with torch.no_grad():
        first = model(**{**kwargs, "use_cache": True})
    inputs = {"input_ids": kwargs["input_ids"][:, :1], "past_key_values": first.past_key_values, "use_cache": True}
    gm = graphprobe.capture(model, (), inputs)
    graphprobe.save(gm, path, kwargs=inputs)
    stored = fxfile.load_inputs(path)
    assert stored is not None
    assert type(stored[1]["past_key_values"]) is type(first.past_key_values)
    assert bitwise_equal(outputs(gm, (), inputs), outputs(graphprobe.load(path), *stored))


def test_reading_the_inputs_reads_nothing_else(path: Path) -> None:
    _, args, kwargs = tiny("llama")
    graphprobe.save(captured("llama"), path, args=args, kwargs=kwargs)
    with zipfile.ZipFile(path) as file:
        weight = file.getinfo("tensors.safetensors").header_offset + 60_000
    data = bytearray(path.read_bytes())
    data[weight] ^= 255
    path.write_bytes(data)
    stored = fxfile.load_inputs(path)
    assert stored is not None
    assert torch.equal(stored[1]["input_ids"], kwargs["input_ids"])
    with pytest.raises(FxFileError, match="are not those that were written"):
        graphprobe.load(path)


def test_no_inputs_and_impossible_inputs(path: Path) -> None:
    graphprobe.save(captured("conv"), path)
    assert fxfile.load_inputs(path) is None
    with pytest.raises(FxFileError, match=r"builtins\.object.*register_pytree_node"):
        graphprobe.save(captured("conv"), path, args=(object(),))


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError, RuntimeError])
def test_a_file_appears_whole_or_not_at_all(
    interruption: type[BaseException], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphprobe.save(captured("mlp"), path)
    old = path.read_bytes()

    def interrupted(*_: Any, **__: Any) -> None:
        raise interruption("stop")

    monkeypatch.setattr(archive, "_write_tensors", interrupted)
    with pytest.raises(FxFileError if interruption is OSError else interruption):
        graphprobe.save(captured("conv"), path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == old


def test_saving_what_is_no_graph_and_where_there_is_no_folder(path: Path) -> None:
    with pytest.raises(FxFileError, match=r"cannot save a Linear.*graphprobe\.capture"):
        graphprobe.save(nn.Linear(2, 2), path)  # type: ignore[arg-type]
    with pytest.raises(FxFileError, match="there is no folder"):
        graphprobe.save(captured("mlp"), path.parent / "nowhere" / "x.fx")
    with pytest.raises(FxFileError, match="choose 'store', 'reference' or None"):
        graphprobe.save(captured("mlp"), path, weights="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TEXT)
def test_the_graph_takes_little_room(name: str, path: Path) -> None:
    graphprobe.save(captured(name), path, weights=None)
    nodes = len(captured(name).graph.nodes)
    assert os.path.getsize(path) < 120 * nodes  # bytes; the metadata is compressed and says nothing twice


def test_the_bytes_of_a_tensor_live_as_long_as_they_are_looked_at() -> None:
    """What lies on a GPU is copied to be written; nobody else holds the copy."""
    seen = []
    for number in range(50):
        held = torch.full((64,), number, dtype=torch.uint8)
        gone = weakref.ref(held)
        seen.append(archive.buffer(held))
        del held
        assert gone() is not None
    assert [set(part) for part in seen] == [{number} for number in range(50)]
    seen.clear()
    assert gone() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_was_saved_from_a_gpu_is_read_again(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.nn.Linear(8, 8) for _ in range(40)]
    for layer in layers:
        layer.weight.data.normal_(generator=generator)
    model = torch.nn.Sequential(*layers).eval()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 8, device="cuda")
    gm = graphprobe.capture(model.cuda(), (x,))
    graphprobe.save(gm, tmp_path / "g.fx", args=(x,))
    found = graphprobe.load(tmp_path / "g.fx")
    assert all(torch.equal(found.get_parameter(name).cpu(), value) for name, value in wanted.items())

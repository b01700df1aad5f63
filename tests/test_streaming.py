"""Weights that stay in files: what runs on them is the same, and few of them are in memory at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import graphprobe
from graphprobe import carrying, cli, devices
from graphprobe.errors import FxFileError, InputError
from graphprobe.fxfile import mapping
from graphprobe.streaming import Stream, key_of
from graphprobe.taps.probe import Probe

LAYERS, WIDTH = 4, 192
LAYER = WIDTH * WIDTH * 4


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):  # [tokens, WIDTH]
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tower(torch.nn.Module):
    """Its first and its last operation share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(WIDTH, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.register_buffer("calls", torch.zeros(()), persistent=True)

    def forward(self, ids):  # [tokens] int64
        self.calls.add_(1)
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return x @ self.table.weight.t()


def tower(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return Tower().eval()


IDS = torch.arange(24) % WIDTH


@pytest.fixture(scope="module", params=["stored", "referenced"])
def path(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    model = tower()
    gm = graphprobe.capture(model, (IDS,))
    out = str(folder / "tower.fx")
    if request.param == "stored":
        graphprobe.save(gm, out, args=(IDS,))
    else:
        save_file({name: value.detach() for name, value in model.state_dict().items()}, folder / "w.safetensors")
        graphprobe.save(gm, out, args=(IDS,), weights="reference", weights_from=folder / "w.safetensors")
    return out


def large(gm: torch.fx.GraphModule) -> list[torch.Tensor]:
    return [p for p in gm.parameters() if p.numel() * p.element_size() >= LAYER]


def test_a_mapped_graph_computes_what_the_loaded_one_does(path):
    gm, mapped = graphprobe.load(path), graphprobe.load(path, mapped=True)
    assert torch.equal(gm(IDS), mapped(IDS))
    assert len(large(mapped)) == 2 * LAYERS + 1
    for value in large(mapped):
        place = mapping.place_of(value)
        assert place is not None
        with open(place.file.path, "rb") as file:
            file.seek(place.offset)
            assert file.read(64) == value.detach().numpy().tobytes()[:64]


def test_what_is_mapped_twice_is_one_memory(path):
    first, second = graphprobe.load(path, mapped=True), graphprobe.load(path, mapped=True)
    assert [key_of(x) for x in large(first)] == [key_of(y) for y in large(second)]


def test_buffers_are_not_mapped_and_small_weights_are_read(path):
    mapped = graphprobe.load(path, mapped=True)
    others = [t for t in (*mapped.parameters(), *mapped.buffers()) if t.numel() * t.element_size() < LAYER]
    assert others and all(mapping.place_of(t) is None for t in others)


def test_taps_of_a_streamed_graph_are_those_of_the_resident_one(path):
    plain = graphprobe.instrument(graphprobe.load(path))
    probe = graphprobe.instrument(graphprobe.load(path, mapped=True), memory="stream", device="cpu")
    for _ in range(2):
        assert torch.equal(plain(IDS), probe(IDS))
        assert plain.taps == probe.taps
    assert probe.stream.bytes == 2 * (2 * LAYERS + 1) * LAYER
    assert probe.stream.present == 0


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_run_holds_the_weights_in_use_and_those_that_come_next(path, ahead):
    gm = graphprobe.load(path, mapped=True)
    stream = Stream("cpu", ahead * LAYER)
    probe = Probe(gm, stream=stream)
    assert torch.equal(graphprobe.load(path)(IDS), probe(IDS))
    assert stream.peak <= (ahead + 2) * LAYER
    assert stream.bytes == (2 * LAYERS + 2) * LAYER  # what is used at both ends comes twice


def test_a_run_that_breaks_off_spoils_nothing(path):
    probe = graphprobe.instrument(graphprobe.load(path, mapped=True), memory="stream", device="cpu")
    expected = probe(IDS)
    with pytest.raises(IndexError):
        probe(IDS + WIDTH)
    assert torch.equal(expected, probe(IDS))


@pytest.mark.parametrize("exact", ["auto", "always"])
def test_a_streamed_diff_says_what_a_resident_one_says(path, exact, tmp_path):
    changed = graphprobe.load(path)
    with torch.no_grad():
        dict(changed.named_parameters())["blocks.2.up.weight"][3, 7] += 0.5
    after = tmp_path / "after.fx"
    graphprobe.save(changed, after, args=(IDS,))
    resident = graphprobe.diff(path, after, exact=exact)
    streamed = graphprobe.diff(path, after, exact=exact, memory="stream", device="cpu")
    assert resident.verdict == streamed.verdict == "semantic"
    assert streamed.first.module_path == "blocks.2.up"
    assert resident.findings == streamed.findings
    assert graphprobe.diff(path, path, exact=exact, memory="stream", device="cpu").verdict == "identical"


def test_a_model_in_memory_can_be_streamed_too():
    model = tower()
    assert graphprobe.diff(model, tower(), (IDS,), memory="stream", device="cpu").verdict == "identical"
    assert torch.equal(graphprobe.instrument(model, memory="stream", device="cpu")(IDS), model(IDS))


def test_the_command_line_streams_too(path, capsys):
    assert cli.main(["tap", path, "--memory", "stream", "--device", "cpu"]) == 0
    streamed = capsys.readouterr().out
    assert cli.main(["tap", path]) == 0
    assert streamed == capsys.readouterr().out and "embedding" in streamed
    assert cli.main(["diff", path, path, "--memory", "stream", "--device", "cpu"]) == 0
    assert "identical" in capsys.readouterr().out


class Shared(torch.nn.Module):
    """Layers that use few weights in turn."""

    def __init__(self, distinct: int, layers: int) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(distinct))
        self.layers = layers

    def forward(self, x):
        for layer in range(self.layers):
            weight = self.weights[layer % len(self.weights)]
            x = torch.relu(x @ weight) @ weight
        return x


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_a_weight_that_is_used_again_soon_is_brought_once(tmp_path, ahead):
    x = torch.ones(2, WIDTH)
    graphprobe.save(graphprobe.capture(Shared(3, 12).eval(), (x,)), tmp_path / "m.fx", args=(x,))
    probe = Probe(graphprobe.load(tmp_path / "m.fx", mapped=True), stream=Stream("cpu", ahead * LAYER))
    assert torch.equal(probe(x), graphprobe.load(tmp_path / "m.fx")(x))
    far_apart = ahead < 2  # two others lie between two layers that share
    assert probe.stream.bytes == (12 if far_apart else 3) * LAYER
    assert probe.stream.peak <= (ahead + 2 if far_apart else 3) * LAYER


class Held(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return x @ self.weight, self.weight * 2


def test_strided_and_shared_weights_come_as_they_are(tmp_path):
    model = Held()
    model.weight = torch.nn.Parameter(torch.randn(WIDTH, 2 * WIDTH)[:, ::2])
    gm = graphprobe.capture(model, (torch.ones(2, WIDTH),))
    graphprobe.save(gm, tmp_path / "held.fx", args=(torch.ones(2, WIDTH),))
    mapped = graphprobe.load(tmp_path / "held.fx", mapped=True)
    probe = graphprobe.instrument(mapped, memory="stream", device="cpu")
    for found, expected in zip(probe(torch.ones(2, WIDTH)), gm(torch.ones(2, WIDTH)), strict=True):
        assert torch.equal(found, expected)


def test_wrong_words_are_told():
    with pytest.raises(InputError, match="'resident' or 'stream'"):
        graphprobe.instrument(tower(), memory="all")
    with pytest.raises(InputError, match="memory"):
        graphprobe.instrument(tower(), device="cpu")
    with pytest.raises(InputError, match="no values to compare"):
        graphprobe.diff(tower(), tower(), (IDS,), memory="stream", device="meta")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff" * 8,
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x40\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(64),
    ],
)
def test_damaged_weights_are_told(tmp_path, header):
    (tmp_path / "w.safetensors").write_bytes(header)
    with pytest.raises(FxFileError, match=r"w\.safetensors"):
        mapping.entries(str(tmp_path / "w.safetensors"))


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1 << 26, 1 << 15])
def test_a_gpu_computes_the_same_with_weights_that_come(path, stage, monkeypatch):
    monkeypatch.setattr(carrying, "_STAGE", stage)
    monkeypatch.setattr(carrying, "_PIECE", stage // 4)
    resident = graphprobe.instrument(devices.moved(graphprobe.load(path), torch.device("cuda")))
    expected, taps = resident(IDS.cuda()), resident.taps
    stream = Stream("cuda", 2 * LAYER)
    probe = Probe(graphprobe.load(path, mapped=True), stream=stream)
    for _ in range(3):
        found = probe(IDS)
        assert torch.equal(expected, found) and found.is_cuda
        assert probe.taps[1:] == taps[1:]  # the first one counts the calls
    assert stream.peak <= 4 * LAYER and stream.present == 0


@pytest.mark.gpu
@pytest.mark.parametrize("exact", ["auto", "always"])
def test_a_gpu_finds_the_same_with_weights_that_come(path, exact, tmp_path):
    changed = graphprobe.load(path)
    with torch.no_grad():
        dict(changed.named_parameters())["blocks.2.up.weight"][3, 7] += 0.5
    graphprobe.save(changed, tmp_path / "after.fx", args=(IDS,))
    resident = graphprobe.diff(path, tmp_path / "after.fx", exact=exact, device="cuda")
    streamed = graphprobe.diff(path, tmp_path / "after.fx", exact=exact, device="cuda", memory="stream")
    assert resident.verdict == streamed.verdict == "semantic"
    assert streamed.first.module_path == "blocks.2.up"
    model = tower().cuda()  # one side on the device, the other in its file
    assert graphprobe.diff(model, path, (IDS.cuda(),), device="cuda", memory="stream").verdict == "identical"


@pytest.mark.gpu
def test_a_streamed_gpu_run_takes_little_memory(tmp_path):
    model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, bias=False) for _ in range(24))).eval()
    x = torch.ones(2, 4096)
    graphprobe.save(graphprobe.capture(model, (x,)), tmp_path / "m.fx", args=(x,))
    one = 4096 * 4096 * 4
    probe = Probe(graphprobe.load(tmp_path / "m.fx", mapped=True), stream=Stream("cuda", 2 * one))
    probe(x)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    for _ in range(2):
        probe(x)
    assert torch.cuda.max_memory_allocated() - base <= 6 * one


_GROWTH = """
import resource, sys, torch, graphprobe
from graphprobe.streaming import Stream
from graphprobe.taps.probe import Probe
torch.set_num_threads(1)
gm = graphprobe.load(sys.argv[1], mapped=True)
x = torch.ones(2, 1024)
small = graphprobe.instrument(graphprobe.load(sys.argv[2], mapped=True), memory="stream", device="cpu")
small(x)
graphprobe.diff(sys.argv[2], sys.argv[2], (x,), memory="stream", device="cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
probe = Probe(gm, stream=Stream("cpu", 8 << 20))
probe(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what counts as resident differs")
def test_a_model_larger_than_the_memory_it_takes(tmp_path):
    paths = []
    for layers in (2, 48):
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(layers))).eval()
        paths.append(str(tmp_path / f"{layers}.fx"))
        graphprobe.save(graphprobe.capture(model, (torch.ones(2, 1024),)), paths[-1], args=(torch.ones(2, 1024),))
    weights = Path(paths[1]).stat().st_size
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    out = subprocess.run(
        [sys.executable, "-c", _GROWTH, paths[1], paths[0]], capture_output=True, text=True, check=True, env=environment
    )
    assert int(out.stdout) * 1024 < weights / 3

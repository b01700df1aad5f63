"""``graphprobe plot``: which layer parts, which block adds nothing, in words, JSON and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graphprobe
from fx_tools import captured
from graphprobe import cli
from graphprobe.errors import InputError
from graphprobe.hidden import START, hidden_states
from graphprobe.pipeline import Pipeline
from models import tiny


def changed(name: str, scale: float, *parts: str) -> tuple[torch.fx.GraphModule, tuple[Any, ...], dict[str, Any]]:
    """Capture a model of the corpus whose weights with one of `parts` in their names are scaled."""
    model, args, kwargs = tiny(name)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if any(part in path for part in parts):
                weight.mul_(scale)
    return graphprobe.capture(model, args, kwargs), args, kwargs


@pytest.mark.parametrize(
    ("name", "layers"),
    [("llama", "model.layers.{}"), ("gpt2", "transformer.h.{}"), ("bert", "encoder.layer.{}")],
)
def test_the_states_are_what_the_layers_return(name: str, layers: str) -> None:
    model, args, kwargs = tiny(name)
    found = hidden_states(captured(name), captured(name), args, kwargs)
    assert found.names == (START, layers.format(0), layers.format(1)) and found.left_out == ()
    wanted = model(*args, **kwargs, output_hidden_states=True).hidden_states
    # the last one of transformers lies behind the final norm
    for got, state in zip(found.before[:2], wanted[:2], strict=True):
        assert torch.equal(torch.from_numpy(got).to(state.dtype), state)
    assert len(found.tokens) == kwargs["input_ids"].numel()


def test_layers_are_paired_through_a_fusion_that_took_their_last_addition() -> None:
    gm, (_, args, kwargs) = captured("llama"), tiny("llama")
    run = Pipeline.parse("fuse_rmsnorm,fuse_add_rmsnorm").run(gm)
    found = hidden_states(gm, run.gm, args, kwargs, events=run.events)
    # the last addition went into the final norm, which hands on no sum: that value exists nowhere in after
    assert found.names == (START, "model.layers.0") and found.left_out == ("model.layers.1",)
    for before, after in zip(found.before, found.after, strict=True):
        assert abs(before - after).max() < 1e-4


def test_other_modules_can_be_asked_for() -> None:
    _, args, kwargs = tiny("llama")
    found = hidden_states(captured("llama"), captured("llama"), args, kwargs, states="*.mlp")
    assert found.names == ("model.layers.0.mlp", "model.layers.1.mlp")
    with pytest.raises(InputError, match="matches no module"):
        hidden_states(captured("llama"), captured("llama"), args, kwargs, states="*.mlpx")
    _, args, kwargs = tiny("conv")
    with pytest.raises(InputError, match="no numbered layers"):
        hidden_states(captured("conv"), captured("conv"), args, kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions of a Llama: one as it is, one whose second layer adds nothing, one with a wrong projection."""
    path = tmp_path_factory.mktemp("plot")
    versions = {"before": (1.0, "-"), "nothing": (0.0, "1.self_attn.o_proj", "1.mlp.down_proj"), "off": (3.0, "1.mlp")}
    for name, (scale, *parts) in versions.items():
        gm, args, kwargs = changed("llama", scale, *parts)
        graphprobe.save(gm, path / f"{name}.fx", args=args, kwargs=kwargs)
    return path


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_a_block_that_adds_nothing_is_said_in_the_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", "before.fx", "nothing.fx"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("model.layers.1 adds nothing in after: it changes the state by 0,")
    assert cli.main(["plot", "before.fx", "nothing.fx", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [layer["adds_nothing"] for layer in facts["layers"]] == ["", "", "after"]


def test_the_layer_that_parts_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", "before.fx", "off.fx"]) == 0
    assert capsys.readouterr().out.startswith("the hidden states part in model.layers.1, at token ")
    assert cli.main(["plot", "before.fx", "before.fx"]) == 0
    assert "3 layers agree: the largest relative error is 0" in capsys.readouterr().out


def test_kept_tensors_are_compared_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("before", "off"):
        assert cli.main(["tap", f"{name}.fx", "--keep", "model.layers.?", "-o", f"{name}.safetensors"]) == 0
    capsys.readouterr()
    assert cli.main(["plot", "before.safetensors", "off.safetensors"]) == 0
    assert "part in model.layers.1" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["tokens", "steps", "histogram", "heatmap"])
def test_each_plot_is_written(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["plot", "before.fx", "nothing.fx", "--kind", kind, "-o", f"{kind}.png"]) == 0
    assert f"wrote {kind}.png" in capsys.readouterr().out
    assert Path(f"{kind}.png").read_bytes().startswith(b"\x89PNG")


TROUBLE = {
    "one of each": (["before.fx", "before.safetensors"], "two .fx files or two .safetensors"),
    "no file": (["before.fx", "nothing_here.fx"], "nothing_here.fx"),
    "no module": (["before.fx", "off.fx", "--states", "*.mpl"], "matches no module"),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_trouble_is_one_sentence(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = TROUBLE[case]
    assert cli.main(["plot", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and words in printed.err and "Traceback" not in printed.err

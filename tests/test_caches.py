"""Models that return their key-value cache: captured, run, saved and compared with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

import graphprobe
from models import tiny


def with_cache(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    if name != "t5":
        model, _, kwargs = tiny(name)
        return model, {**kwargs, "use_cache": True}
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    tokens = torch.randint(1, 64, (2, 8))
    kwargs = {"input_ids": tokens, "decoder_input_ids": tokens[:, :4], "use_cache": True}
    return transformers.T5ForConditionalGeneration(config).eval(), kwargs


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])  # mixtral writes into its tensors, t5 returns two caches
def test_a_model_that_returns_its_cache(name: str, tmp_path: Any) -> None:
    model, kwargs = with_cache(name)
    gm = graphprobe.capture(model, (), kwargs)
    with torch.no_grad():
        expected, returned = model(**kwargs), gm(**kwargs)
    assert type(returned) is type(expected)
    assert type(returned.past_key_values) is type(expected.past_key_values)
    assert len(tensors(returned)) == len(tensors(expected)) > 2
    graphprobe.save(gm, tmp_path / "cached.fx", args=(), kwargs=kwargs)
    with torch.no_grad():
        loaded = graphprobe.load(tmp_path / "cached.fx")(**kwargs)
    assert all(map(torch.equal, tensors(returned), tensors(loaded)))
    report = graphprobe.diff(gm, tmp_path / "cached.fx", (), kwargs)
    assert report.verdict == "identical"
    assert len(report.outputs) == len(tensors(returned))
    probe = graphprobe.instrument(model)
    assert all(map(torch.equal, tensors(returned), tensors(probe(**kwargs))))

"""Models that return their key-value cache: captured, run, saved and compared with it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

import graphprobe
from graphprobe.caches import register_caches
from graphprobe.fxfile import trees
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


# --- recurrent layers -------------------------------------------------------------------------------------------


def recurrent(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build a tiny model whose cache holds states that are no keys and values; jamba's holds both kinds of layers."""
    import transformers

    torch.manual_seed(0)
    if name == "mamba2":
        sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 4, "chunk_size": 4}
        config = transformers.Mamba2Config(vocab_size=64, num_hidden_layers=1, **sizes)
        model = transformers.Mamba2ForCausalLM(config)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
        periods = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1}
        states = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
        config = transformers.JambaConfig(vocab_size=64, num_hidden_layers=2, **sizes, **periods, **states)
        model = transformers.JambaForCausalLM(config)
    return model.eval(), {"input_ids": torch.randint(1, 64, (1, 5)), "use_cache": True}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba2", "jamba"])
def test_a_cache_of_recurrent_states_comes_out_and_goes_in(name: str, tmp_path: Any) -> None:
    model, kwargs = recurrent(name)
    gm = graphprobe.capture(model, (), kwargs)
    with torch.no_grad():
        expected, returned = model(**kwargs), gm(**kwargs)
    path = "cache_params" if "cache_params" in returned else "past_key_values"
    assert [type(x) for x in expected[path].layers] == [type(x) for x in returned[path].layers]
    assert all(map(torch.equal, tensors(expected), tensors(returned)))

    step = {"input_ids": kwargs["input_ids"][:, :1], "use_cache": True, path: returned[path]}
    one = graphprobe.capture(model, (), copy.deepcopy(step))
    with torch.no_grad():
        expected, returned = model(**copy.deepcopy(step)), one(**copy.deepcopy(step))
    assert all(map(torch.equal, tensors(expected), tensors(returned)))
    graphprobe.save(one, tmp_path / "step.fx", args=(), kwargs=copy.deepcopy(step))
    report = graphprobe.diff(tmp_path / "step.fx", tmp_path / "step.fx")
    assert report.verdict == "identical" and len(report.outputs) == len(tensors(returned))


def filled() -> Any:
    from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

    cache = DynamicCache()
    cache.layers = [LinearAttentionLayer(number_of_states=2), DynamicLayer(), LinearAttentionLayer()]
    cache.layers[0].update_conv_state(torch.randn(1, 3, 4), state_idx=1)
    cache.layers[0].update_recurrent_state(torch.randn(1, 3, 2))
    cache.layers[1].update(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
    return cache  # the last layer is empty


def test_recurrent_states_are_leaves_and_all_else_is_structure() -> None:
    cache = filled()
    register_caches()
    leaves, spec = pytree.tree_flatten(cache)
    assert len(leaves) == 4 and all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    notes: list[str] = []
    assert trees.load(trees.dump(spec), notes) == spec and not notes
    again = pytree.tree_unflatten(leaves, spec)
    assert pytree.tree_flatten(again)[1] == spec
    for mine, theirs in zip(cache.layers, again.layers, strict=True):
        assert type(mine) is type(theirs) and vars(mine).keys() == vars(theirs).keys()
        for name, value in vars(mine).items():
            assert all(map(_same, pytree.tree_leaves(value), pytree.tree_leaves(getattr(theirs, name)))), name
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(cache)[0]]
    assert len(set(paths)) == 4 and paths[0] == "[0]['conv_states'][1]"


def _same(x: Any, y: Any) -> bool:
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_a_structure_names_layers_of_caches_alone() -> None:
    cache = filled()
    register_caches()
    leaves, spec = pytree.tree_flatten(cache)
    told = json.dumps(trees.dump(spec)).replace("LinearAttentionLayer", "DynamicCache")
    with pytest.raises(ValueError, match="no layer of caches"):
        pytree.tree_unflatten(leaves, trees.load(json.loads(told), []))


def test_what_a_layer_holds_and_cannot_be_written_is_named() -> None:
    cache = filled()
    register_caches()
    cache.layers[0].helper = object()
    with pytest.raises(TypeError, match=r"LinearAttentionLayer\.helper of the cache is a object"):
        pytree.tree_flatten(cache)

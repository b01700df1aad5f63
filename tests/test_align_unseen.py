"""Architectures that nothing was tuned to: captured twice, reordered, stripped of names, with a defect planted."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import graphprobe
from corpus import mutations, rewrites

# torch warns about its own pytree classes when it copies a program
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
_IDS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE: dict[str, Any] = _IDS | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = _BASE | {"num_key_value_heads": 2}
_OLD = _IDS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
#: Class of transformers, its configuration, and how its attention is captured the second time.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "granite": ("GraniteForCausalLM", _GROUPED, "sdpa"),
    "stablelm": ("StableLmForCausalLM", _GROUPED, "sdpa"),
    "glm": ("GlmForCausalLM", _GROUPED | {"head_dim": 16}, "sdpa"),
    "persimmon": ("PersimmonForCausalLM", _BASE, "sdpa"),
    "gptj": ("GPTJForCausalLM", _OLD | {"rotary_dim": 8}, "eager"),
    "codegen": ("CodeGenForCausalLM", _OLD | {"rotary_dim": 8}, "eager"),
    "mpt": ("MptForCausalLM", _IDS | {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, "eager"),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        _GROUPED
        | {"num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
        "sdpa",
    ),
}
QUICK = ("gptj",)


def model(name: str, attention: str) -> torch.nn.Module:
    """Build one architecture with random weights, the same every time."""
    transformers = pytest.importorskip("transformers")
    kind, sizes, _ = MODELS[name]
    config = getattr(transformers, kind.removesuffix("ForCausalLM") + "Config")(**sizes)
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: torch.nn.Module = getattr(transformers, kind)(config).eval()
        for parameter in made.parameters():
            noise = torch.randn_like(parameter)
            one = parameter.dim() == 1
            parameter.data = parameter.data + 0.3 * noise if one else noise * parameter[0].numel() ** -0.5
    return made


def inputs() -> dict[str, Any]:
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def twice(name: str) -> tuple[GraphModule, GraphModule]:
    kwargs = inputs()
    return tuple(graphprobe.capture(model(name, a), (), kwargs) for a in ("eager", MODELS[name][2]))  # type: ignore[return-value]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_a_stripped_and_reordered_second_capture_is_rounding_and_resolved(name: str) -> None:
    before, after = twice(name)
    report = graphprobe.diff(before, rewrites.stripped(rewrites.shuffled(after), "values"), (), inputs())
    assert report.verdict in ("identical", "rounding") and report.coverage.resolution == 1.0, report.findings


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_strict_and_core_aten_forms_without_names_are_rounding(name: str) -> None:
    kwargs = inputs()
    before = graphprobe.capture(model(name, "eager"), (), kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo about what transformers does on the side
        strict = torch.export.export(model(name, "eager"), (), kwargs, strict=True)
    core = torch.export.export(model(name, "eager"), (), kwargs, strict=False).run_decompositions()
    for other in (strict, core):
        report = graphprobe.diff(before, rewrites.stripped(graphprobe.capture(other), "values"), (), kwargs)
        assert report.verdict in ("identical", "rounding") and report.coverage.resolution == 1.0, report.findings


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_defect_planted_in_a_stripped_graph_is_the_one_finding(name: str, seed: int) -> None:
    before, after = twice(name)
    mutant = rewrites.planted(after, 77 * seed + len(name))
    assert mutant is not None
    bare = rewrites.stripped(mutations.fork(mutant.gm), "values")
    names = dict(zip((n.name for n in bare.graph.nodes), (n.name for n in mutant.gm.graph.nodes), strict=True))
    report = graphprobe.diff(before, bare, (), inputs())
    found = [f for f in report.findings if f.kind not in ("rounding", "identical")]
    assert len(found) == 1 and found[0].located, (mutant.change, mutant.nodes, found)
    # what was dropped is met in what used it
    drawn = [n for n in after.graph.nodes if n.name in mutant.nodes]
    places = {*mutant.nodes, *(user.name for n in drawn for user in n.users)}
    assert {names.get(n, n) for n in found[0].after} & places, (mutant.change, mutant.nodes, found)

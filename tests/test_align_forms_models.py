"""Architectures of transformers in other input forms: padded, a row of a batch, in chunks with a cache.

Honest pairs are the same, and a defect that only shows in one form is named where it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphprobe
from graphprobe import api
from graphprobe.records import Report

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
WORDS, TOKENS, PADDED = 96, 11, 17
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BASE: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "max_position_embeddings": 64, "num_hidden_layers": 2,
}  # fmt: skip
_GROUPED = _BASE | {"num_key_value_heads": 2}
_WINDOW = _GROUPED | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
_LAYERS = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2ForCausalLM", _WINDOW),
    "phi3": ("Phi3ForCausalLM", _GROUPED),
    "mixtral": ("MixtralForCausalLM", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", _GROUPED | _MOE),
    "gpt_neox": ("GPTNeoXForCausalLM", _BASE),
    "opt": ("OPTForCausalLM", _LAYERS | {"ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}),
    "bloom": ("BloomForCausalLM", {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconForCausalLM", _LAYERS | {"num_attention_heads": 4, "max_position_embeddings": 64}),
    "stablelm": ("StableLmForCausalLM", _GROUPED),
    "cohere": ("CohereForCausalLM", _GROUPED),
    "olmo2": ("Olmo2ForCausalLM", _GROUPED),
    "bert": ("BertModel", _BASE),
    "deberta_v2": ("DebertaV2Model", _BASE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
}
DECODERS = [name for name, (kind, _) in MODELS.items() if kind.endswith("ForCausalLM")]
QUICK = {("bloom", "row"), ("opt", "left")}


def cases(*pairs: tuple[str, str]) -> list[Any]:
    return [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow, id="-".join(pair)) for pair in pairs]


def model(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    kind, sizes = MODELS[name]
    config = getattr(transformers, kind.removesuffix("ForCausalLM").removesuffix("Model") + "Config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = getattr(transformers, kind)(config(**_SPECIAL, **sizes)).eval()
        for path, parameter in made.named_parameters():
            if parameter.dim() == 1:
                near_one = path.endswith("weight")
                nn.init.uniform_(parameter, 0.5, 1.5) if near_one else nn.init.normal_(parameter, std=0.1)
            else:
                parameter.data *= 4  # 0.02 would make attention uniform
    return made


def prompt(seed: int = 0, rows: int = 1, count: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, WORDS, (rows, count), generator=torch.Generator().manual_seed(seed))


def called(made: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    takes = inspect.signature(made.forward).parameters
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "use_cache" in takes:
        given["use_cache"] = False
        if "position_ids" in takes:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return given


def padded(ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ones, more = torch.ones_like(ids), (PADDED - TOKENS, 0) if side == "left" else (0, PADDED - TOKENS)
    return nn.functional.pad(ids, more), nn.functional.pad(ones, more)


def in_form(form: str, ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask: padded on one side, or as row 2 of a batch with rows of other lengths."""
    longer, mask = padded(ids, side)
    if form in ("left", "right"):
        return longer, mask
    batch, seen = prompt(2, 4, PADDED), torch.ones(4, PADDED, dtype=torch.long)
    batch[2], seen[2] = longer[0], mask[0]
    batch[0, :3], seen[0, :3] = 0, 0
    return batch, seen


def in_another_form(before: nn.Module, after: nn.Module, form: str) -> Report:
    ids = prompt()
    # encoders count positions from the first place
    side = form if form in ("left", "right") else "left" if hasattr(before, "lm_head") else "right"
    mine = called(before, ids, torch.ones_like(ids))
    theirs = called(after, *in_form(form, ids, side))
    return graphprobe.diff(before, after, (), mine, after_args=(), after_kwargs=theirs)


FORMS = [(name, form) for name in MODELS for form in ("right", "left", "row") if name in DECODERS or form != "left"]


@pytest.mark.parametrize(("name", "form"), cases(*FORMS))
def test_the_form_of_the_prompt_makes_no_difference(name: str, form: str) -> None:
    made = model(name)
    report = in_another_form(made, made, form)
    assert report.verdict in ("identical", "rounding"), report.findings
    assert report.coverage.resolution >= 0.9 and report.coverage.evidence["slice"] > 15
    if name == "mixtral":  # tokens that are gathered for their experts, too: of more tokens, in another order
        gathered = {c.before for c in report.claims if "places of" in c.view}
        assert any("grouped_mm" in n for n in gathered) and report.coverage.resolution == 1.0
        # how many tokens an expert has is another number by right
        assert not any("histc" in c.before for c in report.claims)


@pytest.mark.slow
def test_what_counts_other_tokens_is_explained() -> None:
    made, ids = model("mixtral"), prompt()
    calls = [called(made, *given) for given in ((ids, torch.ones_like(ids)), padded(ids, "left"))]
    sides = [graphprobe.capture(made, (), given) for given in calls]
    said = api.explain(*sides, "getitem_7", (), calls[0], after_args=(), after_kwargs=calls[1])
    assert "it holds indices or counts of tokens, and the sides have not as many" in said
    said = api.explain(*sides, "linear_3", (), calls[0], after_args=(), after_kwargs=calls[1])
    assert "claimed: linear_3 (aten.linear.default), shown as dimension 1: 6 to 16 of 17" in said


# --- defects that bite with padding -------------------------------------------------------------------------------


def forget_mask(made: nn.Module) -> str:
    """Let the first attention see padding."""
    path, attention = next((n, m) for n, m in made.named_modules() if n.endswith(("self_attn", "attention")))

    def unmasked(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        causal = torch.ones(mask.shape[-2:], dtype=torch.bool).tril().expand(mask.shape)
        low = torch.zeros(mask.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": causal if mask.dtype == torch.bool else low}

    attention.register_forward_pre_hook(unmasked, with_kwargs=True)
    return path


def count_padding(made: nn.Module) -> str:
    """Let positions be counted from the first place, padded or not."""
    path, table = next((n, m) for n, m in made.named_modules() if n.endswith("embed_positions"))

    def counted(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": torch.arange(kwargs["position_ids"].shape[1])[None]}

    table.register_forward_pre_hook(counted, with_kwargs=True)
    return path


MASKS = [(name, "left") for name in ("gemma2", "phi3", "gpt_neox", "opt", "stablelm", "olmo2")]


@pytest.mark.parametrize(("name", "form"), cases(*MASKS))
def test_a_mask_that_is_forgotten_is_found_in_the_attention_that_forgot_it(name: str, form: str) -> None:
    after = model(name)
    path = forget_mask(after)
    report = in_another_form(model(name), after, form)
    found = [f for f in report.findings if f.kind == "semantic"]
    assert len(found) == 1 and found[0].module_path == path, found
    # what lies below it is claimed all the same, and holds
    assert report.coverage.resolution >= 0.9


@pytest.mark.slow
def test_positions_that_count_padding_are_found_where_they_are_read() -> None:
    after = model("opt")
    path = count_padding(after)
    report = in_another_form(model("opt"), after, "left")
    found = [f for f in report.findings if f.kind == "semantic"]
    assert len(found) == 1 and found[0].module_path == path and found[0].located, found
    assert report.coverage.resolution == 1.0


# --- chunks with a cache ------------------------------------------------------------------------------------------

Spoil = Callable[[Any], None]


class Chunked(nn.Module):
    """A model that takes its prompt in chunks; `spoil` is done to what it keeps of the first in the first layer, and
    the second chunk is `late` by so many positions."""

    def __init__(self, made: nn.Module, sizes: tuple[int, ...], spoil: Spoil | None = None, late: int = 0) -> None:
        super().__init__()
        self.model, self.sizes, self.spoil, self.late = made, sizes, spoil, late

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        at, cache, out = 0, None, []
        for number, size in enumerate(self.sizes):
            given: dict[str, Any] = {"past_key_values": cache, "attention_mask": attention_mask[:, : at + size]}
            if "position_ids" in inspect.signature(self.model.forward).parameters:
                given["position_ids"] = torch.arange(at, at + size)[None] + (self.late if number == 1 else 0)
            said = self.model(input_ids=input_ids[:, at : at + size], use_cache=len(self.sizes) > 1, **given)
            at, cache = at + size, said.past_key_values
            if number == 0 and self.spoil is not None:
                self.spoil(cache.layers[0])
            out.append(said.logits)
        return torch.cat(out, 1)


def in_chunks(name: str, sizes: tuple[int, ...] = (5, 4, 2), spoil: Spoil | None = None, late: int = 0) -> Report:
    made, ids = model(name), prompt()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return graphprobe.diff(Chunked(made, (TOKENS,)), Chunked(made, sizes, spoil, late), (), given)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(5, 4, 2), (8, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_chunks_with_a_cache_make_no_difference(name: str, sizes: tuple[int, ...]) -> None:
    report = in_chunks(name, sizes)
    assert report.verdict in ("identical", "rounding"), report.findings
    assert report.coverage.resolution >= 0.9


def misplace(layer: Any) -> None:
    layer.keys = layer.keys.roll(1, 2)


def scale(layer: Any) -> None:
    layer.values = layer.values * 1.001


def lose(layer: Any) -> None:
    layer.keys = layer.keys * (torch.arange(layer.keys.shape[2]) > 0)[:, None]


SPOILS: dict[str, Spoil] = {"place": misplace, "stale": scale, "lost": lose}
SPOILT = [(name, kind) for name in ("gpt_neox", "llama", "phi3", "opt", "mixtral") if name in MODELS for kind in SPOILS]


@pytest.mark.parametrize(("name", "kind"), cases(*SPOILT))
def test_a_cache_that_is_spoilt_is_found_in_the_layer_that_reads_it(name: str, kind: str) -> None:
    report = in_chunks(name, spoil=SPOILS[kind])
    found = [f for f in report.findings if f.kind == "semantic"]
    # what spoils it stands in no layer; else it is met in the attention that reads it
    assert found and all(f.module_path == "" or ".layers.0." in f.module_path + "." for f in found), found
    assert report.coverage.resolution >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_neox", "phi3", "olmo2"])
def test_positions_that_are_late_are_found_where_they_are_turned_into_angles(name: str) -> None:
    report = in_chunks(name, late=1)
    found = [f for f in report.findings if f.kind == "semantic"]
    assert len(found) == 1 and found[0].located, found
    # where they are made, outside of the model, or where they are read
    assert found[0].module_path == "" or found[0].module_path.endswith("rotary_emb")

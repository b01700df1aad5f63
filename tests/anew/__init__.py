"""Models of transformers, and the same written anew by other hands: other weights, layouts, formulas and names.

`pair(name)` gives both, with their inputs; `wrong` names one mistake in the second. What is to be found then is told by
the second with and without the mistake: `changed` lists the operations that differ.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from anew.base import Anew, config, shuffled
from anew.decoders import Gpt2, Llama, Mamba, Mixtral
from anew.encoders import T5, Bert, Vit, Whisper

Tensor = torch.Tensor
_TEXT = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0}  # fmt: skip
_GROUPED = _TEXT | {"num_key_value_heads": 2}


class First(nn.Module):
    """Returns what is first in an original's output."""

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.model, self.kwargs = model, kwargs

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs, **self.kwargs)[0]


def _ids(masked: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}


def _llama() -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(config("Llama", **_GROUPED)), Llama, _ids(False), {"use_cache": False}


def _gpt2() -> Any:
    from transformers import GPT2LMHeadModel

    sizes = {"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
    return GPT2LMHeadModel(config("GPT2", **sizes, attention="eager")), Gpt2, _ids(False), {"use_cache": False}


def _mixtral() -> Any:
    from transformers import MixtralForCausalLM

    sizes = _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(config("Mixtral", **sizes)), Mixtral, _ids(False), {"use_cache": False}


def _mamba() -> Any:
    from transformers import MambaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 3, "time_step_rank": 3}
    inputs = {k: v[:, :7] for k, v in _ids(False).items()}
    return MambaForCausalLM(config("Mamba", **sizes, attention="eager")), Mamba, inputs, {"use_cache": False}


def _bert() -> Any:
    from transformers import BertModel

    return BertModel(config("Bert", **_TEXT), add_pooling_layer=False), Bert, _ids(True), {}


def _vit() -> Any:
    from transformers import ViTModel

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
             "image_size": 24, "patch_size": 8}  # fmt: skip
    image = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    model = ViTModel(config("ViT", **sizes, attention="eager"), add_pooling_layer=False)
    return model, Vit, {"pixel_values": image}, {}


def _t5() -> Any:
    from transformers import T5EncoderModel

    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4,
             "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 16,
             "relative_attention_max_distance": 20}  # fmt: skip
    return T5EncoderModel(config("T5", **sizes)), T5, _ids(True), {}


def _whisper() -> Any:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = {"vocab_size": 128, "d_model": 64, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 96,
             "num_mel_bins": 20, "max_source_positions": 15, "pad_token_id": 0}  # fmt: skip
    sound = torch.randn(2, 20, 30, generator=torch.Generator().manual_seed(5))
    return WhisperEncoder(config("Whisper", **sizes)), Whisper, {"input_features": sound}, {}


MODELS: dict[str, Callable[[], Any]] = {
    "llama": _llama, "gpt2": _gpt2, "mixtral": _mixtral, "mamba": _mamba,
    "bert": _bert, "vit": _vit, "t5": _t5, "whisper": _whisper,
}  # fmt: skip
CLASSES: dict[str, type[Anew]] = {
    "llama": Llama, "gpt2": Gpt2, "mixtral": Mixtral, "mamba": Mamba, "bert": Bert, "vit": Vit, "t5": T5,
    "whisper": Whisper,
}  # fmt: skip


def pair(name: str, dtype: torch.dtype = torch.float32, wrong: str = "", at: int = 1, seed: int = 0) -> Any:
    """Return (original, the same written anew, keyword inputs); layer `at` of the second has the mistake."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        original, kind, inputs, kwargs = MODELS[name]()
    original = shuffled(original, seed)
    for parameter in original.parameters():  # buffers keep their dtype: rotary tables are float32 in real models too
        parameter.data = parameter.data.to(dtype)
    anew = kind(original, wrong, at).eval()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return First(original, **kwargs), anew, inputs


def changed(right: GraphModule, wrong: GraphModule) -> set[str]:
    """List the operations of `wrong` that `right` has not, or has with other operands (so shows what was dropped)."""
    rows = [_rows(gm) for gm in (right, wrong)]
    matcher = difflib.SequenceMatcher(None, *([text for _, text in side] for side in rows), autojunk=False)
    to_right: dict[Node, Node] = {}
    for tag, a, b, c, _ in matcher.get_opcodes():
        if tag == "equal":
            for k in range(b - a):
                to_right[rows[1][c + k][0]] = rows[0][a + k][0]
    kept = set(to_right.values())
    dropped = {n for n, _ in rows[0]} - kept
    found = set()
    for node, _ in rows[1]:
        mine = to_right.get(node)
        if mine is None:
            found.add(node.name)
            continue
        if [to_right.get(n) for n in node.all_input_nodes] != mine.all_input_nodes:
            found.add(node.name)
    return found or {n.name for n in dropped}


def _rows(gm: GraphModule) -> list[tuple[Node, str]]:
    out = []
    for node in gm.graph.nodes:
        plain = torch.fx.map_arg((node.args, node.kwargs), lambda n: "%")
        out.append((node, f"{node.op} {node.target} {plain if node.op == 'call_function' else ''}"))
    return out

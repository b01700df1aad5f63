"""What is changed: tiny models of many architectures, with weights that are all different and norms that do something.

`subject(name, dtype, layers)` gives (model, args, kwargs). `UNSEEN` is reported apart: nobody looks at its failures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
VOCABULARY, BATCH, TOKENS, HIDDEN = 96, 2, 12, 32

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _language(kind: str, head: str = "ForCausalLM", **sizes: Any) -> Callable[[int], Case]:
    def build(layers: int) -> Case:
        import transformers

        given = {k: layers if v == "layers" else v for k, v in sizes.items()}
        config = getattr(transformers, f"{kind}Config")(**given, **_SPECIAL)
        model = getattr(transformers, f"{kind}{head}")(config)
        tokens = torch.randint(3, VOCABULARY, (BATCH, TOKENS))
        kwargs: dict[str, Any] = {"input_ids": tokens}
        if "Mamba" not in kind:
            kwargs["attention_mask"] = torch.ones_like(tokens)
        if head != "Model":
            kwargs["use_cache"] = False
        return model, (), kwargs

    return build


def _vision(layers: int) -> Case:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, image_size=16,
        patch_size=8, num_channels=3,
    )  # fmt: skip
    return transformers.ViTModel(config, add_pooling_layer=False), (), {"pixel_values": torch.randn(BATCH, 3, 16, 16)}


class _Residual(nn.Module):
    """A small convolutional net with batch norms, residuals and a classifier."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 1))
            for _ in range(layers)
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.stem(x), 2)
        for block in self.blocks:
            x = x + block(x)
        return torch.log_softmax(self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)), -1)


def _convolutional(layers: int) -> Case:
    return _Residual(layers), (torch.randn(BATCH, 3, 12, 12),), {}


_DECODER = {**_SIZES, "num_hidden_layers": "layers"}
SUBJECTS: dict[str, Callable[[int], Case]] = {
    "llama": _language("Llama", **_DECODER, **_GROUPED),
    "qwen2": _language("Qwen2", **_DECODER, **_GROUPED),
    "qwen3": _language("Qwen3", **_DECODER, **_GROUPED, head_dim=8),
    "mistral": _language("Mistral", **_DECODER, **_GROUPED, sliding_window=6),
    "gemma2": _language("Gemma2", **_DECODER, **_GROUPED, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "olmo2": _language("Olmo2", **_DECODER, **_GROUPED),
    "cohere": _language("Cohere", **_DECODER, **_GROUPED),
    "phi": _language("Phi", **_DECODER),
    "gpt_neox": _language("GPTNeoX", **_DECODER),
    "gpt2": _language(
        "GPT2", "LMHeadModel", vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer="layers", n_head=4, n_positions=64,
    ),
    "opt": _language(
        "OPT", vocab_size=VOCABULARY, hidden_size=HIDDEN, ffn_dim=48, num_hidden_layers="layers", num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=HIDDEN,
    ),
    "bloom": _language("Bloom", vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer="layers", n_head=4),
    "bert": _language("Bert", "Model", **_DECODER),
    "mixtral": _language("Mixtral", **_DECODER, **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _language(
        "Qwen3Moe", **_DECODER, **_GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        decoder_sparse_step=1,
    ),
    "mamba": _language("Mamba", vocab_size=VOCABULARY, hidden_size=HIDDEN, state_size=4, num_hidden_layers="layers"),
    "vit": _vision,
    "conv": _convolutional,
}  # fmt: skip
UNSEEN: dict[str, Callable[[int], Case]] = {"starcoder2": _language("Starcoder2", **_DECODER, **_GROUPED)}


def subject(name: str, dtype: torch.dtype = torch.float32, layers: int = 2, seed: int = 0) -> Case:
    """Build one model in eval mode: (model, args, kwargs). Buffers keep their dtype, as loading a checkpoint does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, args, kwargs = {**SUBJECTS, **UNSEEN}[name](layers)
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms of ones and biases of zeros would hide what is wrong with them
                near_one = path.endswith("weight") and "bias" not in path
                nn.init.uniform_(parameter, 0.5, 1.5) if near_one else nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() > 1 and float(parameter.detach().std()) < 0.1:
                parameter.data *= 4  # transformers initialises with 0.02: attention would be uniform
        for path, buffer in model.named_buffers():
            if path.endswith(("running_mean", "running_var")):
                nn.init.uniform_(buffer, 0.5, 2.0)
    model = model.eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    floats = [
        n for n, b in model.named_buffers() if b.is_floating_point() and n.endswith(("running_mean", "running_var"))
    ]
    for path in floats:
        owner, _, name_ = path.rpartition(".")
        setattr(model.get_submodule(owner), name_, model.get_buffer(path).to(dtype))
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in kwargs.items() if torch.is_tensor(v)}
    moved = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
    return model, moved, {**kwargs, **cast}

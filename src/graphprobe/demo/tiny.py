"""A small Llama-shaped language model in plain torch that learns one text by heart: the demo without downloads.

Byte-level vocabulary, grouped-query attention with rotary positions, RMSNorm and SwiGLU, written out operation by
operation as transformers does in its eager mode, so that graph transforms find the same patterns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 128, 64, 160, 4, 2, 4
SIZE = HIDDEN // HEADS


class RmsNorm(nn.Module):
    """weight * x / rms(x), computed in float32. [..., hidden] -> [..., hidden]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Causal attention in which two query heads share one key and value head. [batch, tokens, hidden]."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * SIZE, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * SIZE, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * SIZE, bias=False)
        self.o_proj = nn.Linear(HEADS * SIZE, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (p(x).view(batch, tokens, -1, SIZE).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = _repeat(k), _repeat(v)
        scores = torch.matmul(q, k.transpose(2, 3)) * SIZE**-0.5 + mask
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        mixed = torch.matmul(weights, v).transpose(1, 2).contiguous()
        out: torch.Tensor = self.o_proj(mixed.reshape(batch, tokens, -1))
        return out


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x[..., : SIZE // 2], x[..., SIZE // 2 :]
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def _repeat(x: torch.Tensor) -> torch.Tensor:
    batch, heads, tokens, size = x.shape
    groups = HEADS // KV_HEADS
    return x[:, :, None].expand(batch, heads, groups, tokens, size).reshape(batch, heads * groups, tokens, size)


class Mlp(nn.Module):
    """SwiGLU. [..., hidden] -> [..., hidden]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and MLP, each on a normalised copy and added back."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm()
        self.self_attn = Attention()
        self.post_attention_layernorm = RmsNorm()
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class TinyLlama(nn.Module):
    """Token ids [batch, tokens] int64 -> {"logits": [batch, tokens, vocabulary]}."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = RmsNorm()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed_tokens(input_ids)
        position = torch.arange(input_ids.shape[1], device=x.device)
        frequency = 10000.0 ** (-torch.arange(0, SIZE, 2, device=x.device).float() / SIZE)
        angle = (position[:, None] * frequency).repeat(1, 2)  # [tokens, size] float32
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        future = position[None, :] > position[:, None]
        mask = torch.zeros(future.shape, dtype=x.dtype, device=x.device).masked_fill(future, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return {"logits": self.lm_head(self.norm(x))}


def learn(text: str, steps: int = 80) -> TinyLlama:
    """Train a model until it knows `text` (ASCII) by heart; the same weights every time, about a second on a CPU."""
    tokens = torch.tensor([list(text.encode("ascii"))])
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _one_thread():
        torch.manual_seed(0)
        model = TinyLlama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            logits = model(tokens[:, :-1])["logits"]
            loss = F.cross_entropy(logits[0], tokens[0, 1:])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return model.eval().requires_grad_(False)


@contextmanager
def _one_thread() -> Iterator[None]:
    # the operations are too small to be shared, and sums in another order would give other weights
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

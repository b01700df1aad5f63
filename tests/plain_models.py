"""Models in another style than their originals': other layouts, other formulas, other names, no modules.

Each takes the weights of its original and, in `bug`, the name of one mistake that it then makes in one place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


def normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm by the mean and the mean square of what is left, in float32."""
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    spread = (centred * centred).mean(-1, keepdim=True)
    return (centred / torch.sqrt(spread + eps) * weight.float() + bias.float()).to(x.dtype)


def mixed(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor) -> Tensor:
    """Attention over [batch, tokens, heads, size]; `hidden` says what is not seen, [..., queries, keys]."""
    score = torch.einsum("bqhd,bkhd->bhqk", q * scale, k).float()
    share = torch.softmax(score.masked_fill(hidden, float("-inf")), -1).to(v.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", share, v).flatten(2)


class Plain(nn.Module):
    """Keeps the weights of another model by name, as plain parameters."""

    def __init__(self, reference: nn.Module, bug: str = "") -> None:
        super().__init__()
        self.bug, self.config = bug, getattr(reference, "config", None)
        state = dict(reference.state_dict())
        self._kept = {name: f"w{i}" for i, name in enumerate(state)}
        for name, short in self._kept.items():
            self.register_buffer(short, state[name].detach())

    def of(self, name: str) -> Tensor:
        """Return a weight of the original."""
        return getattr(self, self._kept[name])


class PlainGpt2(Plain):
    """GPT-2. Bugs: "scale" and "gelu", in layer 1."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        c, count = self.config, input_ids.shape[1]
        eps, heads = c.layer_norm_epsilon, c.n_head
        future = torch.arange(count)[None] > torch.arange(count)[:, None]
        x = self.of("transformer.wpe.weight")[:count] + self.of("transformer.wte.weight")[input_ids]
        for i in range(c.n_layer):
            w = {k: self.of(f"transformer.h.{i}.{k}") for k in _GPT2}
            rows = normed(x, w["ln_1.weight"], w["ln_1.bias"], eps)
            parts = zip(w["attn.c_attn.weight"].chunk(3, 1), w["attn.c_attn.bias"].chunk(3), strict=True)
            q, k, v = ((rows @ m + b).unflatten(-1, (heads, -1)) for m, b in parts)
            scale = (c.n_embd // heads) ** -0.5 * (1.002 if self.bug == "scale" and i == 1 else 1.0)
            x = x + (mixed(q, k, v, scale, future) @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"])
            h = normed(x, w["ln_2.weight"], w["ln_2.bias"], eps) @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"]
            if self.bug == "gelu" and i == 1:
                h = nn.functional.gelu(h)
            else:
                h = h * torch.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))  # (1 + tanh y) / 2 = sigmoid 2y
            x = x + (h @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"])
        x = normed(x, self.of("transformer.ln_f.weight"), self.of("transformer.ln_f.bias"), eps)
        return {"logits": x @ self.of("transformer.wte.weight").T}


_GPT2 = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip


class PlainBert(Plain):
    """BERT, queries, keys and values in one product. Bugs in layer 1: "bias" (of the keys' sum) and "residual"."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        c = self.config
        heads, eps, at = c.num_attention_heads, c.layer_norm_eps, "embeddings"
        count = input_ids.shape[1]
        x = self.of(f"{at}.word_embeddings.weight")[input_ids]
        x = x + (self.of(f"{at}.position_embeddings.weight")[:count] + self.of(f"{at}.token_type_embeddings.weight")[0])
        x = normed(x, self.of(f"{at}.LayerNorm.weight"), self.of(f"{at}.LayerNorm.bias"), eps)
        hidden = (attention_mask == 0)[:, None, None, :]
        for i in range(c.num_hidden_layers):
            at = f"encoder.layer.{i}"
            matrix = torch.cat([self.of(f"{at}.attention.self.{n}.weight") for n in ("query", "key", "value")])
            shift = torch.cat([self.of(f"{at}.attention.self.{n}.bias") for n in ("query", "key", "value")])
            q, k, v = (x @ matrix.T + shift).unflatten(-1, (3, heads, -1)).unbind(2)
            seen = mixed(q, k, v, (c.hidden_size // heads) ** -0.5, hidden)
            out = self.linear(seen, f"{at}.attention.output.dense", self.bug != "bias" or i != 1)
            kept = out if self.bug == "residual" and i == 1 else x + out
            x = normed(kept, *(self.of(f"{at}.attention.output.LayerNorm.{n}") for n in ("weight", "bias")), eps)
            h = self.linear(x, f"{at}.intermediate.dense")
            h = 0.5 * h * (1 + torch.erf(h * 0.7071067811865476))
            x = x + self.linear(h, f"{at}.output.dense")
            x = normed(x, *(self.of(f"{at}.output.LayerNorm.{n}") for n in ("weight", "bias")), eps)
        return {"last": x, "pooled": torch.tanh(self.linear(x[:, 0], "pooler.dense"))}

    def linear(self, x: Tensor, name: str, shifted: bool = True) -> Tensor:
        """Apply a linear layer of the original."""
        y = x @ self.of(f"{name}.weight").T
        return y + self.of(f"{name}.bias") if shifted else y


class PlainMixtral(Plain):
    """Mixtral; all experts see all tokens. Bugs in layer 1: "routing" (weights not normalised) and "gate"."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        c, count = self.config, input_ids.shape[1]
        size = c.hidden_size // c.num_attention_heads
        x = self.of("model.embed_tokens.weight")[input_ids]
        turns = torch.arange(count).float()[:, None] * (1000000.0 ** (-torch.arange(0, size, 2).float() / size))
        turn = torch.polar(torch.ones_like(turns), turns)[:, None]
        cos, sin = turn.real.to(x.dtype), turn.imag.to(x.dtype)
        future = torch.arange(count)[None] > torch.arange(count)[:, None]
        for i in range(c.num_hidden_layers):
            at = f"model.layers.{i}"
            rows = self.scaled(x, f"{at}.input_layernorm.weight")
            q, k, v = ((rows @ self.of(f"{at}.self_attn.{n}_proj.weight").T).unflatten(-1, (-1, size)) for n in "qkv")
            groups = q.shape[2] // k.shape[2]
            q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (z.chunk(2, -1) for z in (q, k)))
            k, v = (z.repeat_interleave(groups, 2) for z in (k, v))
            x = x + mixed(q, k, v, size**-0.5, future) @ self.of(f"{at}.self_attn.o_proj.weight").T
            x = x + self.routed(self.scaled(x, f"{at}.post_attention_layernorm.weight"), f"{at}.mlp", i)
        return {"logits": self.scaled(x, "model.norm.weight") @ self.of("lm_head.weight").T}

    def scaled(self, x: Tensor, name: str) -> Tensor:
        """Normalise by the root of the mean square."""
        wide = x.float()
        root = torch.sqrt((wide * wide).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self.of(name) * (wide / root).to(x.dtype)

    def routed(self, x: Tensor, at: str, i: int) -> Tensor:
        """Weigh what all experts say: the softmax of the best scores alone is that of all, normalised."""
        scores = (x @ self.of(f"{at}.gate.weight").T).float()
        if self.bug == "routing" and i == 1:
            best, chosen = torch.softmax(scores, -1).topk(self.config.num_experts_per_tok, -1)
        else:
            best, chosen = scores.topk(self.config.num_experts_per_tok, -1)
            best = torch.softmax(best, -1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, best).to(x.dtype)
        gate, up = torch.einsum("btd,efd->btef", x, self.of(f"{at}.experts.gate_up_proj")).chunk(2, -1)
        if self.bug == "gate" and i == 1:
            gate, up = up, gate
        said = torch.einsum("btef,edf->bted", nn.functional.silu(gate) * up, self.of(f"{at}.experts.down_proj"))
        return (said * weights[..., None]).sum(-2)


class PlainConv(Plain):
    """The small convolutional net, channels last, by products of patches. Bugs: "eps" of the norm, "groups" swapped."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = self.convolved(x, self.of("stem.weight"), 1)
        scale = self.of("norm.weight") / torch.sqrt(self.of("norm.running_var") + (1e-3 if self.bug == "eps" else 1e-5))
        x = (x - self.of("norm.running_mean")) * scale + self.of("norm.bias")
        x = x.clamp(min=0).unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).amax((2, 4))
        inputs, weights = x.chunk(4, -1), self.of("deep.weight").chunk(4)
        if self.bug == "groups":
            weights = (weights[1], weights[0], *weights[2:])
        x = torch.cat([self.convolved(a, w, 2) for a, w in zip(inputs, weights, strict=True)], -1) + self.of(
            "deep.bias"
        )
        x = 0.5 * x * (1 + torch.erf(x * 0.7071067811865476))
        return x.mean((1, 2)) @ self.of("head.weight").T + self.of("head.bias")

    def convolved(self, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        """Convolve 3 x 3 with one of padding, [batch, height, width, channels]."""
        x = nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
        patches = x.unfold(1, 3, stride).unfold(2, 3, stride)  # [batch, rows, columns, channels, 3, 3]
        return patches.flatten(3) @ weight.flatten(1).T


PLAIN: dict[str, Any] = {"gpt2": PlainGpt2, "bert": PlainBert, "mixtral": PlainMixtral, "conv": PlainConv}

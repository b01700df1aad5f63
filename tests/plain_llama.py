"""A Llama in another style than transformers': fused weights, other names, [batch, tokens, heads, dim], no modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class PlainLlama(nn.Module):
    """Takes the weights of a `LlamaForCausalLM`; `bug` plants one: "scale" in layer 2, "gate" in layer 1."""

    def __init__(self, reference: Any, bug: str = "") -> None:
        super().__init__()
        config, self.bug = reference.config, bug
        weights = {k: v.detach() for k, v in reference.state_dict().items()}
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        self.size = config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.depth = config.num_hidden_layers

        def layer(i: int, *names: str) -> torch.Tensor:
            return torch.cat([weights[f"model.layers.{i}.{name}.weight"] for name in names])

        attention = [f"self_attn.{kind}_proj" for kind in "qkv"]
        each = range(self.depth)
        self.table = nn.Parameter(weights["model.embed_tokens.weight"])
        self.head = nn.Parameter(weights["lm_head.weight"])
        self.last_norm = nn.Parameter(weights["model.norm.weight"])
        self.qkv = nn.ParameterList([layer(i, *attention) for i in each])
        self.mix = nn.ParameterList([layer(i, "self_attn.o_proj") for i in each])
        self.gate_up = nn.ParameterList([layer(i, "mlp.gate_proj", "mlp.up_proj") for i in each])
        self.down = nn.ParameterList([layer(i, "mlp.down_proj") for i in each])
        self.norm_1 = nn.ParameterList([layer(i, "input_layernorm") for i in each])
        self.norm_2 = nn.ParameterList([layer(i, "post_attention_layernorm") for i in each])

    def normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * weight

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, tokens = input_ids.shape
        x = self.table[input_ids]
        half = self.size // 2
        turns = torch.arange(tokens).float()[:, None] * (10000.0 ** (-torch.arange(half).float() / half))
        cos, sin = (f(turns).to(x.dtype)[None, :, None] for f in (torch.cos, torch.sin))
        future = torch.full((tokens, tokens), float("-inf")).triu(1)

        def rotated(z: torch.Tensor) -> torch.Tensor:
            a, b = z[..., :half], z[..., half:]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        for i in range(self.depth):
            widths = [self.heads * self.size, self.shared * self.size, self.shared * self.size]
            parts = (self.normed(x, self.norm_1[i]) @ self.qkv[i].T).split(widths, -1)
            q, k, v = (part.view(batch, tokens, -1, self.size) for part in parts)
            repeat = self.heads // self.shared
            q, k, v = rotated(q), rotated(k).repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
            scale = self.size**-0.5 * (1.001 if self.bug == "scale" and i == 2 else 1.0)
            score = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale + future
            share = torch.softmax(score.float(), -1).to(x.dtype)
            x = x + torch.einsum("bhqk,bkhd->bqhd", share, v).reshape(batch, tokens, -1) @ self.mix[i].T
            gate, up = (self.normed(x, self.norm_2[i]) @ self.gate_up[i].T).chunk(2, -1)
            if self.bug == "gate" and i == 1:
                gate, up = up, gate
            x = x + (nn.functional.silu(gate) * up) @ self.down[i].T
        return {"logits": self.normed(x, self.last_norm) @ self.head.T}

"""A decoder whose layers are written in two styles on the same weights, and the defects a layer of the second may have.

The first style turns and masks as the papers write it; the second fuses gate and up, turns halves apart, and leaves
the mask, the scale and the groups of heads to one attention operator.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, HEADS, GROUPS, INNER, WORDS = 32, 4, 2, 64, 64
DIM = SIZE // HEADS
#: defect -> the operators that may be named for it, and how many operations it is made in
DEFECTS = {
    "rotation": ({"neg"}, 2),
    "groups": ({"repeat"}, 1),
    "window": ({"ones", "tril", "triu"}, 1),
    "scale": ({"scaled_dot_product_attention"}, 1),
    "keys not turned": ({"scaled_dot_product_attention"}, 1),
    "gate": ({"silu"}, 1),
    "activation": ({"gelu"}, 1),
    "epsilon": ({"rms_norm"}, 1),
    "residual": ({"add"}, 1),
    "heads": ({"transpose", "reshape"}, 1),
}


class Layer(nn.Module):
    def __init__(self, defect: str | None) -> None:
        super().__init__()
        self.defect = defect
        self.before_attention, self.before_mlp = (nn.RMSNorm(SIZE, eps=1e-5) for _ in range(2))
        self.q, self.o = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(SIZE, DIM * GROUPS, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(SIZE, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, SIZE, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, tokens, _ = x.shape
        q, k, v = (m(x).view(rows, tokens, -1, DIM).transpose(1, 2) for m in (self.q, self.k, self.v))
        return q, k, v


class Written(Layer):
    """As the papers write it."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.heads(self.before_attention(x))
        q, k = (z * cos + torch.cat([-z.chunk(2, -1)[1], z.chunk(2, -1)[0]], -1) * sin for z in (q, k))
        k, v = (z.repeat_interleave(HEADS // GROUPS, 1) for z in (k, v))
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
        mixed = (q @ k.transpose(2, 3) / DIM**0.5 + mask).softmax(-1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
        y = self.before_mlp(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Fused(Layer):
    """As an engineer in a hurry writes it; `defect` is what went wrong."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.heads(self.before_attention(x))
        q, k = self.turned(q, cos, sin), k if self.defect == "keys not turned" else self.turned(k, cos, sin)
        mixed = self.attended(q, k, v)
        if self.defect == "heads":
            x = x + self.o(mixed.reshape(x.shape))
        else:
            x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
        y = self.before_mlp(x)
        if self.defect == "epsilon":
            y = F.rms_norm(x, (SIZE,), self.before_mlp.weight, 1e-3)
        gate, up = F.linear(y, torch.cat([self.gate.weight, self.up.weight])).chunk(2, -1)
        gate, up = (up, gate) if self.defect == "gate" else (gate, up)
        down = self.down((F.gelu(gate) if self.defect == "activation" else F.silu(gate)) * up)
        return y + down if self.defect == "residual" else x + down

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x, y = x[..., : DIM // 2], x[..., DIM // 2 :]
        cos, sin = cos[..., : DIM // 2], sin[..., : DIM // 2]
        sin = -sin if self.defect == "rotation" else sin
        return torch.cat([x * cos - y * sin, y * cos + x * sin], -1)

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.defect == "groups":
            k, v = (z.repeat(1, HEADS // GROUPS, 1, 1) for z in (k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.defect == "window":
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(-5)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        scale = 1.01 / DIM**0.5 if self.defect == "scale" else None
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale)


class Decoder(nn.Module):
    """Layers of one style; layer `at` of the fused style has the defect."""

    def __init__(self, style: type[Layer], defect: str = "", at: int = 1, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, SIZE)
        self.layers = nn.ModuleList(style(defect if i == at else None) for i in range(layers))
        self.norm = nn.RMSNorm(SIZE, eps=1e-5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        angles = torch.arange(ids.shape[1])[:, None] * 1e4 ** (-torch.arange(DIM // 2) * 2.0 / DIM)
        angles = torch.cat([angles, angles], -1)
        for layer in self.layers:
            x = layer(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        return self.norm(x) @ self.embed.weight.T


def two_styles(defect: str, at: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    """Return both, with the same weights, and their input ids [2, 12]."""
    torch.manual_seed(7)
    before, after = Decoder(Written), Decoder(Fused, defect, at)
    with torch.no_grad():
        for weight in before.parameters():
            if weight.dim() > 1:
                weight.mul_(2.0)
    after.load_state_dict(before.state_dict())
    return before.eval().to(dtype), after.eval().to(dtype), (torch.randint(0, WORDS, (2, 12)),)

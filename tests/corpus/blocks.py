"""The parts that the corpus's models are made of. What an implementation may get wrong is an attribute of the part, so
that a case is made by setting one: `attention.scale`, `norm.eps`, `mlp.swapped`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor


class RmsNorm(nn.Module):
    """x / rms(x) * weight, computed in float32; Gemma stores weight - 1."""

    def __init__(self, size: int, plus_one: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size) * 0.1 + (0 if plus_one else 1))
        self.eps, self.plus_one, self.centred, self.weight_first = eps, plus_one, False, False

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        weight = 1 + self.weight if self.plus_one else self.weight
        return (wide * weight.float()).to(x.dtype) if self.weight_first else wide.to(x.dtype) * weight


class LayerNorm(nn.LayerNorm):
    """A layer norm with weights that are not one and zero."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__(size, eps)
        nn.init.normal_(self.weight, 1.0, 0.1)
        nn.init.normal_(self.bias, 0.0, 0.1)


class Rotary(nn.Module):
    """Tables of cosines and sines, [tokens, dim] in the dtype of x."""

    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        self.dim, self.start, self.factor, self.narrow = dim, 0, 1.0, False
        self.interleaved = False
        self.register_buffer("frequencies", _frequencies(dim, theta))

    def set_theta(self, theta: float) -> None:
        self.frequencies = _frequencies(self.dim, theta)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        work = torch.bfloat16 if self.narrow else torch.float32
        positions = torch.arange(self.start, self.start + x.shape[1], device=x.device).to(work)
        angle = positions[:, None] * self.frequencies[None, :].to(work)
        angle = angle.repeat_interleave(2, -1) if self.interleaved else torch.cat([angle, angle], -1)
        return (angle.cos() * self.factor).to(x.dtype), (angle.sin() * self.factor).to(x.dtype)


def _frequencies(dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)


def half(x: Tensor) -> Tensor:
    """Llama's partner of every element: the other half of the dimension."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def half_wrong_sign(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([second, -first], -1)


def interleaved(x: Tensor) -> Tensor:
    """GPT-J's partner of every element: its neighbour."""
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Masks(nn.Module):
    """Additive masks [1, 1, tokens, tokens]: causal, and causal within a window."""

    def __init__(self, window: int = 0) -> None:
        super().__init__()
        self.window, self.diagonal, self.fill, self.boolean, self.causal = window, 0, float("-inf"), False, True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(x.shape[1])
        distance = rows[:, None] - rows[None, :]
        seen = distance >= -self.diagonal if self.causal else distance >= -x.shape[1]
        near = seen & (distance < self.window) if self.window else seen
        return self._additive(seen, x), self._additive(near, x)

    def _additive(self, seen: Tensor, x: Tensor) -> Tensor:
        if self.boolean:
            return seen[None, None]
        return torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, self.fill)[None, None]


class Attention(nn.Module):
    """Grouped-query attention with everything that models of the last years do to it."""

    def __init__(
        self, hidden: int, heads: int = 4, shared: int = 2, *, bias: bool = False, normed: bool = False,
        fused: bool = False, cap: float = 0.0, rotated: float = 1.0, window: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, hidden // heads
        widths = [heads * self.size, shared * self.size, shared * self.size]
        if fused:
            self.qkv = nn.Linear(hidden, sum(widths), bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(hidden, width, bias=bias) for width in widths)
        self.o = nn.Linear(hidden, hidden, bias=bias)
        self.norms = nn.ModuleList([RmsNorm(self.size), RmsNorm(self.size)]) if normed else None
        self.widths, self.fused, self.cap, self.window = widths, fused, cap, window
        self.rotated = int(self.size * rotated)
        self.scale = self.size**-0.5
        self.rotate: Callable[[Tensor], Tensor] = half
        self.kernel, self.order, self.repeat = "eager", (0, 1, 2), "interleave"
        self.cap_last = self.swapped_tables = self.norm_last = self.split_heads_last = self.mask_after = False
        self.scale_on, self.late = "score", 0
        self.use_mask = True

    def project(self, x: Tensor) -> list[Tensor]:
        """Return q, k and v as [batch, heads, tokens, size]."""
        parts = self.qkv(x).split(self.widths, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        parts = [parts[i] for i in self.order]
        if self.split_heads_last:
            return [p.unflatten(-1, (self.size, -1)).permute(0, 3, 1, 2) for p in parts]
        return [p.unflatten(-1, (-1, self.size)).transpose(1, 2) for p in parts]

    def turn(self, x: Tensor, tables: tuple[Tensor, Tensor] | None, late: int = 0) -> Tensor:
        if tables is None:
            return x
        cos, sin = reversed(tables) if self.swapped_tables else tables
        if late:
            cos, sin = cos.roll(late, 0), sin.roll(late, 0)
        width = cos.shape[-1]
        turned = x[..., :width] * cos + self.rotate(x[..., :width]) * sin
        return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)

    def spread(self, x: Tensor) -> Tensor:
        times = self.heads // self.shared
        if times == 1:
            return x
        return x.repeat_interleave(times, 1) if self.repeat == "interleave" else x.repeat(1, times, 1, 1)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        q, k, v = self.project(x)
        if self.norms is not None and not self.norm_last:
            q, k = self.norms[0](q), self.norms[1](k)
        q, k = self.turn(q, tables, self.late), self.turn(k, tables)
        if self.norms is not None and self.norm_last:
            q, k = self.norms[0](q), self.norms[1](k)
        k, v = self.spread(k), self.spread(v)
        mixed = self.mix(q, k, v, mask if self.use_mask else None)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.kernel == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        if self.scale_on == "q":
            score = (q * self.scale) @ k.transpose(-1, -2)
        elif self.scale_on == "k":
            score = q @ (k * self.scale).transpose(-1, -2)
        else:
            score = q @ k.transpose(-1, -2) * self.scale
        if self.cap and not self.cap_last:
            score = torch.tanh(score / self.cap) * self.cap
        if mask is not None and not self.mask_after:
            score = score + mask
        if self.cap and self.cap_last:
            score = torch.tanh(score / self.cap) * self.cap
        share = torch.softmax(score.float(), -1).to(q.dtype)
        if mask is not None and self.mask_after:
            share = share * (mask == 0)
        return share @ v


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
}


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int, activation: str = "silu") -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)
        self.activation, self.swapped = activation, False

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        if self.swapped:
            gate, up = up, gate
        return self.down(ACTIVATIONS[self.activation](gate) * up)


class Mlp(nn.Module):
    """down(act(up(x))) with biases."""

    def __init__(self, hidden: int, inner: int, activation: str = "gelu") -> None:
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(hidden, inner), nn.Linear(inner, hidden), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Moe(nn.Module):
    """Routed experts with stacked weights, all of them computed and weighted; optionally one that all tokens share."""

    def __init__(self, hidden: int, inner: int, experts: int = 4, top: int = 2, shared: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        nn.init.normal_(self.router.weight, 0.0, 0.5)
        self.first = nn.Parameter(torch.randn(experts, hidden, 2 * inner) * hidden**-0.5)
        self.second = nn.Parameter(torch.randn(experts, inner, hidden) * inner**-0.5)
        self.shared = GatedMlp(hidden, inner) if shared else None
        self.top, self.normed, self.scores, self.factor = top, True, "softmax", 1.0
        self.soft_last = self.scale_input = self.swapped = self.biased_weights = False
        self.world = 1  # how often the shared expert is summed
        self.register_buffer("bias", torch.randn(experts) * 0.1)
        self.use_bias = False

    def routes(self, x: Tensor) -> Tensor:
        """Return the weight of every expert, [tokens, experts]."""
        logits = self.router(x).float()
        if self.soft_last:
            value, index = logits.topk(self.top, -1)
            value = torch.softmax(value, -1)
        else:
            score = torch.sigmoid(logits) if self.scores == "sigmoid" else torch.softmax(logits, -1)
            chosen = score + self.bias.float() if self.use_bias else score
            index = chosen.topk(self.top, -1).indices
            value = (chosen if self.biased_weights else score).gather(-1, index)
            if self.normed:
                value = value / value.sum(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, index, value * self.factor)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        routes = self.routes(flat).to(x.dtype)
        given = torch.einsum("th,te->eth", flat, routes) if self.scale_input else flat[None]
        gate, up = (given @ self.first).chunk(2, -1)
        if self.swapped:
            gate, up = up, gate
        made = (F.silu(gate) * up) @ self.second
        if not self.scale_input:
            made = made * routes.t()[..., None]
        mixed = made.sum(0).view_as(x)
        if self.shared is None:
            return mixed
        return mixed + self.shared(x) * self.world if self.world != 1 else mixed + self.shared(x)

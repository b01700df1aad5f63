"""Decoders whose weights may be stored in another order: rotary halves or neighbours, fused projections, other heads.

`Layout` says how the rows and columns of the weights are ordered, and the code that goes with it. Two models of one
seed with different layouts compute the same function; `wrong` names one mistake in layer `at`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor
HIDDEN, DIM, LAYERS, VOCABULARY, WIDE = 64, 16, 4, 96, 80


@dataclass(frozen=True)
class Layout:
    """How a decoder stores its weights, and computes with them."""

    rotary: str = "halves"  # halves, split, complex, strided, everytwo, unbound
    qkv: str = "apart"  # apart, stacked [3, heads, dim], grouped [heads, 3, dim]
    mlp: str = "apart"  # apart, stacked, interleaved
    heads: tuple[int, ...] = ()  # the order of groups of heads
    units: int = 0  # a seed that shuffles the hidden units of the MLP
    names: str = "hf"  # hf or meta


@dataclass(frozen=True)
class Family:
    """What two layouts of one model have in common."""

    queries: int = 4
    keys: int = 2
    bias: bool = False
    turned: int = DIM  # how many of a head's dimensions rotary embedding turns
    normed: bool = False  # queries and keys go through a norm of their own
    layers: int = LAYERS


#: What may be wrong, in one layer.
MISTAKES = (
    "q order", "k order", "both orders", "q heads", "k heads", "q direction", "k direction", "bias", "angle", "swapped",
    "position", "sign", "scale",
)  # fmt: skip


def paired(w: Tensor, turned: int, dim: int) -> Tensor:
    """Order the rows of every head for neighbours: halves [.. a .. b ..] become pairs [a0 b0 a1 b1 ..]."""
    heads = w.unflatten(0, (-1, dim))
    first, rest = heads[:, :turned], heads[:, turned:]
    first = first.unflatten(1, (2, turned // 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([first, rest], 1).flatten(0, 1)


def unpaired(w: Tensor, turned: int, dim: int) -> Tensor:
    """Undo `paired`."""
    heads = w.unflatten(0, (-1, dim))
    first, rest = heads[:, :turned], heads[:, turned:]
    first = first.unflatten(1, (turned // 2, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([first, rest], 1).flatten(0, 1)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def rotate_every_two(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in (cos, sin))
    return x * cos + rotate_half(x) * sin


def _split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (a, b), cos, sin = x.chunk(2, -1), cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def _strided(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b, cos, sin = x[..., ::2], x[..., 1::2], cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def _everytwo(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t.to(x.dtype).repeat_interleave(2, -1) for t in (cos, sin))
    return x * cos + rotate_every_two(x) * sin


def _unbound(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat([(a * cos - b * sin)[..., None], (a * sin + b * cos)[..., None]], -1).flatten(-2).to(x.dtype)


ROTARY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "halves": _halves, "split": _split, "complex": _complex, "strided": _strided, "everytwo": _everytwo,
    "unbound": _unbound,
}  # fmt: skip
NEIGHBOURS = ("complex", "strided", "everytwo", "unbound")


class Norm(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        made.bias = nn.Parameter(bias.contiguous())
    return made


class Attention(nn.Module):
    def __init__(self, draw: Callable[..., Tensor], family: Family, layout: Layout, wrong: str) -> None:
        super().__init__()
        self.family, self.layout, self.wrong = family, layout, wrong
        sizes = [family.queries * DIM, family.keys * DIM, family.keys * DIM]
        weights = [draw(n, HIDDEN) * HIDDEN**-0.5 * 1.5 for n in sizes]
        biases = [draw(n) * 0.3 for n in sizes]
        out = draw(HIDDEN, sizes[0]) * sizes[0] ** -0.5
        gains = [1 + 0.3 * draw(DIM) for _ in range(2)]
        pairs = layout.rotary in NEIGHBOURS
        for i, name in enumerate("qk"):
            order = paired if pairs else lambda w, *_: w
            times = 1
            if wrong in (f"{name} order", "both orders"):
                order = (lambda w, *_: w) if pairs else paired
            if wrong == f"{name} direction":
                order = unpaired
            if wrong == f"{name} heads":  # for heads of half the size
                times = 2
            turned = family.turned if times == 1 else DIM // 2
            weights[i] = order(weights[i], turned, DIM // times)
            if not (wrong == "bias" and name == "q"):
                biases[i] = order(biases[i], turned, DIM // times)
            if pairs:
                gains[i] = paired(gains[i], family.turned, DIM)
        if layout.heads:
            groups = torch.tensor(layout.heads)
            weights = [w.unflatten(0, (family.keys, -1))[groups].flatten(0, 1) for w in weights]
            biases = [b.unflatten(0, (family.keys, -1))[groups].flatten(0, 1) for b in biases]
            out = out.unflatten(1, (family.keys, -1))[:, groups].flatten(1, 2)
        given = biases if family.bias else [None] * 3
        if layout.qkv == "apart":
            names = ("q_proj", "k_proj", "v_proj") if layout.names == "hf" else ("wq", "wk", "wv")
            self.parts = names
            for name, w, b in zip(names, weights, given, strict=True):
                setattr(self, name, linear(w, b))
        else:
            self.qkv = linear(self.joined(weights), self.joined(biases) if family.bias else None)
        setattr(self, "o_proj" if layout.names == "hf" else "wo", linear(out))
        if family.normed:
            self.q_norm, self.k_norm = Norm(gains[0]), Norm(gains[1])

    def joined(self, parts: list[Tensor]) -> Tensor:
        if self.layout.qkv == "stacked":
            return torch.cat(parts)
        # a group of queries, and the keys and values that it reads
        return torch.cat([p.unflatten(0, (self.family.keys, -1)) for p in parts], 1).flatten(0, 1)

    def projected(self, x: Tensor) -> list[Tensor]:  # [batch, tokens, heads, dim] each
        f = self.family
        if self.layout.qkv == "apart":
            return [getattr(self, name)(x).unflatten(-1, (-1, DIM)) for name in self.parts]
        made, times = self.qkv(x), f.queries // f.keys
        if self.layout.qkv == "stacked":
            return [p.unflatten(-1, (-1, DIM)) for p in made.split([f.queries * DIM, f.keys * DIM, f.keys * DIM], -1)]
        made = made.unflatten(-1, (f.keys, times + 2, DIM))
        return [made[..., :times, :].flatten(2, 3), made[..., times, :], made[..., times + 1, :]]

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        f, (batch, tokens, _) = self.family, x.shape
        q, k, v = self.projected(x)
        if f.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.layout.names == "hf":
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        else:
            angles = angles[:, None]
        q, k = self.rotated(q, angles, "q"), self.rotated(k, angles, "k")
        if self.layout.names != "hf":
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        times = f.queries // f.keys
        k, v = (z.repeat_interleave(times, 1) for z in (k, v))
        scale = DIM**-0.5 * (1.001 if self.wrong == "scale" else 1.0)
        future = torch.full((tokens, tokens), float("-inf"), dtype=x.dtype).triu(1)
        share = torch.softmax((q @ k.transpose(-1, -2) * scale + future).float(), -1).to(x.dtype)
        mixed = (share @ v).transpose(1, 2).reshape(batch, tokens, -1)
        return self.o_proj(mixed) if self.layout.names == "hf" else self.wo(mixed)

    def rotated(self, x: Tensor, angles: Tensor, name: str) -> Tensor:
        if self.wrong == "angle" and name == "q":
            angles = angles * 1.25
        if self.wrong == "position" and name == "k":
            angles = angles + self.rates
        cos, sin = angles.cos(), angles.sin()
        if self.wrong == "swapped" and name == "q":
            cos, sin = sin, cos
        if self.wrong == "sign" and name == "k":
            sin = -sin
        turned = self.family.turned
        made = ROTARY[self.layout.rotary](x[..., :turned] if turned < DIM else x, cos, sin)
        return torch.cat([made, x[..., turned:]], -1) if turned < DIM else made

    @property
    def rates(self) -> Tensor:
        return rates(self.family)


def rates(family: Family) -> Tensor:
    return 1e4 ** -(torch.arange(0, family.turned, 2).float() / family.turned)


class Mlp(nn.Module):
    def __init__(self, draw: Callable[..., Tensor], layout: Layout, at: int) -> None:
        super().__init__()
        self.layout = layout
        gate, up = (draw(WIDE, HIDDEN) * HIDDEN**-0.5 for _ in range(2))
        down = draw(HIDDEN, WIDE) * WIDE**-0.5
        if layout.units:
            order = torch.randperm(WIDE, generator=torch.Generator().manual_seed(layout.units + at))
            gate, up, down = gate[order], up[order], down[:, order]
        if layout.mlp == "apart":
            self.gate_proj, self.up_proj = linear(gate), linear(up)
        elif layout.mlp == "stacked":
            self.gate_up = linear(torch.cat([gate, up]))
        else:
            self.gate_up = linear(torch.stack([gate, up], 1).flatten(0, 1))
        self.down_proj = linear(down)

    def forward(self, x: Tensor) -> Tensor:
        if self.layout.mlp == "apart":
            gate, up = self.gate_proj(x), self.up_proj(x)
        elif self.layout.mlp == "stacked":
            gate, up = self.gate_up(x).chunk(2, -1)
        else:
            both = self.gate_up(x)
            gate, up = both[..., ::2], both[..., 1::2]
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, draw: Callable[..., Tensor], family: Family, layout: Layout, wrong: str, at: int) -> None:
        super().__init__()
        self.input_norm, self.post_norm = Norm(1 + 0.2 * draw(HIDDEN)), Norm(1 + 0.2 * draw(HIDDEN))
        self.attention = Attention(draw, family, layout, wrong)
        self.mlp = Mlp(draw, layout, at)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x), angles)
        return x + self.mlp(self.post_norm(x))


class Decoder(nn.Module):
    """A small decoder of one seed; layouts change how it is written, not what it computes."""

    def __init__(self, family: Family, layout: Layout, wrong: str = "", at: int = 1, seed: int = 0) -> None:
        super().__init__()
        assert not wrong or wrong in MISTAKES, wrong
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.family = family
        self.embed = nn.Embedding(VOCABULARY, HIDDEN, _weight=draw(VOCABULARY, HIDDEN))
        self.layers = nn.ModuleList(
            Layer(draw, family, layout, wrong if i == at else "", i) for i in range(family.layers)
        )
        self.norm, self.head = Norm(1 + 0.2 * draw(HIDDEN)), linear(draw(VOCABULARY, HIDDEN) * HIDDEN**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        angles = torch.outer(torch.arange(ids.shape[1]).float(), rates(self.family))
        for layer in self.layers:
            x = layer(x, angles)
        return self.head(self.norm(x))


def ids(tokens: int = 11, rows: int = 2) -> Tensor:
    """Draw token ids."""
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(3))


def pair(
    family: Family, before: Layout, after: Layout, dtype: torch.dtype, wrong: str = "", at: int = 1
) -> tuple[nn.Module, nn.Module]:
    """Return two decoders of one function, but for what is wrong in the second."""
    left, right = Decoder(family, before), Decoder(family, after, wrong, at)
    return left.to(dtype).eval(), right.to(dtype).eval()

"""Decoders whole and split into the shards of a tensor-parallel group, all shards in one graph.

What a shard holds is a parameter of its own: columns of a weight (rows of it, where partial products are summed), its
heads, its part of the vocabulary. `bug` names one thing that one shard of the last layer has wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor


@dataclass(frozen=True)
class Sizes:
    """How large a decoder is; `gated` is a Llama, else a GPT-2 with a bias everywhere."""

    gated: bool = True
    layers: int = 2
    heads: int = 8
    kv: int = 4
    size: int = 8  # of a head
    inner: int = 96
    words: int = 80
    tokens: int = 12

    @property
    def width(self) -> int:
        """The width of the residual stream."""
        return self.heads * self.size


LLAMA = Sizes()
GPT2 = Sizes(gated=False, kv=8)

#: What one shard may have wrong.
BUGS = ("slice", "activation", "missing", "kv", "words", "bias", "scale")


def weights(s: Sizes) -> dict[str, Tensor]:
    """Draw the weights of a decoder: matrices [out, in]."""
    draw = torch.Generator().manual_seed(5)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=draw) * columns**-0.5

    held = {"embed": torch.randn(s.words, s.width, generator=draw), "head": matrix(s.words, s.width)}
    sizes = {
        "q": (s.heads * s.size, s.width), "k": (s.kv * s.size, s.width), "v": (s.kv * s.size, s.width),
        "o": (s.width, s.heads * s.size), "up": (s.inner, s.width), "down": (s.width, s.inner),
    }  # fmt: skip
    if s.gated:
        sizes["gate"] = sizes["up"]
    else:
        held["places"] = torch.randn(s.tokens, s.width, generator=draw) * 0.3
    for i in range(s.layers):
        for name, (rows, columns) in sizes.items():
            held[f"{i}.{name}"] = matrix(rows, columns)
            if not s.gated:
                held[f"{i}.{name}.bias"] = torch.randn(rows, generator=draw) * 0.2
        for norm in ("first", "second"):
            held |= _norm(f"{i}.{norm}", s, draw)
    return held | _norm("last", s, draw)


def _norm(name: str, s: Sizes, draw: torch.Generator) -> dict[str, Tensor]:
    scale = {name: 1 + 0.2 * torch.randn(s.width, generator=draw)}
    return scale if s.gated else scale | {f"{name}.bias": torch.randn(s.width, generator=draw) * 0.2}


class Whole(nn.Module):
    """The decoder in one piece."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s = s
        self.kept: dict[str, str] = {}
        self.keep({name: [value] for name, value in weights(s).items()})

    def keep(self, held: dict[str, list[Tensor]]) -> None:
        """Hold each weight's parts as parameters of their own."""
        for name, parts in held.items():
            for i, part in enumerate(parts):
                short = "w_" + name.replace(".", "_") + (f"_{i}" if len(parts) > 1 else "")
                self.kept[f"{name}/{i}"] = short
                self.register_parameter(short, nn.Parameter(part.clone().contiguous()))

    def of(self, name: str, part: int = 0) -> Tensor | None:
        """Return a part of a weight, None where there is no such weight."""
        return getattr(self, self.kept[f"{name}/{part}"]) if f"{name}/{part}" in self.kept else None

    def linear(self, x: Tensor, name: str, part: int = 0) -> Tensor:
        return F.linear(x, self.of(name, part), self.of(f"{name}.bias", part))

    def norm(self, x: Tensor, name: str) -> Tensor:
        if self.s.gated:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.of(name) * wide.to(x.dtype)
        return F.layer_norm(x, (self.s.width,), self.of(name), self.of(f"{name}.bias"), 1e-5)

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.of("embed"))

    def attended(self, x: Tensor, i: int) -> Tensor:
        return self.linear(self.mixed(*(self.linear(x, f"{i}.{n}") for n in "qkv")), f"{i}.o")

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over [batch, tokens, heads * size]."""
        q, k, v = (t.unflatten(-1, (-1, self.s.size)).transpose(1, 2) for t in (q, k, v))
        if self.s.gated:
            q, k = self.turned(q), self.turned(k)
        times = q.shape[1] // k.shape[1]
        if times > 1:
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        return self.seen(q, k, v).transpose(1, 2).flatten(2)

    def seen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def turned(self, x: Tensor) -> Tensor:
        half = self.s.size // 2
        angle = torch.arange(x.shape[2])[:, None].float() * (100.0 ** (-torch.arange(half).float() / half))
        angle = torch.cat([angle, angle], -1)
        other = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * angle.cos().to(x.dtype) + other * angle.sin().to(x.dtype)

    def fed(self, x: Tensor, i: int, part: int = 0, wrong: bool = False) -> Tensor:
        """What goes into the second product of the MLP."""
        up = self.linear(x, f"{i}.up", part)
        if self.s.gated:
            gate = self.linear(x, f"{i}.gate", part)
            return (gate if wrong else F.silu(gate)) * up
        return up if wrong else F.gelu(up, approximate="tanh")

    def mlp(self, x: Tensor, i: int) -> Tensor:
        return self.linear(self.fed(x, i), f"{i}.down")

    def head(self, x: Tensor) -> Tensor:
        return self.linear(x, "head")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if not self.s.gated:
            x = x + self.of("places")[: ids.shape[1]]
        for i in range(self.s.layers):
            x = x + self.attended(self.norm(x, f"{i}.first"), i)
            x = x + self.mlp(self.norm(x, f"{i}.second"), i)
        return self.head(self.norm(x, "last"))


class Sharded(Whole):
    """The decoder in `world` shards; `sequence`: norms see each only some of the tokens."""

    def __init__(self, s: Sizes, world: int, bug: str = "", sequence: bool = False) -> None:
        self.world, self.bug, self.sequence = world, bug, sequence
        super().__init__(s)

    def keep(self, held: dict[str, list[Tensor]]) -> None:
        cut: dict[str, list[Tensor]] = {}
        for name, (value,) in held.items():
            kind = name.removesuffix(".bias").split(".")[-1]
            if kind in ("q", "k", "v", "up", "gate", "head", "embed"):
                cut[name] = list(value.chunk(self.world))
            elif kind in ("o", "down") and not name.endswith("bias"):
                cut[name] = list(value.chunk(self.world, 1))
            else:
                cut[name] = [value]
        last = self.s.layers - 1
        if self.bug == "slice":  # of the place behind
            rows = self.s.inner // self.world
            whole = held[f"{last}.up"][0]
            cut[f"{last}.up"][1] = whole[rows - 1 : 2 * rows - 1]
        super().keep(cut)

    def wrong(self, bug: str, i: int, rank: int = 1) -> bool:
        """Whether that shard of that layer has this bug."""
        return self.bug == bug and i == self.s.layers - 1 and rank == 1

    def embed(self, ids: Tensor) -> Tensor:
        rows, out = self.s.words // self.world, None
        for rank in range(self.world):
            first = rank * rows - (1 if self.bug == "words" and rank == 1 else 0)
            mine = (ids >= rank * rows) & (ids < (rank + 1) * rows)
            at = torch.where(mine, ids - first, 0).clamp(max=rows - 1)
            part = F.embedding(at, self.of("embed", rank)) * mine[..., None]
            out = part if out is None else out + part
        return out

    def norm(self, x: Tensor, name: str) -> Tensor:
        if not self.sequence:
            return super().norm(x, name)
        return torch.cat([Whole.norm(self, part, name) for part in x.chunk(self.world, 1)], 1)

    def summed(self, parts: list[Tensor], name: str, i: int) -> Tensor:
        if name == "down" and self.wrong("missing", i):
            del parts[1]
        out = parts[0]
        for part in parts[1:]:
            out = out + part
        return out

    def row(self, x: Tensor, name: str, i: int, rank: int) -> Tensor:
        """A partial product; the first shard has the bias."""
        biased = rank == 0 or (name == "down" and self.wrong("bias", i, rank))
        return F.linear(x, self.of(f"{i}.{name}", rank), self.of(f"{i}.{name}.bias") if biased else None)

    def attended(self, x: Tensor, i: int) -> Tensor:
        parts = []
        for rank in range(self.world):
            other = (rank + 1) % self.world if self.wrong("kv", i, rank) else rank
            q = self.linear(x, f"{i}.q", rank)
            k, v = (self.linear(x, f"{i}.{n}", other) for n in "kv")
            parts.append(self.row(self.mixed(q, k, v), "o", i, rank))
        return self.summed(parts, "o", i)

    def mlp(self, x: Tensor, i: int) -> Tensor:
        parts = []
        for rank in range(self.world):
            inner = self.fed(x, i, rank, self.wrong("activation", i, rank))
            parts.append(self.row(inner * 1.01 if self.wrong("scale", i, rank) else inner, "down", i, rank))
        return self.summed(parts, "down", i)

    def head(self, x: Tensor) -> Tensor:
        return torch.cat([self.linear(x, "head", r) for r in range(self.world)], -1)


def prompt(s: Sizes, rows: int = 2) -> tuple[Any, ...]:
    """Draw token ids."""
    return (torch.randint(0, s.words, (rows, s.tokens), generator=torch.Generator().manual_seed(2)),)


class Fused(Sharded):
    """Shards as servers hold them: queries, keys and values of a shard in one weight, gate and up in one, and as many
    copies of a head of keys as it takes for every shard to have one. Norms of Falcon: one for both branches."""

    def keep(self, held: dict[str, list[Tensor]]) -> None:
        ranks, cut = range(self.world), dict(held)
        for i in range(self.s.layers):
            q, k, v = (held[f"{i}.{n}"][0] for n in "qkv")
            copies = max(1, self.world // self.s.kv)
            k, v = ([t for t in m.chunk(self.world // copies) for _ in range(copies)] for m in (k, v))
            cut[f"{i}.qkv"] = [torch.cat([q.chunk(self.world)[r], k[r], v[r]]) for r in ranks]
            gate, up = held[f"{i}.gate"][0], held[f"{i}.up"][0]
            if self.bug == "kv" and i == self.s.layers - 1:
                cut[f"{i}.qkv"][1] = torch.cat([q.chunk(self.world)[1], k[1 - copies], v[1 - copies]])
            cut[f"{i}.gate_up"] = [torch.cat([gate.chunk(self.world)[r], up.chunk(self.world)[r]]) for r in ranks]
            for name in ("o", "down"):
                cut[f"{i}.{name}"] = list(held[f"{i}.{name}"][0].chunk(self.world, 1))
            for name in ("q", "k", "v", "gate", "up"):
                del cut[f"{i}.{name}"]
        for name in ("embed", "head"):
            cut[name] = list(held[name][0].chunk(self.world))
        Whole.keep(self, cut)

    def attended(self, x: Tensor, i: int) -> Tensor:
        parts = []
        for rank in range(self.world):
            qkv, queries = self.linear(x, f"{i}.qkv", rank), self.s.heads // self.world * self.s.size
            rest = (qkv.shape[-1] - queries) // 2
            parts.append(self.row(self.mixed(*qkv.split([queries, rest, rest], -1)), "o", i, rank))
        return self.summed(parts, "o", i)

    def fed(self, x: Tensor, i: int, part: int = 0, wrong: bool = False) -> Tensor:
        gate, up = self.linear(x, f"{i}.gate_up", part).chunk(2, -1)
        return (gate if wrong else F.silu(gate)) * up

"""Models of the corpus that are no decoders: images, diffusion, state spaces, recurrence, encoder and decoder."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from corpus.architectures import BATCH, HIDDEN, TOKENS, VOCABULARY, _depth, _finished, tokens
from corpus.blocks import Attention, LayerNorm, Mlp, RmsNorm
from corpus.records import Draw, Subject

Tensor = torch.Tensor


class ViT(nn.Module):
    """Patches through a convolution, a class token, learned positions."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, HIDDEN, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, HIDDEN))
        self.places = nn.Parameter(torch.randn(1, 17, HIDDEN))
        self.layers = nn.ModuleList(ViTLayer() for _ in range(depth))
        self.norm, self.head = LayerNorm(HIDDEN), nn.Linear(HIDDEN, 10)
        self.token_last, self.first_place, self.pooled, self.linear_patches = False, 0, False, False

    def forward(self, image: Tensor) -> Tensor:
        if self.linear_patches:
            cut = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
            x = F.linear(cut, self.patches.weight.flatten(1), self.patches.bias)
        else:
            x = self.patches(image).flatten(2).transpose(1, 2)
        token = self.token.expand(x.shape[0], -1, -1)
        x = torch.cat([x, token] if self.token_last else [token, x], 1)
        x = x + (self.places.roll(self.first_place, 1) if self.first_place else self.places)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.pooled else x[:, 0])


class ViTLayer(nn.Module):
    """Pre-norm attention and MLP without a mask, with a learned gain on each block (LayerScale)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(HIDDEN, 4, 4, bias=True, fused=True), Mlp(HIDDEN, 64)
        self.norm_1, self.norm_2 = LayerNorm(HIDDEN, 1e-6), LayerNorm(HIDDEN, 1e-6)
        self.gain_1, self.gain_2 = (nn.Parameter(torch.rand(HIDDEN)) for _ in range(2))
        self.gainless = False

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.attention(self.norm_1(x), None, None)
        x = x + (mixed if self.gainless else mixed * self.gain_1)
        return x + self.mlp(self.norm_2(x)) * self.gain_2


def vit(draw: Draw) -> Subject:
    """An image classifier."""
    return _finished(ViT(len(_depth(draw))), draw, torch.randn(BATCH, 3, 16, 16))


class ResBlock(nn.Module):
    """Two convolutions with batch norms; a strided one has a projected shortcut."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.norm_1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), _batch_norm(outer)
        self.second, self.norm_2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), _batch_norm(outer)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride) if stride > 1 else nn.Identity()
        self.act_first = False

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm_1(self.first(x)))
        y = self.norm_2(self.second(y))
        return F.relu(y) + self.shortcut(x) if self.act_first else F.relu(y + self.shortcut(x))


def _batch_norm(size: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(size)
    for value, low, high in ((norm.running_mean, -0.5, 0.5), (norm.running_var, 0.5, 2.0), (norm.weight, 0.5, 1.5)):
        nn.init.uniform_(value, low, high)  # type: ignore[arg-type]
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    return norm


class ResNet(nn.Module):
    """Stem, blocks, pooling, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 1, 1, bias=False), _batch_norm(8)
        self.layers = nn.ModuleList([ResBlock(8, 8), ResBlock(8, 12, 2), ResBlock(12, 12)])
        self.pool, self.head = nn.AvgPool2d(3, 2, 1), nn.Linear(12, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(image)))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.pool(x).mean((2, 3)))


def resnet(draw: Draw) -> Subject:
    """A convolutional net; its batch norms hold statistics that are not zero and one."""
    return _finished(ResNet(), draw, torch.randn(BATCH, 3, 12, 12))


class Mixer(nn.Module):
    """Mamba's block: a causal convolution and a selective scan, token by token."""

    def __init__(self, hidden: int, inner: int = 24, state: int = 4) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(hidden, 2 * inner, bias=False), nn.Linear(inner, hidden, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.select = nn.Linear(inner, 2 * state + 2, bias=False)
        self.step = nn.Linear(2, inner)
        self.log_a = nn.Parameter(torch.log(torch.arange(1, state + 1).float().repeat(inner, 1)))
        self.skip, self.state = nn.Parameter(torch.randn(inner)), state
        self.with_skip, self.softplus, self.shift, self.negative, self.swapped_bc = True, True, 0, True, False

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.into(x).chunk(2, -1)
        held = self.conv(u.transpose(1, 2))[..., self.shift : self.shift + x.shape[1]]
        u = F.silu(held).transpose(1, 2)
        narrow, b, c = self.select(u).split([2, self.state, self.state], -1)
        if self.swapped_bc:
            b, c = c, b
        step = self.step(narrow)
        step = F.softplus(step) if self.softplus else F.relu(step)
        a = torch.exp(self.log_a.float())
        y = self.scan(u, step, -a if self.negative else -1 / a, b, c)
        if self.with_skip:
            y = y + u * self.skip
        return self.out(y * F.silu(gate))

    def scan(self, u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        decay = torch.exp(step.float()[..., None] * a)  # [batch, tokens, inner, state]
        given = (step * u).float()[..., None] * b.float()[:, :, None]
        h, out = torch.zeros_like(given[:, 0]), []
        for t in range(u.shape[1]):
            h = decay[:, t] * h + given[:, t]
            out.append((h * c.float()[:, t, None]).sum(-1))
        return torch.stack(out, 1).to(u.dtype)


class Mamba(nn.Module):
    """Embedding, mixers with residuals, head."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Mixer(HIDDEN) for _ in range(depth))
        self.norms = nn.ModuleList(RmsNorm(HIDDEN) for _ in range(depth + 1))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = x + layer(norm(x))
        return self.head(self.norms[-1](x))


def mamba(draw: Draw) -> Subject:
    """A state-space model."""
    return _finished(Mamba(2), draw, tokens()[:, :6])


class UNet(nn.Module):
    """A denoiser: group norms, a time embedding, one way down and up with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
        self.into, self.norm_1 = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16, eps=1e-6)
        self.down, self.norm_2 = nn.Conv2d(16, 16, 3, 2, 1), nn.GroupNorm(4, 16)
        self.middle, self.up = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.out = nn.Conv2d(16, 3, 3, padding=1)
        for norm in (self.norm_1, self.norm_2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
        self.sine_first, self.skip_first, self.grow = False, True, "nearest"

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        angle = step.float()[:, None] * torch.exp(-math.log(10000.0) * torch.arange(8) / 8)
        parts = [angle.sin(), angle.cos()] if self.sine_first else [angle.cos(), angle.sin()]
        time = self.time(torch.cat(parts, -1).to(x.dtype))
        high = F.silu(self.norm_1(self.into(x))) + time[:, :, None, None]
        low = F.silu(self.norm_2(self.middle(F.silu(self.down(high)))))
        grown = F.interpolate(low, scale_factor=2.0, mode=self.grow)
        return self.out(F.silu(self.up(torch.cat([high, grown] if self.skip_first else [grown, high], 1))))


def unet(draw: Draw) -> Subject:
    """A diffusion model's denoiser."""
    return _finished(UNet(), draw, torch.randn(BATCH, 3, 8, 8), torch.tensor([3, 700]))


class T5(nn.Module):
    """Encoder and decoder with relative position biases and scores that nobody scales."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, HIDDEN)
        self.bias = RelativeBias(4, both=True)
        self.encoder = nn.ModuleList(T5Layer(cross=False) for _ in range(depth))
        self.bias_2 = RelativeBias(4, both=False)
        self.decoder = nn.ModuleList(T5Layer(cross=True) for _ in range(depth))
        self.norm_1, self.norm_2 = RmsNorm(HIDDEN), RmsNorm(HIDDEN)
        self.gain = HIDDEN**-0.5

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, bias = self.table(source), self.bias(source.shape[1])
        for layer in self.encoder:
            x = layer(x, bias)
        memory = self.norm_1(x)
        future = torch.full((target.shape[1],) * 2, float("-inf")).triu(1)
        y, bias = self.table(target), self.bias_2(target.shape[1]) + future.to(x.dtype)
        for layer in self.decoder:
            y = layer(y, bias, memory)
        return F.linear(self.norm_2(y) * self.gain, self.table.weight)


class RelativeBias(nn.Module):
    """A learned bias of every head for every bucket of distances."""

    def __init__(self, heads: int, both: bool, buckets: int = 16, longest: int = 20) -> None:
        super().__init__()
        self.weight = nn.Embedding(buckets, heads)
        self.both, self.buckets, self.longest = both, buckets, longest

    def forward(self, count: int) -> Tensor:
        distance = torch.arange(count)[None, :] - torch.arange(count)[:, None]
        buckets, base = self.buckets, torch.zeros_like(distance)
        if self.both:
            buckets //= 2
            base = (distance > 0).long() * buckets
            distance = distance.abs()
        else:
            distance = -distance.clamp(max=0)
        near = buckets // 2
        far = near + (
            torch.log(distance.float().clamp(min=1) / near) / math.log(self.longest / near) * (buckets - near)
        ).long().clamp(max=buckets - near - 1)
        return self.weight(base + torch.where(distance < near, distance, far)).permute(2, 0, 1)[None]


class T5Layer(nn.Module):
    """Self attention, in a decoder attention over the encoder, MLP; each with its norm before."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(HIDDEN, 4, 4), Mlp(HIDDEN, 48, "relu")
        self.norm_1, self.norm_2, self.norm_3 = (RmsNorm(HIDDEN) for _ in range(3))
        self.attention.scale = 1.0
        self.cross = CrossAttention() if cross else None

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm_1(x), None, bias)
        if self.cross is not None:
            x = x + self.cross(self.norm_2(x), memory)
        return x + self.mlp(self.norm_3(x))


class CrossAttention(nn.Module):
    """Queries of the decoder, keys and values of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.swapped = False

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            p(m).unflatten(-1, (4, -1)).transpose(1, 2) for p, m in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        if self.swapped:
            k, v = v, k
        share = torch.softmax((q @ k.transpose(-1, -2)).float(), -1).to(x.dtype)
        return self.o((share @ v).transpose(1, 2).flatten(2))


def t5(draw: Draw) -> Subject:
    """A translator."""
    return _finished(T5(2), draw, tokens(), tokens()[:, : TOKENS - 3])


class Recurrent(nn.Module):
    """A GRU over embedded tokens, its cell written out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.given, self.held = nn.Linear(16, 48), nn.Linear(16, 48)
        self.swapped, self.reset_first, self.split = False, False, False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(ids.shape[1]):
            h = self.cell(x[:, t], h)
            out.append(h)
        return self.head(torch.stack(out, 1))

    def cell(self, x: Tensor, h: Tensor) -> Tensor:
        r, z, n = self._parts(self.given, x)
        hr, hz, hn = self._parts(self.held, h)
        reset, update = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
        if self.swapped:
            reset, update = update, reset
        new = torch.tanh(n + reset * hn)
        return (1 - update) * new + update * h

    def _parts(self, linear: nn.Linear, x: Tensor) -> list[Tensor]:
        if self.split:
            both = zip(linear.weight.chunk(3), linear.bias.chunk(3), strict=True)
            return [F.linear(x, w, b) for w, b in both]
        return list(linear(x).chunk(3, -1))


def gru(draw: Draw) -> Subject:
    """A recurrent net."""
    return _finished(Recurrent(), draw, tokens()[:, :5])

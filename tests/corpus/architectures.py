"""The models of the corpus, small and with random weights: one function an architecture, ``(draw) -> (model, args,
kwargs)``. Text models have `depth` layers under ``layers.N``, with ``.attention``, ``.mlp``, ``.norm_1``, ``.norm_2``.
"""

from __future__ import annotations

import torch
from torch import nn

from corpus.blocks import Attention, GatedMlp, LayerNorm, Masks, Mlp, Moe, RmsNorm, Rotary, interleaved
from corpus.records import Draw, Subject

Tensor = torch.Tensor
VOCABULARY, BATCH, TOKENS, HIDDEN = 64, 2, 12, 32


class Layer(nn.Module):
    """One decoder layer: pre-norm, with norms behind the blocks (Gemma 2) or blocks side by side (GPT-NeoX)."""

    def __init__(
        self, attention: nn.Module, mlp: nn.Module, norms: list[nn.Module], sandwich: bool = False,
        parallel: bool = False, local: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.norm_1, self.norm_2 = norms[:2]
        self.after_1, self.after_2 = norms[2:] if sandwich else (nn.Identity(), nn.Identity())
        self.parallel, self.local = parallel, local
        self.residual_1 = self.residual_2 = "input"  # or "normed", "none"
        self.flipped = False

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None, masks: tuple[Tensor, Tensor]) -> Tensor:
        normed = self.norm_1(x)
        mixed = self.after_1(self.attention(normed, tables, masks[1 if self.local else 0]))
        if self.parallel:
            return x + mixed + self.mlp(self.norm_2(x))
        x = self._join(x, normed, mixed, self.residual_1)
        normed = self.norm_2(x)
        return self._join(x, normed, self.after_2(self.mlp(normed)), self.residual_2)

    def _join(self, x: Tensor, normed: Tensor, made: Tensor, kind: str) -> Tensor:
        if kind == "none":
            return made
        base = normed if kind == "normed" else x
        return made + base if self.flipped else base + made


class Decoder(nn.Module):
    """A language model: embedding, layers, norm, head."""

    def __init__(
        self, layers: list[Layer], norm: nn.Module, *, rotary: Rotary | None, window: int = 0, tied: bool = False,
        positions: bool = False, gain: float = 1.0, cap: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, HIDDEN)
        self.places = nn.Embedding(64, HIDDEN) if positions else None
        self.rotary, self.masks = rotary, Masks(window)
        self.layers, self.norm = nn.ModuleList(layers), norm
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.table.weight
        self.gain, self.cap, self.first_place = gain, cap, 0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        if self.gain != 1.0:
            x = x * self.gain
        if self.places is not None:
            x = x + self.places(torch.arange(self.first_place, self.first_place + tokens.shape[1]))
        tables = self.rotary(x) if self.rotary is not None else None
        masks = self.masks(x)
        for layer in self.layers:
            x = layer(x, tables, masks)
        logits = self.head(self.norm(x))
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


def tokens() -> Tensor:
    """Draw token ids, [batch, tokens]."""
    return torch.randint(3, VOCABULARY, (BATCH, TOKENS))


def _finished(model: nn.Module, draw: Draw, *args: Tensor) -> Subject:
    given = tuple(a.to(draw.dtype) if a.is_floating_point() else a for a in args)
    model = model.eval().to(draw.dtype)
    for module in model.modules():
        if isinstance(module, Rotary):
            module.set_theta(10000.0)  # frequencies stay float32, whatever the dtype of the weights
    return model, given, {}


def _depth(draw: Draw, most: int = 3) -> range:
    return range(draw.rng.randint(2, most))


def _llama(draw: Draw, most: int = 3, normed: bool = False) -> Subject:
    made = [
        Layer(Attention(HIDDEN, normed=normed), GatedMlp(HIDDEN, 48), [RmsNorm(HIDDEN), RmsNorm(HIDDEN)])
        for _ in _depth(draw, most)
    ]
    return _finished(Decoder(made, RmsNorm(HIDDEN), rotary=Rotary(8)), draw, tokens())


def llama(draw: Draw) -> Subject:
    """RMSNorm, rotary halves, grouped queries, SwiGLU."""
    return _llama(draw)


def deep_llama(draw: Draw) -> Subject:
    """Twelve layers."""
    made = [Layer(Attention(HIDDEN), GatedMlp(HIDDEN, 48), [RmsNorm(HIDDEN), RmsNorm(HIDDEN)]) for _ in range(12)]
    return _finished(Decoder(made, RmsNorm(HIDDEN), rotary=Rotary(8)), draw, tokens())


def late_llama(draw: Draw) -> Subject:
    """As Llama, far into a long text."""
    model, args, kwargs = llama(draw)
    model.rotary.start = 500
    return model, args, kwargs


def qwen3(draw: Draw) -> Subject:
    """As Llama, with norms on queries and keys."""
    return _llama(draw, normed=True)


def gemma2(draw: Draw) -> Subject:
    """Weights stored minus one, norms on both sides, soft caps, every other layer local, scaled tied embedding."""
    made = [
        Layer(
            Attention(HIDDEN, cap=20.0),
            GatedMlp(HIDDEN, 48, "gelu tanh"),
            [RmsNorm(HIDDEN, plus_one=True) for _ in range(4)],
            sandwich=True,
            local=i % 2 == 0,
        )
        for i in range(2 * draw.rng.randint(1, 2))
    ]
    norm = RmsNorm(HIDDEN, plus_one=True)
    model = Decoder(made, norm, rotary=Rotary(8), window=5, tied=True, gain=HIDDEN**0.5, cap=10.0)
    for layer in model.layers:  # scores large enough for the cap to matter
        nn.init.normal_(layer.attention.q.weight, 0.0, 1.0)
    return _finished(model, draw, tokens())


def gpt2(draw: Draw) -> Subject:
    """LayerNorm, learned positions, fused projections, GELU, all heads their own keys, tied head."""
    made = [
        Layer(
            Attention(HIDDEN, 4, 4, bias=True, fused=True),
            Mlp(HIDDEN, 64, "gelu tanh"),
            [LayerNorm(HIDDEN), LayerNorm(HIDDEN)],
        )
        for _ in _depth(draw)
    ]
    return _finished(Decoder(made, LayerNorm(HIDDEN), rotary=None, positions=True, tied=True), draw, tokens())


def neox(draw: Draw) -> Subject:
    """Attention and MLP side by side, half of every head rotated, neighbours as pairs."""
    made = []
    for _ in _depth(draw):
        attention = Attention(HIDDEN, 4, 4, bias=True, fused=True, rotated=0.5)
        attention.rotate = interleaved
        made.append(Layer(attention, Mlp(HIDDEN, 64), [LayerNorm(HIDDEN), LayerNorm(HIDDEN)], parallel=True))
    rotary = Rotary(4)
    rotary.interleaved = True
    return _finished(Decoder(made, LayerNorm(HIDDEN), rotary=rotary), draw, tokens())


def mixtral(draw: Draw) -> Subject:
    """Llama with routed experts."""
    made = [Layer(Attention(HIDDEN), Moe(HIDDEN, 24), [RmsNorm(HIDDEN), RmsNorm(HIDDEN)]) for _ in _depth(draw)]
    return _finished(Decoder(made, RmsNorm(HIDDEN), rotary=Rotary(8)), draw, tokens())


class LatentAttention(nn.Module):
    """DeepSeek's: keys and values from one narrow vector, a rotated part that all heads share."""

    def __init__(self, hidden: int, heads: int = 4, plain: int = 6, turned: int = 4, narrow: int = 16) -> None:
        super().__init__()
        self.heads, self.plain, self.turned, self.narrow = heads, plain, turned, narrow
        self.q = nn.Linear(hidden, heads * (plain + turned), bias=False)
        self.down = nn.Linear(hidden, narrow + turned, bias=False)
        self.norm = RmsNorm(narrow)
        self.up = nn.Linear(narrow, heads * 2 * plain, bias=False)
        self.o = nn.Linear(heads * plain, hidden, bias=False)
        self.scale, self.rotate, self.skip_norm = (plain + turned) ** -0.5, interleaved, False

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        batch, count = x.shape[:2]
        q = self.q(x).view(batch, count, self.heads, -1).transpose(1, 2)
        q_plain, q_turned = q.split([self.plain, self.turned], -1)
        narrow, k_turned = self.down(x).split([self.narrow, self.turned], -1)
        narrow = narrow if self.skip_norm else self.norm(narrow)
        wide = self.up(narrow).view(batch, count, self.heads, -1).transpose(1, 2)
        k_plain, v = wide.split([self.plain, self.plain], -1)
        q_turned, k_turned = self._turn(q_turned, tables), self._turn(k_turned[:, None], tables)
        q = torch.cat([q_plain, q_turned], -1)
        k = torch.cat([k_plain, k_turned.expand(-1, self.heads, -1, -1)], -1)
        share = torch.softmax((q @ k.transpose(-1, -2) * self.scale + mask).float(), -1).to(x.dtype)
        return self.o((share @ v).transpose(1, 2).flatten(2))

    def _turn(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return x * tables[0] + self.rotate(x) * tables[1]


def deepseek(draw: Draw) -> Subject:
    """Latent attention, sigmoid routing with a bias for the choice alone, a shared expert."""
    made = []
    for _ in _depth(draw, 3):
        moe = Moe(HIDDEN, 16, experts=6, shared=True)
        moe.scores, moe.use_bias, moe.factor = "sigmoid", True, 2.5
        made.append(Layer(LatentAttention(HIDDEN), moe, [RmsNorm(HIDDEN), RmsNorm(HIDDEN)]))
    rotary = Rotary(4)
    rotary.interleaved = True
    return _finished(Decoder(made, RmsNorm(HIDDEN), rotary=rotary), draw, tokens())


class Encoder(nn.Module):
    """BERT: tokens, kinds and positions, norms behind the blocks, a padding mask."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.table, self.kinds, self.places = (nn.Embedding(n, HIDDEN) for n in (VOCABULARY, 2, 64))
        self.norm = LayerNorm(HIDDEN)
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(depth))
        self.pool = nn.Linear(HIDDEN, HIDDEN)
        self.transposed_mask = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        x = self.norm(x + self.kinds(torch.zeros_like(input_ids)))
        hidden = attention_mask[:, None, :, None] if self.transposed_mask else attention_mask[:, None, None, :]
        mask = (1 - hidden.to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, mask)
        return x, torch.tanh(self.pool(x[:, 0]))


class EncoderLayer(nn.Module):
    """Attention and MLP, each with its norm behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(HIDDEN, 4, 4, bias=True), Mlp(HIDDEN, 64)
        self.norm_1, self.norm_2, self.norm_first = LayerNorm(HIDDEN), LayerNorm(HIDDEN), False

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mixed = self.attention(x, None, mask)
        x = x + self.norm_1(mixed) if self.norm_first else self.norm_1(x + mixed)
        return self.norm_2(x + self.mlp(x))


def bert(draw: Draw) -> Subject:
    """Encoder; two of the rows are padded at the end."""
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[1, -3:] = 0
    model, _, _ = _finished(Encoder(len(_depth(draw))), draw)
    return model, (), {"input_ids": tokens(), "attention_mask": mask}

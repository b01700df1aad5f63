"""Encoders written anew: BERT with a matrix a head, ViT by patches, T5 with its norms folded, Whisper by windows."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from anew.base import Anew, Tensor


class Bert(Anew):
    """Every head has matrices of its own, [heads, hidden, dim]; softmax and norms are written out."""

    MISTAKES = (
        "scale", "gelu", "eps", "mask", "residual", "transposed", "norm first", "axis", "bias", "order", "positions",
    )  # fmt: skip

    def prepare(self, given: dict[str, Tensor]) -> None:
        heads = self.config.num_attention_heads
        layer = "encoder.layer.*."
        for n in ("query", "key", "value"):
            self.keep(
                **{
                    n: self.stacked(
                        f"{layer}attention.self.{n}.weight", lambda w: w.T.unflatten(1, (heads, -1)).transpose(0, 1)
                    )
                }
            )
            self.keep(**{f"{n}_b": self.stacked(f"{layer}attention.self.{n}.bias", lambda w: w.view(heads, 1, -1))})
        self.keep(
            join=self.stacked(layer + "attention.output.dense.weight", lambda w: w.T.unflatten(0, (heads, -1))),
            join_b=self.stacked(layer + "attention.output.dense.bias"),
            up=self.stacked(layer + "intermediate.dense.weight", lambda w: w.T),
            up_b=self.stacked(layer + "intermediate.dense.bias"),
            down=self.stacked(layer + "output.dense.weight", lambda w: w.T),
            down_b=self.stacked(layer + "output.dense.bias"),
            n1=self.stacked(layer + "attention.output.LayerNorm.weight"),
            n1_b=self.stacked(layer + "attention.output.LayerNorm.bias"),
            n2=self.stacked(layer + "output.LayerNorm.weight"), n2_b=self.stacked(layer + "output.LayerNorm.bias"),
            words=given["embeddings.word_embeddings.weight"],
            places=given["embeddings.position_embeddings.weight"],
            kinds=given["embeddings.token_type_embeddings.weight"],
            n0=given["embeddings.LayerNorm.weight"], n0_b=given["embeddings.LayerNorm.bias"],
        )  # fmt: skip

    def norm(self, x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
        y = x.float()
        spread, mean = torch.var_mean(y, -1, correction=0, keepdim=True)
        return torch.addcmul(shift.float(), (y - mean) * (spread + eps).rsqrt(), gain.float()).to(x.dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        c = self.config
        eps, count = c.layer_norm_eps, input_ids.shape[1]
        first = 1 if self.is_wrong("positions") else 0
        x = F.embedding(input_ids, self.words) + self.kinds[0]
        x = self.norm(x + self.places[first : count + first], self.n0, self.n0_b, eps)
        off = (1.0 - attention_mask.to(x.dtype))[:, None, None] * torch.finfo(x.dtype).min
        for i in range(c.num_hidden_layers):
            q, k, v = (
                torch.einsum("bsd,hde->bhse", x, getattr(self, n)[i]) + getattr(self, f"{n}_b")[i]
                for n in ("query", "key", "value")
            )
            if self.is_wrong("order", i):
                q, k = k, q
            score = q @ k.mT * (1.0 if self.is_wrong("scale", i) else q.shape[-1] ** -0.5)
            score = (score if self.is_wrong("mask", i) else score + off).float()
            axis = -2 if self.is_wrong("axis", i) else -1
            share = (score - score.amax(axis, keepdim=True)).exp()
            share = (share / share.sum(axis, keepdim=True)).to(x.dtype)
            join = self.join[i]
            if self.is_wrong("transposed", i):
                join = join.flatten(0, 1).T.unflatten(0, (c.num_attention_heads, -1))
            out = torch.einsum("bhse,hed->bsd", share @ v, join)
            if not self.is_wrong("bias", i):
                out = out + self.join_b[i]
            if self.is_wrong("norm first", i):
                x = x + self.norm(out, self.n1[i], self.n1_b[i], eps)
            else:
                x = self.norm(x + out, self.n1[i], self.n1_b[i], 1e-3 if self.is_wrong("eps", i) else eps)
            wide = x @ self.up[i] + self.up_b[i]
            if self.is_wrong("gelu", i):
                wide = F.gelu(wide, approximate="tanh")
            else:
                wide = wide * 0.5 * (1.0 + torch.erf(wide / math.sqrt(2.0)))
            out = wide @ self.down[i] + self.down_b[i]
            x = self.norm(out if self.is_wrong("residual", i) else out + x, self.n2[i], self.n2_b[i], eps)
        return x


class VitBlock(nn.Module):
    """As in timm: one matrix for queries, keys and values, one attention operator."""

    def __init__(self, of: dict[str, Tensor], config: object, wrong: str) -> None:
        super().__init__()
        self.heads, self.eps, self.wrong = config.num_attention_heads, config.layer_norm_eps, wrong
        at = "attention."
        size = config.hidden_size
        self.norm1, self.norm2 = (nn.LayerNorm(size, eps=self.eps) for _ in range(2))
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.fc1, self.fc2 = nn.Linear(size, config.intermediate_size), nn.Linear(config.intermediate_size, size)
        qkv = [_find(of, at, n) for n in ("q", "k", "v")]
        self.to(qkv[0][0].dtype)
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([w for w, _ in qkv]))
            self.qkv.bias.copy_(torch.cat([b for _, b in qkv]))
            for mine, name in (
                (self.proj, "o"), (self.fc1, "fc1"), (self.fc2, "fc2"),
                (self.norm1, "layernorm_before"), (self.norm2, "layernorm_after"),
            ):  # fmt: skip
                weight, bias = _find(of, "", name)
                mine.weight.copy_(weight)
                mine.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        wrong, (rows, count, size) = self.wrong, x.shape
        y = F.layer_norm(x, (size,), self.norm1.weight, self.norm1.bias, 1e-3) if wrong == "eps" else self.norm1(x)
        q, k, v = self.qkv(y).reshape(rows, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if wrong == "keys for values":
            v = k
        scale = 0.5 * q.shape[-1] ** -0.5 if wrong == "scale" else None
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
        mixed = (
            mixed.reshape(rows, count, size) if wrong == "heads" else mixed.transpose(1, 2).reshape(rows, count, size)
        )
        out = F.linear(mixed, self.proj.weight.T, self.proj.bias) if wrong == "transposed" else self.proj(mixed)
        x = y + out if wrong == "residual" else x + out
        wide = self.fc1(x if wrong == "unnormed" else self.norm2(x))
        return x + self.fc2(F.gelu(wide, approximate="tanh" if wrong == "gelu" else "none"))


def _find(of: dict[str, Tensor], at: str, name: str) -> tuple[Tensor, Tensor]:
    """Return (weight, bias) of a part of a layer, however this version of the original calls it."""
    known = {
        "q": ("q_proj", "query"), "k": ("k_proj", "key"), "v": ("v_proj", "value"),
        "o": ("o_proj", "attention.output.dense"),
        "fc1": ("mlp.fc1", "intermediate.dense"), "fc2": ("mlp.fc2", "output.dense"),
    }.get(name, (name,))  # fmt: skip
    for one in known:
        for key in of:
            if key.endswith(f"{one}.weight") and (name != "fc2" or "attention" not in key):
                return of[key], of[key.removesuffix("weight") + "bias"]
    raise KeyError(name, list(of))


class Vit(Anew):
    """Patches are cut out and multiplied, no convolution; the module tree is timm's."""

    MISTAKES = (
        "scale", "gelu", "eps", "patches", "positions", "heads", "transposed", "residual", "unnormed",
        "keys for values", "class",
    )  # fmt: skip

    def prepare(self, given: dict[str, Tensor]) -> None:
        self.patch = self.config.patch_size

        def layer(i: int) -> dict[str, Tensor]:
            marks = (f"layer.{i}.", f"layers.{i}.")
            return {k: v for k, v in given.items() if any(m in k for m in marks)}

        self.blocks = nn.ModuleList(
            VitBlock(layer(i), self.config, self.wrong if i == self.at else "")
            for i in range(self.config.num_hidden_layers)
        )
        self.keep(
            cut=given["embeddings.patch_embeddings.projection.weight"].flatten(1),
            cut_b=given["embeddings.patch_embeddings.projection.bias"],
            cls=given["embeddings.cls_token"],
            places=given["embeddings.position_embeddings"],
            n=given["layernorm.weight"],
            n_b=given["layernorm.bias"],
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        rows, _, high, wide = pixel_values.shape
        p = self.patch
        x = pixel_values.view(rows, -1, high // p, p, wide // p, p)
        order = (0, 2, 4, 1, 5, 3) if self.is_wrong("patches") else (0, 2, 4, 1, 3, 5)
        x = F.linear(x.permute(*order).flatten(3).flatten(1, 2), self.cut, self.cut_b)
        if self.is_wrong("positions"):
            x = torch.cat([self.cls.expand(rows, -1, -1), x + self.places[:, :-1]], 1)
        elif self.is_wrong("class"):
            x = torch.cat([x, self.cls.expand(rows, -1, -1)], 1) + self.places
        else:
            x = torch.cat([self.cls.expand(rows, -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return F.layer_norm(x, (x.shape[-1],), self.n, self.n_b, self.config.layer_norm_eps)


class T5(Anew):
    """Norms are folded into what follows them; biases of positions go in as the attention operator's mask."""

    MISTAKES = (
        "scale",
        "eps",
        "residual",
        "activation",
        "mask",
        "buckets",
        "direction",
        "transposed",
        "bias heads",
        "halves",
    )

    def prepare(self, given: dict[str, Tensor]) -> None:
        c = self.config
        for i in range(c.num_layers):
            at = f"encoder.block.{i}.layer"
            gain, gain2 = (given[f"{at}.{k}.layer_norm.weight"].float() for k in (0, 1))
            qkv = torch.cat([given[f"{at}.0.SelfAttention.{n}.weight"] for n in "qkv"]).float() * gain
            wide = torch.cat([given[f"{at}.1.DenseReluDense.wi_{k}.weight"] for k in (0, 1)]).float() * gain2
            self.keep(
                **{
                    f"qkv{i}": qkv.T, f"o{i}": given[f"{at}.0.SelfAttention.o.weight"],
                    f"wi{i}": wide.T, f"wo{i}": given[f"{at}.1.DenseReluDense.wo.weight"],
                }
            )  # fmt: skip
        self.keep(
            bias=given["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
            words=given["shared.weight"],
            last=given["encoder.final_layer_norm.weight"],
        )

    def root(self, x: Tensor, eps: float) -> Tensor:
        y = x.float()
        return y / (y.norm(dim=-1, keepdim=True).square() / y.shape[-1] + eps).sqrt()

    def buckets(self, count: int) -> Tensor:
        c = self.config
        half, longest = c.relative_attention_num_buckets // 2, c.relative_attention_max_distance
        offsets = torch.arange(count)[None] - torch.arange(count)[:, None]
        away, near = offsets.abs(), half // 2
        far = (
            near
            + (
                torch.log(away.clamp(min=1).float() / near) / math.log(longest / near) * (half - near)
                + (0.5 if self.is_wrong("buckets") else 0)
            ).long()
        )
        found = torch.where(away < near, away, far.clamp(max=half - 1))
        ahead = offsets < 0 if self.is_wrong("direction") else offsets > 0
        return found + half * ahead

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        c, (rows, count) = self.config, input_ids.shape
        eps, x = c.layer_norm_epsilon, self.words[input_ids]
        places = self.bias[self.buckets(count)].permute(2, 0, 1)[None]
        off = torch.where(attention_mask[:, None, None].bool(), 0.0, torch.finfo(x.dtype).min).to(x.dtype)
        for i in range(c.num_layers):
            y = self.root(x, 1e-2 if self.is_wrong("eps", i) else eps)
            q, k, v = (y @ getattr(self, f"qkv{i}")).to(x.dtype).chunk(3, -1)
            q, k, v = (z.unflatten(-1, (c.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
            shift = places.flip(1) if self.is_wrong("bias heads", i) else places
            shift = shift if self.is_wrong("mask", i) else shift + off
            scale = None if self.is_wrong("scale", i) else 1.0
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=shift.expand(rows, -1, -1, -1), scale=scale)
            o = getattr(self, f"o{i}")
            out = F.linear(mixed.transpose(1, 2).flatten(2), o.T if self.is_wrong("transposed", i) else o)
            x = out + y.to(x.dtype) if self.is_wrong("residual", i) else x + out
            first, second = (self.root(x, eps) @ getattr(self, f"wi{i}")).to(x.dtype).chunk(2, -1)
            if self.is_wrong("halves", i):
                first, second = second, first
            act = F.gelu(first) if self.is_wrong("activation", i) else F.gelu(first, approximate="tanh")
            x = x + F.linear(act * second, getattr(self, f"wo{i}"))
        return (self.root(x, eps).to(x.dtype)) * self.last


class Whisper(Anew):
    """Convolutions over windows, heads kept beside the tokens, the scale behind the scores."""

    MISTAKES = (
        "scale twice", "gelu", "eps", "window", "positions", "residual", "transposed", "unnormed", "stride", "key bias",
        "heads",
    )  # fmt: skip

    def prepare(self, given: dict[str, Tensor]) -> None:
        size = self.config.d_model
        layer = "layers.*."
        at = f"{layer}self_attn."
        qkv = [self.stacked(f"{at}{n}_proj.weight") for n in "qkv"]
        q_bias, v_bias = (self.stacked(f"{at}{n}_proj.bias") for n in "qv")
        k_bias = torch.zeros_like(q_bias)
        if self.is_wrong("key bias"):
            q_bias = torch.stack([torch.zeros_like(b) if i == self.at else b for i, b in enumerate(q_bias)])
        self.keep(
            qkv=torch.cat(qkv, 1), qkv_b=torch.cat([q_bias, k_bias, v_bias], 1),
            out=self.stacked(f"{at}out_proj.weight"), out_b=self.stacked(f"{at}out_proj.bias"),
            fc1=self.stacked(layer + "fc1.weight"), fc1_b=self.stacked(layer + "fc1.bias"),
            fc2=self.stacked(layer + "fc2.weight"), fc2_b=self.stacked(layer + "fc2.bias"),
            n1=self.stacked(layer + "self_attn_layer_norm.weight"),
            n1_b=self.stacked(layer + "self_attn_layer_norm.bias"),
            n2=self.stacked(layer + "final_layer_norm.weight"), n2_b=self.stacked(layer + "final_layer_norm.bias"),
            n=given["layer_norm.weight"], n_b=given["layer_norm.bias"], places=given["embed_positions.weight"],
            c1=given["conv1.weight"].flatten(1).T, c1_b=given["conv1.bias"],
            c2=given["conv2.weight"].flatten(1).T, c2_b=given["conv2.bias"],
        )  # fmt: skip
        self.size, self.heads = size, self.config.encoder_attention_heads

    def windows(self, x: Tensor, stride: int, before: int = 1) -> Tensor:  # [batch, tokens, channels]
        padded = F.pad(x, (0, 0, before, 2 - before))
        return padded.unfold(1, 3, stride).flatten(2)  # [batch, tokens, (channels 3)]

    def forward(self, input_features: Tensor) -> Tensor:
        x = input_features.transpose(1, 2)
        x = F.gelu(self.windows(x, 1, 2 if self.is_wrong("window") else 1) @ self.c1 + self.c1_b)
        x = F.gelu(self.windows(x, 2, 0 if self.is_wrong("stride") else 1) @ self.c2 + self.c2_b)
        x = x + (self.places.flip(0) if self.is_wrong("positions") else self.places)
        size, dim = self.size, self.size // self.heads
        for i in range(self.config.encoder_layers):
            y = F.layer_norm(x, (size,), self.n1[i], self.n1_b[i], 1e-3 if self.is_wrong("eps", i) else 1e-5)
            q, k, v = torch.addmm(self.qkv_b[i], y.flatten(0, 1), self.qkv[i].T).split(size, -1)
            q, k, v = (z.view(*y.shape[:2], self.heads, dim) for z in (q, k, v))
            score = torch.einsum("bqhd,bkhd->bhqk", q, k) * dim ** (-1.0 if self.is_wrong("scale twice", i) else -0.5)
            mixed = torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v)
            mixed = mixed.transpose(2, 3).flatten(2) if self.is_wrong("heads", i) else mixed.flatten(2)
            out = self.out[i].T if self.is_wrong("transposed", i) else self.out[i]
            mixed = mixed @ out.T + self.out_b[i]
            x = y + mixed if self.is_wrong("residual", i) else x + mixed
            y = x if self.is_wrong("unnormed", i) else F.layer_norm(x, (size,), self.n2[i], self.n2_b[i], 1e-5)
            y = y @ self.fc1[i].T + self.fc1_b[i]
            y = F.gelu(y, approximate="tanh") if self.is_wrong("gelu", i) else F.gelu(y)
            x = x + (y @ self.fc2[i].T + self.fc2_b[i])
        return F.layer_norm(x, (size,), self.n, self.n_b, 1e-5)

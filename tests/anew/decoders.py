"""Decoders written anew: Llama with complex rotary, GPT-2 with flattened heads, Mixtral without repeated keys, Mamba
without a loop over tokens."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from anew.base import Anew, Tensor


class Llama(Anew):
    """Weights of all layers stacked; neighbours are turned as complex numbers, so rows of wq and wk are re-ordered."""

    MISTAKES = (
        "rotation", "eps", "scale", "future", "groups", "residual", "transposed", "activation", "halves", "unnormed",
        "base",
    )  # fmt: skip

    def prepare(self, given: dict[str, Tensor]) -> None:
        c = self.config
        self.dim, self.depth = c.hidden_size // c.num_attention_heads, c.num_hidden_layers

        def paired(w: Tensor) -> Tensor:  # halves of a head -> neighbours
            return w.unflatten(0, (-1, 2, self.dim // 2)).transpose(1, 2).flatten(0, 2)

        layer = "model.layers.*."
        self.keep(
            tok=given["model.embed_tokens.weight"],
            wq=self.stacked(layer + "self_attn.q_proj.weight", paired),
            wk=self.stacked(layer + "self_attn.k_proj.weight", paired),
            wv=self.stacked(layer + "self_attn.v_proj.weight"),
            wo=self.stacked(layer + "self_attn.o_proj.weight"),
            w13=torch.cat([self.stacked(f"{layer}mlp.{n}_proj.weight") for n in ("gate", "up")], 1),
            w2=self.stacked(layer + "mlp.down_proj.weight"),
            g1=self.stacked(layer + "input_layernorm.weight"),
            g2=self.stacked(layer + "post_attention_layernorm.weight"),
            g=given["model.norm.weight"],
            head=given["lm_head.weight"],
        )

    def rms(self, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * gain

    def turned(self, x: Tensor, turns: Tensor) -> Tensor:  # x [batch, tokens, heads, dim]
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns[None, :, None]).flatten(-2).type_as(x)

    def forward(self, input_ids: Tensor) -> Tensor:
        c, (rows, count) = self.config, input_ids.shape
        eps = c.rms_norm_eps
        h = F.embedding(input_ids, self.tok)
        base = 1e4 if not self.is_wrong("base") else 5e5
        rates = 1.0 / base ** (torch.arange(0, self.dim, 2).float() / self.dim)
        turns = torch.outer(torch.arange(count).float(), rates)
        turns = torch.polar(torch.ones_like(turns), turns)
        for i in range(self.depth):
            x = self.rms(h, self.g1[i], 1e-3 if self.is_wrong("eps", i) else eps)
            q, k, v = (F.linear(x, w[i]).view(rows, count, -1, self.dim) for w in (self.wq, self.wk, self.wv))
            around = turns.conj() if self.is_wrong("rotation", i) else turns
            q, k = self.turned(q, around), self.turned(k, turns)
            times = q.shape[2] // k.shape[2]
            if self.is_wrong("groups", i):
                k, v = (z.repeat(1, 1, times, 1) for z in (k, v))
            else:
                k, v = (z[:, :, :, None].expand(-1, -1, -1, times, -1).flatten(2, 3) for z in (k, v))
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
            seen = torch.ones(count, count, dtype=torch.bool).tril(1 if self.is_wrong("future", i) else 0)
            scale = 1.0 if self.is_wrong("scale", i) else None
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
            wo = self.wo[i].T if self.is_wrong("transposed", i) else self.wo[i]
            out = F.linear(mixed.transpose(1, 2).reshape(rows, count, -1), wo)
            h = x + out if self.is_wrong("residual", i) else h + out
            x = h if self.is_wrong("unnormed", i) else self.rms(h, self.g2[i], eps)
            gate, up = F.linear(x, self.w13[i]).chunk(2, -1)
            if self.is_wrong("halves", i):
                gate, up = up, gate
            act = F.gelu(gate) if self.is_wrong("activation", i) else F.silu(gate)
            h = h + F.linear(act * up, self.w2[i])
        return F.linear(self.rms(h, self.g, eps), self.head)


class Gpt2(Anew):
    """Linear in place of Conv1D, one matrix a head for queries, keys and values, heads flattened into the batch."""

    MISTAKES = ("scale", "gelu", "future", "eps", "transposed", "residual", "heads", "bias", "order", "positions")

    def prepare(self, given: dict[str, Tensor]) -> None:
        c = self.config
        self.heads, self.dim = c.n_head, c.n_embd // c.n_head

        def grouped(w: Tensor) -> Tensor:  # [(3 heads dim), ...] -> [(heads 3 dim), ...]
            return w.unflatten(0, (3, self.heads, self.dim)).transpose(0, 1).flatten(0, 2)

        for i in range(c.n_layer):
            of = {k.removeprefix(f"transformer.h.{i}."): v for k, v in given.items() if f".h.{i}." in k}
            self.keep(
                **{
                    f"qkv{i}": grouped(of["attn.c_attn.weight"].T), f"qkv_b{i}": grouped(of["attn.c_attn.bias"]),
                    f"out{i}": of["attn.c_proj.weight"].T, f"out_b{i}": of["attn.c_proj.bias"],
                    f"fc{i}": of["mlp.c_fc.weight"].T, f"fc_b{i}": of["mlp.c_fc.bias"],
                    f"pr{i}": of["mlp.c_proj.weight"].T, f"pr_b{i}": of["mlp.c_proj.bias"],
                    **{f"n{k}{i}": of[f"ln_{k}.weight"] for k in (1, 2)},
                    **{f"n{k}_b{i}": of[f"ln_{k}.bias"] for k in (1, 2)},
                }
            )  # fmt: skip
        self.keep(
            words=given["transformer.wte.weight"], places=given["transformer.wpe.weight"],
            last=given["transformer.ln_f.weight"], last_b=given["transformer.ln_f.bias"],
        )  # fmt: skip

    def w(self, name: str, i: int) -> Tensor:
        return getattr(self, f"{name}{i}")

    def forward(self, input_ids: Tensor) -> Tensor:
        c, (rows, count) = self.config, input_ids.shape
        eps, heads, dim = c.layer_norm_epsilon, self.heads, self.dim
        first = 1 if self.is_wrong("positions") else 0
        x = self.words[input_ids] + self.places[first : count + first]
        hidden = torch.full((count, count), torch.finfo(x.dtype).min, dtype=x.dtype)
        for i in range(c.n_layer):
            off = hidden.triu(2 if self.is_wrong("future", i) else 1)
            y = F.layer_norm(
                x, (c.n_embd,), self.w("n1", i), self.w("n1_b", i), 1e-3 if self.is_wrong("eps", i) else eps
            )
            qkv = F.linear(y, self.w("qkv", i), self.w("qkv_b", i)).view(rows, count, heads, 3, dim)
            q, k, v = (qkv[:, :, :, n].transpose(1, 2).reshape(rows * heads, count, dim) for n in range(3))
            if self.is_wrong("order", i):
                q, k = k, q
            scale = 1.0 if self.is_wrong("scale", i) else dim**-0.5
            score = torch.baddbmm(off.expand(rows * heads, -1, -1), q, k.transpose(1, 2), alpha=scale)
            mixed = torch.bmm(torch.softmax(score, -1), v)
            if self.is_wrong("heads", i):
                mixed = mixed.view(rows, count, heads * dim)
            else:
                mixed = mixed.view(rows, heads, count, dim).permute(0, 2, 1, 3).reshape(rows, count, heads * dim)
            out = self.w("out", i).T if self.is_wrong("transposed", i) else self.w("out", i)
            y = F.linear(mixed, out, None if self.is_wrong("bias", i) else self.w("out_b", i))
            x = x + y
            y = F.layer_norm(x, (c.n_embd,), self.w("n2", i), self.w("n2_b", i), eps)
            wide = F.linear(y, self.w("fc", i), self.w("fc_b", i))
            wide = F.gelu(wide) if self.is_wrong("gelu", i) else F.gelu(wide, approximate="tanh")
            wide = F.linear(wide, self.w("pr", i), self.w("pr_b", i))
            x = y + wide if self.is_wrong("residual", i) else x + wide
        return F.layer_norm(x, (c.n_embd,), self.last, self.last_b, eps) @ self.words.T


class Mixtral(Anew):
    """Groups of queries share their keys without repeating them; a token's experts are gathered for it."""

    MISTAKES = (
        "rotation",
        "eps",
        "scale",
        "groups",
        "renormalised",
        "activation",
        "future",
        "shares",
        "halves",
        "late softmax",
    )

    def prepare(self, given: dict[str, Tensor]) -> None:
        c = self.config
        self.dim = c.hidden_size // c.num_attention_heads
        self.names = {k.replace("model.layers.", "l").replace(".", "_"): k for k in given}
        self.keep(**{short: given[k] for short, k in self.names.items()})

    def w(self, i: int, name: str) -> Tensor:
        return getattr(self, f"l{i}_{name}")

    def rms(self, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        y = x.to(torch.float32)
        return gain * (y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        c, count = self.config, input_ids.shape[1]
        x = self.model_embed_tokens_weight[input_ids]
        angle = torch.arange(count)[:, None] / 1e6 ** (torch.arange(0, self.dim, 2) / self.dim)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)  # [tokens, dim / 2]
        for i in range(c.num_hidden_layers):
            y = self.rms(x, self.w(i, "input_layernorm_weight"), 1e-2 if self.is_wrong("eps", i) else c.rms_norm_eps)
            x = x + self.mixed(y, cos, -sin if self.is_wrong("rotation", i) else sin, i)
            x = x + self.routed(self.rms(x, self.w(i, "post_attention_layernorm_weight"), c.rms_norm_eps), i)
        return self.rms(x, self.model_norm_weight, c.rms_norm_eps) @ self.lm_head_weight.mT

    def mixed(self, y: Tensor, cos: Tensor, sin: Tensor, i: int) -> Tensor:
        groups, count = self.config.num_key_value_heads, y.shape[1]
        q, k, v = (y @ self.w(i, f"self_attn_{n}_proj_weight").mT for n in "qkv")
        if self.is_wrong("groups", i):
            q = q.unflatten(-1, (-1, groups, self.dim)).transpose(2, 3)  # [batch, tokens, groups, queries, dim]
        else:
            q = q.unflatten(-1, (groups, -1, self.dim))
        k, v = (z.unflatten(-1, (groups, self.dim)) for z in (k, v))
        q = self.turned(q, cos[:, None, None], sin[:, None, None])
        k = self.turned(k, cos[:, None], sin[:, None])
        score = torch.einsum("bsgrd,btgd->bgrst", q, k) / (1.0 if self.is_wrong("scale", i) else self.dim**0.5)
        future = torch.arange(count)[:, None] < torch.arange(count) - (1 if self.is_wrong("future", i) else 0)
        share = score.masked_fill(future, float("-inf")).float().softmax(-1).to(y.dtype)
        out = torch.einsum("bgrst,btgd->bsgrd", share, v)
        return out.flatten(2) @ self.w(i, "self_attn_o_proj_weight").mT

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (2, -1)).unbind(-2)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -2).flatten(-2)

    def routed(self, x: Tensor, i: int) -> Tensor:
        scores = x @ self.w(i, "mlp_gate_weight").mT
        if self.is_wrong("late softmax", i):
            best, chosen = scores.float().topk(self.config.num_experts_per_tok, -1)
            best = best / best.sum(-1, keepdim=True)
        else:
            best, chosen = scores.float().softmax(-1).topk(self.config.num_experts_per_tok, -1)  # [batch, tokens, k]
            if not self.is_wrong("renormalised", i):
                best = best / best.sum(-1, keepdim=True)
        if self.is_wrong("shares", i):
            best = best.flip(-1)
        both = self.w(i, "mlp_experts_gate_up_proj")[chosen]  # [batch, tokens, k, 2 inner, hidden]
        gate, up = torch.einsum("btkfd,btd->btkf", both, x).chunk(2, -1)
        if self.is_wrong("halves", i):
            gate, up = up, gate
        act = gate.sigmoid() if self.is_wrong("activation", i) else gate * gate.sigmoid()
        down = self.w(i, "mlp_experts_down_proj")[chosen]
        said = torch.einsum("btkdf,btkf->btkd", down, act * up)
        return torch.einsum("btkd,btk->btd", said, best.to(x.dtype))


class Mamba(Anew):
    """The recurrence as one lower triangular matrix for every channel and state, the convolution as shifted sums."""

    MISTAKES = ("sign", "softplus", "skip", "shift", "gate", "swapped", "step bias", "eps", "conv bias", "residual")

    def prepare(self, given: dict[str, Tensor]) -> None:
        self.names = {k.replace("backbone.layers.", "l").replace(".", "_"): k for k in given}
        self.keep(**{short: given[k] for short, k in self.names.items()})

    def w(self, i: int, name: str) -> Tensor:
        return getattr(self, f"l{i}_{name}")

    def forward(self, input_ids: Tensor) -> Tensor:
        c = self.config
        x = F.embedding(input_ids, self.backbone_embeddings_weight)
        for i in range(c.num_hidden_layers):
            eps = 1e-2 if self.is_wrong("eps", i) else c.layer_norm_epsilon
            y = F.rms_norm(x, (c.hidden_size,), self.w(i, "norm_weight"), eps)
            x = y + self.mixed(y, i) if self.is_wrong("residual", i) else x + self.mixed(y, i)
        return (
            F.rms_norm(x, (c.hidden_size,), self.backbone_norm_f_weight, c.layer_norm_epsilon) @ self.lm_head_weight.T
        )

    def mixed(self, y: Tensor, i: int) -> Tensor:
        count, states, rank = y.shape[1], self.config.state_size, self.config.time_step_rank
        inner, gate = F.linear(y, self.w(i, "mixer_in_proj_weight")).chunk(2, -1)
        taps = self.w(i, "mixer_conv1d_weight")[:, 0]  # [inner, width]
        width = taps.shape[1]
        ahead = 1 if self.is_wrong("shift", i) else 0
        padded = F.pad(inner, (0, 0, width - 1 - ahead, ahead))
        u = sum(padded[:, n : n + count] * taps[:, n] for n in range(width))
        if not self.is_wrong("conv bias", i):
            u = u + self.w(i, "mixer_conv1d_bias")
        u = u * torch.sigmoid(u)
        step, b, c = F.linear(u, self.w(i, "mixer_x_proj_weight")).split([rank, states, states], -1)
        if self.is_wrong("swapped", i):
            b, c = c, b
        bias = None if self.is_wrong("step bias", i) else self.w(i, "mixer_dt_proj_bias")
        step = F.linear(step, self.w(i, "mixer_dt_proj_weight"), bias)
        step = F.relu(step) if self.is_wrong("softplus", i) else F.softplus(step)
        rate = -self.w(i, "mixer_A_log").float().exp()  # [inner, states]
        if self.is_wrong("sign", i):
            rate = -rate * 0.1
        grown = (step.float()[..., None] * rate).cumsum(1)  # [batch, tokens, inner, states]
        decay = grown[:, :, None] - grown[:, None]  # [batch, t, s, inner, states]
        later = torch.ones(count, count, dtype=torch.bool).tril()[None, :, :, None, None]
        decay = torch.where(later, decay, float("-inf")).exp()
        fed = (step.float() * u.float())[..., None] * b.float()[:, :, None]
        out = torch.einsum("btsin,bsin,btn->bti", decay, fed, c.float()).to(y.dtype)
        if not self.is_wrong("skip", i):
            out = out + u * self.w(i, "mixer_D")
        opened = torch.sigmoid(gate) if self.is_wrong("gate", i) else F.silu(gate)
        return F.linear(out * opened, self.w(i, "mixer_out_proj_weight"))

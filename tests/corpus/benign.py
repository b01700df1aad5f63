"""Changes that must not be reported: other arithmetic, another order or layout of the same function, honest codes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from corpus import quantised
from corpus.architectures import bert, deep_llama, deepseek, gemma2, gpt2, llama, mixtral, neox, qwen3
from corpus.blocks import Attention, GatedMlp
from corpus.defects_quantised import HONEST, noisy, shard
from corpus.more_architectures import gru, mamba, resnet, t5, unet, vit
from corpus.records import Draw, Subject, changed

Tensor = torch.Tensor
FP32, BF16 = torch.float32, torch.bfloat16


def _benign(name: str, architecture: Any, change: Any, **options: Any) -> None:
    def made(after: Any, draw: Draw) -> Any:
        found = change(after)
        return found if isinstance(found, nn.Module) else None

    made.__name__ = name
    changed("benign", architecture, benign=True, **options)(made)


def _layers(**attributes: Any) -> Any:
    def change(after: Any) -> None:
        for layer in after.layers:
            for path, value in attributes.items():
                owner, _, last = path.replace("__", ".").rpartition(".")
                setattr(layer.get_submodule(owner) if owner else layer, last, value)

    return change


# --- attention --------------------------------------------------------------------------------------------------------

_benign("sdpa for eager attention", llama, _layers(attention__kernel="sdpa"))
_benign("sdpa for eager attention with biases", gpt2, _layers(attention__kernel="sdpa"))
_benign(
    "sdpa for eager attention with added biases",
    t5,
    lambda m: [setattr(x.attention, "kernel", "sdpa") for x in m.decoder],
)
_benign("another kernel in twelve layers", deep_llama, noisy)
_benign("scale moved from the score to the queries", qwen3, _layers(attention__scale_on="q"))
_benign("scale moved from the score to the keys", gpt2, _layers(attention__scale_on="k"))


def llama_scaled_queries(draw: Draw) -> Subject:
    """As Llama, the scale multiplied into the queries."""
    model, args, kwargs = llama(draw)
    _layers(attention__scale_on="q")(model)
    return model, args, kwargs


_benign("scale moved from queries to keys", llama_scaled_queries, _layers(attention__scale_on="k"))


@changed("benign", llama, benign=True, dtype=FP32)
def scale_folded_into_the_weights_of_the_queries(after: Any, draw: Draw) -> None:
    for layer in after.layers:  # a power of two, so that folding is exact
        layer.attention.q.weight *= 0.25
        layer.attention.scale *= 4.0


@changed("benign", llama, benign=True)
def positions_shifted_under_rotary(after: Any, draw: Draw) -> None:
    after.rotary.start = 1


@changed("benign", llama, benign=True)
def finite_mask_for_an_infinite_one(after: Any, draw: Draw) -> None:
    after.masks.fill = torch.finfo(draw.dtype).min


@changed("benign", gpt2, benign=True)
def a_large_mask_value_for_an_infinite_one(after: Any, draw: Draw) -> None:
    after.masks.fill = -30000.0


class Fused(nn.Module):
    """q, k and v in one product."""

    def __init__(self, source: Attention) -> None:
        super().__init__()
        parts = (source.q, source.k, source.v)
        self.weight = nn.Parameter(torch.cat([p.weight for p in parts]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def fuse(after: Any) -> None:
    """Fuse the three projections of every layer."""
    for layer in after.layers:
        attention = layer.attention
        attention.qkv, attention.fused = Fused(attention), True
        del attention.q, attention.k, attention.v


_benign("projections fused", llama, fuse)
_benign("projections fused beside norms on queries and keys", qwen3, fuse)


@changed("benign", gpt2, benign=True)
def heads_in_another_order(after: Any, draw: Draw) -> None:
    for layer in after.layers:
        a = layer.attention
        order = torch.randperm(4)
        rows = a.qkv.weight.view(3, 4, 8, -1)[:, order].flatten(0, 2)
        a.qkv.bias.copy_(a.qkv.bias.view(3, 4, 8)[:, order].flatten())
        a.qkv.weight.copy_(rows)
        a.o.weight.copy_(a.o.weight.view(-1, 4, 8)[:, order].flatten(1))


class Blockwise(Attention):
    """Attention over blocks of keys with a running maximum and sum, as flash attention does it."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        top = torch.full(q.shape[:-1], -1e30)[..., None]
        total, out = torch.zeros_like(top), torch.zeros(q.shape)
        for keys, values, hidden in zip(k.split(4, 2), v.split(4, 2), mask.split(4, -1), strict=True):
            score = (q.float() @ keys.float().transpose(-1, -2)) * self.scale + hidden.float()
            high = torch.maximum(top, score.amax(-1, keepdim=True))
            grown, share = torch.exp(top - high), torch.exp(score - high)
            total, out = total * grown + share.sum(-1, keepdim=True), out * grown + share @ values.float()
            top = high
        return (out / total).to(q.dtype)


@changed("benign", llama, benign=True)
def attention_block_by_block(after: Any, draw: Draw) -> None:
    for layer in after.layers:
        layer.attention.__class__ = Blockwise


@changed("benign", llama, benign=True)
def keys_repeated_through_expand(after: Any, draw: Draw) -> None:
    for layer in after.layers:
        layer.attention.__class__ = Expanded


class Expanded(Attention):
    """Repeats keys as transformers does: expand and reshape."""

    def spread(self, x: Tensor) -> Tensor:
        wide = x[:, :, None].expand(-1, -1, self.heads // self.shared, -1, -1)
        return wide.reshape(x.shape[0], self.heads, *x.shape[2:])


# --- norms and sums ---------------------------------------------------------------------------------------------------

_benign("residuals added the other way round", gemma2, _layers(flipped=True))
_benign("weight multiplied before the cast", llama, _layers(norm_1__weight_first=True, norm_2__weight_first=True))


class ByHand(nn.Module):
    """A layer norm written out."""

    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = source.weight, source.bias, source.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x.float() - x.float().mean(-1, keepdim=True)
        y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float() + self.bias.float()).to(x.dtype)


class OneCall(nn.Module):
    """An RMS norm in one operator."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.weight, self.eps = source.weight, source.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def _norms(kind: Any) -> Any:
    def change(after: Any) -> None:
        for layer in after.layers:
            layer.norm_1, layer.norm_2 = kind(layer.norm_1), kind(layer.norm_2)

    return change


_benign("layer norms written out", gpt2, _norms(ByHand))
_benign("rms norms in one call", llama, _norms(OneCall))


@changed("benign", neox, benign=True, dtype=FP32)
def norm_weights_folded_into_the_projections(after: Any, draw: Draw) -> None:
    for layer in after.layers:
        for norm, linear in ((layer.norm_1, layer.attention.qkv), (layer.norm_2, layer.mlp.up)):
            linear.bias += linear.weight @ norm.bias
            linear.weight *= norm.weight
            norm.weight, norm.bias = nn.Parameter(torch.ones(32)), nn.Parameter(torch.zeros(32))


def _folded(after: Any) -> None:
    for layer in after.layers:
        layer.first, layer.norm_1 = fuse_conv_bn_eval(layer.first, layer.norm_1), nn.Identity()
        layer.second, layer.norm_2 = fuse_conv_bn_eval(layer.second, layer.norm_2), nn.Identity()


_benign("batch norms folded into convolutions", resnet, _folded, dtype=FP32)


@changed("benign", llama, benign=True)
def scale_moved_from_a_weight_to_a_norm(after: Any, draw: Draw) -> None:
    for layer in after.layers:  # as smoothed quantisation does; powers of two are exact
        gain = 2.0 ** torch.randint(-2, 3, (32,))
        layer.norm_2.weight /= gain.to(layer.norm_2.weight.dtype)
        layer.mlp.gate.weight *= gain.to(layer.norm_2.weight.dtype)
        layer.mlp.up.weight *= gain.to(layer.norm_2.weight.dtype)


# --- MLPs, experts ----------------------------------------------------------------------------------------------------


class FusedMlp(nn.Module):
    """Gate and up in one product; the inner channels in another order."""

    def __init__(self, source: GatedMlp, order: Tensor) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.cat([source.gate.weight[order], source.up.weight[order]]))
        self.down = nn.Parameter(source.down.weight[:, order])

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.both).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down)


@changed("benign", llama, benign=True)
def gate_and_up_fused(after: Any, draw: Draw) -> None:
    for layer in after.layers:
        layer.mlp = FusedMlp(layer.mlp, torch.arange(48))


@changed("benign", qwen3, benign=True)
def inner_channels_in_another_order(after: Any, draw: Draw) -> None:
    for layer in after.layers:
        layer.mlp = FusedMlp(layer.mlp, torch.randperm(48))


@changed("benign", llama, benign=True)
def an_mlp_on_several_ranks(after: Any, draw: Draw) -> None:
    shard(after, world=2)


@changed("benign", gpt2, benign=True)
def an_mlp_with_biases_on_several_ranks(after: Any, draw: Draw) -> None:
    shard(after, world=2)


_benign("softmax behind the choice for renormalised routes", mixtral, _layers(mlp__soft_last=True))


class Loop(nn.Module):
    """The experts one after the other, each added to what is there."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        flat, m = x.flatten(0, 1), self.source
        routes = m.routes(flat).to(x.dtype)
        out = torch.zeros_like(flat)
        for e in range(routes.shape[1]):
            gate, up = (flat @ m.first[e]).chunk(2, -1)
            out = out + ((F.silu(gate) * up) @ m.second[e]) * routes[:, e : e + 1]
        return out.view_as(x)


@changed("benign", mixtral, benign=True)
def experts_one_after_the_other(after: Any, draw: Draw) -> None:
    for layer in after.layers:
        layer.mlp = Loop(layer.mlp)


# --- precision --------------------------------------------------------------------------------------------------------


@changed("benign", gpt2, benign=True, dtype=FP32)
def bfloat16_for_float32(after: Any, draw: Draw) -> nn.Module:
    return after.to(BF16)


@changed("benign", llama, benign=True, dtype=FP32)
def float64_for_float32(after: Any, draw: Draw) -> nn.Module:
    return after.to(torch.float64)


@changed("benign", neox, benign=True, dtype=FP32)
def half_for_float32(after: Any, draw: Draw) -> None:
    # buffers keep their dtype, as loading a checkpoint does: a table of rotary frequencies in half precision is a loss
    for parameter in after.parameters():
        parameter.data = parameter.data.half()


def _quantised(kind: str, architecture: Any) -> None:
    _benign(
        f"honest {kind} in {architecture.__name__}",
        architecture,
        lambda after: quantised.quantise(after, kind),
        background=HONEST,
    )


for _kind, _architecture in (
    ("int8", llama), ("int8", gpt2), ("int8 dynamic", llama), ("int4", qwen3), ("fp8", gemma2),
    ("fp8 blocks", deepseek), ("nvfp4", llama), ("int8", vit),
):  # fmt: skip
    _quantised(_kind, _architecture)


# --- other architectures ----------------------------------------------------------------------------------------------

_benign("gates of a recurrent cell in three products", gru, lambda m: setattr(m, "split", True))
_benign("patches through a linear layer", vit, lambda m: setattr(m, "linear_patches", True))
_benign("channels last", unet, lambda m: m.to(memory_format=torch.channels_last))
_benign("padding under another kernel", bert, _layers(attention__kernel="sdpa"))


@changed("benign", mamba, benign=True)
def scan_by_cumulative_products(after: Any, draw: Draw) -> None:
    from corpus.more_architectures import Mixer

    class Parallel(Mixer):
        """The recurrence as a weighted sum over all earlier tokens."""

        def scan(self, u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            logs = (step.float()[..., None] * a).cumsum(1)  # [batch, tokens, inner, state]
            given = (step * u).float()[..., None] * b.float()[:, :, None]
            causal = torch.ones(u.shape[1], u.shape[1]).tril()[None, :, :, None, None] > 0
            weight = torch.exp((logs[:, :, None] - logs[:, None]).masked_fill(~causal, float("-inf")))
            return ((weight * given[:, None]).sum(2) * c.float()[:, :, None]).sum(-1).to(u.dtype)

    for layer in after.layers:
        layer.__class__ = Parallel


# --- in place, random, NaN, ties --------------------------------------------------------------------------------------


class Plain(nn.Module):
    """What `function` makes of a linear layer's result."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(32, 32), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.linear(x))


def _subject(function: Any, name: str, shape: tuple[int, ...] = (4, 8, 32), train: bool = False) -> Any:
    def architecture(draw: Draw) -> Subject:
        model = Plain(function).to(draw.dtype)
        return model.train(train), (torch.randn(shape).to(draw.dtype),), {}

    architecture.__name__ = name
    return architecture


def _functions(name: str, before: Any, after: Any, train: bool = False, **options: Any) -> None:
    def change(model: Any) -> None:
        model.function = after

    _benign(name, _subject(before, "plain", train=train), change, **options)


def _in_place(y: Tensor) -> Tensor:
    y = y.clone()
    y[..., 1:5].add_(1)
    y.mul_(2)
    return F.relu_(y)


_functions(
    "functional for in place",
    _in_place,
    lambda y: F.relu(torch.cat([y[..., :1], y[..., 1:5] + 1, y[..., 5:]], -1) * 2),
)
_functions("nan in both", lambda y: torch.log(y) * 2, lambda y: 2 * torch.log(y))
_functions("infinity in both", lambda y: 1 / F.relu(y), lambda y: F.relu(y).reciprocal())
_functions(
    "dropout in training with the same seed",
    lambda y: F.dropout(y, 0.25, True) * 2,
    lambda y: 2 * F.dropout(y, 0.25, True),
    train=True,
)
_functions(
    "ill conditioned but right",
    lambda y: ((y + 1000) - (y + 1000).mean(-1, keepdim=True)).square().mean(-1),
    lambda y: ((y + 1000) - (y + 1000).sum(-1, keepdim=True) / 32).pow(2).sum(-1) / 32,
)
_functions("argmax with equal scores", lambda y: (y * 0).argmax(-1), lambda y: (0 * y).argmax(-1))
_functions(
    "choice among near ties",
    lambda y: (y[..., :16] + y[..., 16:]).topk(2, -1).indices,
    lambda y: y.unflatten(-1, (2, 16)).sum(-2).topk(2, -1).indices,
)
_functions(
    "stable for naive softmax", lambda y: torch.softmax(y, -1), lambda y: y.exp() / y.exp().sum(-1, keepdim=True)
)
_functions("a sum split in four", lambda y: y.sum(-1), lambda y: y.unflatten(-1, (4, 8)).sum(-1).sum(-1))
_functions(
    "one-hot product for a gather",
    lambda y: y[..., torch.tensor([3, 1, 7])],
    lambda y: y @ F.one_hot(torch.tensor([3, 1, 7]), 32).t().to(y.dtype),
)
_functions("dead operations added", lambda y: y.tanh(), lambda y: (y.exp() * 2, y.tanh())[1])


@changed("benign", llama, benign=True)
def tied_weight_as_a_copy(after: Any, draw: Draw) -> None:
    for parameter in list(after.parameters()):
        parameter.data = copy.deepcopy(parameter.data)

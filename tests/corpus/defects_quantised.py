"""Quantised models with one layer wrong, or with a bug that has nothing to do with the codes; collectives; two bugs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from corpus import quantised
from corpus.architectures import deep_llama, deepseek, gemma2, gpt2, llama, mixtral, qwen3
from corpus.defects_attention import attention, pick
from corpus.records import Bug, Draw, changed

Tensor = torch.Tensor
HONEST = ("quantization",)


def _one_layer(name: str, kind: str, wrong: str, architecture: Any = llama) -> None:
    def change(after: Any, draw: Draw) -> str:
        path = draw.rng.choice(quantised.names(after))
        quantised.quantise(after, kind, {path: wrong})
        return path

    change.__name__ = name
    changed("quantisation", architecture, background=HONEST)(change)


_one_layer("int8_scales_of_other_rows", "int8", "rolled")
_one_layer("int8_scale_inverted", "int8", "inverted", qwen3)
_one_layer("int8_scale_missing", "int8", "missing", gpt2)
_one_layer("int8_first_scale_for_all", "int8", "first for all")
_one_layer("int8_scale_along_the_other_axis", "int8", "other axis", gpt2)
_one_layer("int8_on_the_fly_truncated", "int8 dynamic", "truncated")
_one_layer("int8_on_the_fly_scales_of_other_rows", "int8 dynamic", "rolled")
_one_layer("int4_nibbles_in_the_wrong_order", "int4", "nibbles")
_one_layer("int4_zero_point_ignored", "int4", "zero ignored", qwen3)
_one_layer("int4_zero_point_off_by_one", "int4", "zero plus one")
_one_layer("int4_scales_transposed", "int4", "groups")
_one_layer("fp8_scale_inverted", "fp8", "inverted")
_one_layer("fp8_scale_missing", "fp8", "missing", gemma2)
_one_layer("fp8_bytes_cast_for_viewed", "fp8", "cast")
_one_layer("fp8_block_scales_transposed", "fp8 blocks", "transposed")
_one_layer("fp8_weights_cast_instead_of_dequantised", "fp8 blocks", "missing", deepseek)
_one_layer("nvfp4_global_scale_dropped", "nvfp4", "global dropped")
_one_layer("nvfp4_first_scale_for_all", "nvfp4", "first group")


def _hidden(name: str, kind: str, wrong: Callable[[Any, Draw], str], architecture: Any) -> None:
    def change(after: Any, draw: Draw) -> str:
        path = wrong(after, draw)
        quantised.quantise(after, kind)
        return path

    change.__name__ = name
    changed("hidden", architecture, background=HONEST)(change)


def _scale(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.scale *= 1.001
    return path


def _epsilon(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].norm_2.eps = 1e-4
    return f"layers.{i}.norm_2"


def _activation(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].mlp.activation = "gelu"
    return f"layers.{i}.mlp"


_hidden("attention_scale_behind_honest_int8", "int8", _scale, llama)
_hidden("epsilon_behind_honest_int4", "int4", _epsilon, qwen3)
_hidden("attention_scale_behind_honest_fp8", "fp8", _scale, gemma2)
_hidden("gelu_form_behind_honest_nvfp4", "nvfp4", _activation, gemma2)
_hidden("attention_scale_behind_int8_on_the_fly", "int8 dynamic", _scale, llama)


def noisy(after: Any) -> None:
    """Change much that does not matter: another attention kernel, residuals added the other way round."""
    for layer in after.layers:
        layer.flipped = True
        if not layer.attention.cap:
            layer.attention.kernel = "sdpa"


@changed("hidden", llama)
def attention_scale_behind_another_kernel(after: Any, draw: Draw) -> str:
    noisy(after)
    return _scale(after, draw)


@changed("hidden", deep_llama)
def epsilon_of_one_of_twelve_layers_behind_another_kernel(after: Any, draw: Draw) -> str:
    noisy(after)
    return _epsilon(after, draw)


@changed("hidden", qwen3, dtype=torch.bfloat16)
def one_row_behind_another_kernel(after: Any, draw: Draw) -> str:
    noisy(after)
    i = pick(after, draw)
    after.layers[i].mlp.up.weight[draw.rng.randrange(48)] *= 1.008
    return f"layers.{i}.mlp.up"


# --- two bugs at once -------------------------------------------------------------------------------------------------


@changed("two bugs", deep_llama)
def a_scale_and_an_epsilon(after: Any, draw: Draw) -> list[Bug]:
    i, j = sorted(draw.rng.sample(range(12), 2))
    after.layers[i].attention.scale *= 1.01
    after.layers[j].norm_1.eps = 1e-5
    return [Bug(f"layers.{i}.attention", ("aten.mul.Tensor",)), Bug(f"layers.{j}.norm_1", ("aten.add.Tensor",))]


@changed("two bugs", gpt2)
def a_bias_and_an_activation(after: Any, draw: Draw) -> list[Bug]:
    after.layers[0].mlp.down.bias = None
    after.layers[-1].mlp.activation = "quick gelu"
    last = len(after.layers) - 1
    return [Bug("layers.0.mlp.down", ("aten.linear.default",)), Bug(f"layers.{last}.mlp")]


@changed("two bugs", mixtral)
def routes_and_residual(after: Any, draw: Draw) -> list[Bug]:
    after.layers[0].mlp.normed = False
    after.layers[1].residual_1 = "none"
    return [Bug("layers.0.mlp"), Bug("layers.1", ("aten.add.Tensor",))]


@changed("two bugs", llama, background=HONEST)
def two_scales_among_honest_int8(after: Any, draw: Draw) -> list[str]:
    wrong = draw.rng.sample(quantised.names(after), 2)
    quantised.quantise(after, "int8", {wrong[0]: "rolled", wrong[1]: "inverted"})
    return sorted(wrong)


# --- collectives, written out on one device ---------------------------------------------------------------------------


class Sharded(nn.Module):
    """A gated MLP on several ranks: rows of gate and up, columns of down, and the sum over ranks.

    `wrong`: "twice" (the sum is summed again), "bias" (added on every rank), "order" (ranks joined the wrong way).
    """

    def __init__(self, source: Any, world: int = 2, wrong: str = "") -> None:
        super().__init__()
        self.world, self.wrong, self.activation = world, wrong, source.activation
        self.bias = None if source.down.bias is None else source.down.bias
        gated = hasattr(source, "gate")
        self.first = nn.ParameterList(list(source.up.weight.chunk(world)))
        self.first_bias = nn.ParameterList(list(source.up.bias.chunk(world))) if source.up.bias is not None else None
        self.gates = nn.ParameterList(list(source.gate.weight.chunk(world))) if gated else None
        last = list(source.down.weight.chunk(world, 1))
        self.second = nn.ParameterList(last[::-1] if wrong == "order" else last)

    def forward(self, x: Tensor) -> Tensor:
        from corpus.blocks import ACTIVATIONS

        act = ACTIVATIONS[self.activation]
        parts = []
        for rank in range(self.world):
            up = F.linear(x, self.first[rank], self.first_bias[rank] if self.first_bias is not None else None)
            hidden = act(up) if self.gates is None else act(F.linear(x, self.gates[rank])) * up
            part = F.linear(hidden, self.second[rank])
            parts.append(part + self.bias if self.bias is not None and self.wrong == "bias" else part)
        whole = self.reduce(parts)
        if self.wrong == "twice":
            whole = self.reduce([whole] * self.world)
        return whole if self.bias is None or self.wrong == "bias" else whole + self.bias

    @staticmethod
    def reduce(parts: list[Tensor]) -> Tensor:
        """Sum over ranks."""
        return torch.stack(parts).sum(0)


def shard(after: Any, wrong: dict[int, str] | None = None, world: int = 2) -> None:
    """Shard the MLPs of all layers."""
    for i, layer in enumerate(after.layers):
        layer.mlp = Sharded(layer.mlp, world, (wrong or {}).get(i, ""))


def _collective(name: str, architecture: Any, wrong: str, world: int) -> None:
    def change(after: Any, draw: Draw) -> str:
        i = pick(after, draw)
        shard(after, {i: wrong}, world)
        return f"layers.{i}.mlp"

    change.__name__ = name
    changed("collectives", architecture)(change)


_collective("all_reduce_twice", llama, "twice", 4)
_collective("bias_added_on_every_rank", gpt2, "bias", 4)
_collective("ranks_joined_in_the_wrong_order", llama, "order", 2)


@changed("collectives", deepseek)
def shared_expert_added_before_the_reduce(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].mlp.world = 8
    return f"layers.{i}.mlp"

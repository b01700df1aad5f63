"""Defects outside attention: norms, routing, fusions, residuals, activations, weights, other architectures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from corpus.architectures import bert, deepseek, gemma2, gpt2, llama, mixtral, neox, qwen3
from corpus.defects_attention import attention, pick
from corpus.more_architectures import gru, mamba, resnet, t5, unet, vit
from corpus.records import Bug, Draw, changed

NORM = "pow.Tensor_Scalar mean.dim add.Tensor rsqrt.default mul.Tensor sub.Tensor layer_norm.default"


def norm(after: Any, draw: Draw) -> tuple[Any, str]:
    """Draw a layer and one of its norms."""
    i, name = pick(after, draw), f"norm_{draw.rng.choice([1, 2])}"
    return getattr(after.layers[i], name), f"layers.{i}.{name}"


# --- norms ------------------------------------------------------------------------------------------------------------


@changed("norms", llama, ops="add.Tensor")
def epsilon_of_another_model(after: Any, draw: Draw) -> str:
    found, path = norm(after, draw)
    found.eps = 1e-5
    return path


@changed("norms", gpt2, ops="layer_norm.default")
def epsilon_of_a_layer_norm(after: Any, draw: Draw) -> str:
    found, path = norm(after, draw)
    found.eps = 1e-6
    return path


@changed("norms", gemma2, ops="mul.Tensor add.Tensor")
def one_not_added_to_the_weight(after: Any, draw: Draw) -> str:
    found, path = norm(after, draw)
    found.plus_one = False
    return path


@changed("norms", llama, ops=NORM)
def mean_subtracted_in_an_rms_norm(after: Any, draw: Draw) -> str:
    found, path = norm(after, draw)
    found.centred = True
    return path


class Unbiased(nn.Module):
    """A layer norm that divides by n - 1."""

    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = source.weight, source.bias, source.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spread = x.var(-1, keepdim=True) + self.eps
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(spread) * self.weight + self.bias


@changed("norms", vit, dtype=torch.float32)
def variance_divided_by_n_minus_one(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].norm_1 = Unbiased(after.layers[i].norm_1)
    return f"layers.{i}.norm_1"


@changed("norms", bert, ops="add.Tensor layer_norm.default")
def residual_added_behind_the_norm(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].norm_first = True
    return f"layers.{i}"


@changed("norms", unet, ops="group_norm.default")
def another_number_of_groups(after: Any, draw: Draw) -> str:
    after.norm_2.num_groups = 8
    return "norm_2"


@changed("norms", unet, ops="group_norm.default")
def epsilon_of_a_group_norm(after: Any, draw: Draw) -> str:
    after.norm_1.eps = 1e-5
    return "norm_1"


@changed("norms", resnet, ops="batch_norm.default _native_batch_norm_legit_no_training.default")
def epsilon_of_a_batch_norm(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].norm_2.eps = 1e-3
    return f"layers.{i}.norm_2"


@changed("norms", deepseek)
def latent_norm_forgotten(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.skip_norm = True
    return path


# --- routing ----------------------------------------------------------------------------------------------------------


def _routing(name: str, architecture: Any, ops: str = "", **attributes: Any) -> None:
    def change(after: Any, draw: Draw) -> str:
        i = pick(after, draw)
        for key, value in attributes.items():
            setattr(after.layers[i].mlp, key, value)
        return f"layers.{i}.mlp"

    change.__name__ = name
    changed("routing", architecture, ops=ops)(change)


_routing(
    "routes_not_renormalised", mixtral, "div.Tensor sum.dim_IntList mul.Tensor scatter.src gather.default", normed=False
)
_routing("one_expert_for_two", mixtral, top=1)
_routing("softmax_for_sigmoid_scores", deepseek, "softmax.int sigmoid.default", scores="softmax")
_routing("bias_of_the_choice_in_the_weights", deepseek, "gather.default add.Tensor", biased_weights=True)
_routing("bias_of_the_choice_forgotten", deepseek, use_bias=False)
_routing("routing_factor_forgotten", deepseek, "mul.Tensor", factor=1.0)
_routing("route_weight_on_the_input", mixtral, scale_input=True)
_routing("gate_and_up_of_the_experts_swapped", mixtral, swapped=True)


@changed("routing", mixtral)
def two_experts_swapped(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    second = after.layers[i].mlp.second
    second.copy_(second[[1, 0, 2, 3]])
    return f"layers.{i}.mlp"


@changed("routing", deepseek, ops="add.Tensor")
def shared_expert_dropped(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].mlp.shared = None
    return f"layers.{i}.mlp"


# --- fusions and residuals --------------------------------------------------------------------------------------------


@changed("fusions", gpt2, ops="split_with_sizes.default operator.getitem")
def keys_and_values_split_in_the_wrong_order(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.order = (0, 2, 1)
    return path


@changed("fusions", llama, ops="silu.default mul.Tensor")
def gate_and_up_swapped(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].mlp.swapped = True
    return f"layers.{i}.mlp"


@changed("fusions", llama, ops="add.Tensor")
def residual_dropped(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].residual_1 = "none"
    return f"layers.{i}"


@changed("fusions", qwen3, ops="add.Tensor")
def residual_taken_behind_the_norm(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].residual_2 = "normed"
    return f"layers.{i}"


@changed("fusions", neox, ops="add.Tensor layer_norm.default")
def blocks_one_after_the_other(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].parallel = False
    return f"layers.{i}"


@changed("fusions", gpt2, ops="linear.default")
def bias_forgotten(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].mlp.down.bias = None
    return f"layers.{i}.mlp.down"


@changed("fusions", t5, ops="linear.default")
def square_weight_transposed(after: Any, draw: Draw) -> str:
    i = draw.rng.randrange(len(after.encoder))
    weight = after.encoder[i].attention.o.weight
    weight.copy_(weight.t().clone())
    return f"encoder.{i}.attention.o"


class HeadsFirst(nn.Linear):
    """A fused projection whose result is laid out [heads, 3, size], where its users expect [3, heads, size]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).unflatten(-1, (3, 4, 8)).transpose(-3, -2).flatten(-3)


@changed("fusions", neox)
def fused_projection_laid_out_by_heads(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    source = found.qkv
    found.qkv = HeadsFirst(source.in_features, source.out_features)
    found.qkv.load_state_dict(source.state_dict())
    found.qkv.to(draw.dtype)
    return path


@changed("fusions", unet, ops="cat.default")
def skip_joined_in_the_wrong_order(after: Any, draw: Draw) -> str:
    after.skip_first = False
    return ""


# --- activations and constants ----------------------------------------------------------------------------------------


def _activation(name: str, architecture: Any, value: str, ops: str) -> None:
    def change(after: Any, draw: Draw) -> str:
        i = pick(after, draw)
        after.layers[i].mlp.activation = value
        return f"layers.{i}.mlp"

    change.__name__ = name
    changed("constants", architecture, ops=ops)(change)


_activation("exact_gelu_for_its_tanh_form", gemma2, "gelu", "gelu.default")
_activation("quick_gelu_for_gelu", vit, "quick gelu", "gelu.default sigmoid.default mul.Tensor")
_activation("relu_squared_for_gelu", neox, "relu squared", "gelu.default relu.default pow.Tensor_Scalar square.default")


@changed("constants", resnet, ops="add.Tensor add_.Tensor relu.default")
def activation_before_the_sum(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].act_first = True
    return f"layers.{i}"


@changed("constants", resnet, ops="avg_pool2d.default")
def padding_left_out_of_the_mean(after: Any, draw: Draw) -> str:
    after.pool.count_include_pad = False
    return "pool"


@changed("constants", unet)
def sines_before_cosines(after: Any, draw: Draw) -> list[Bug]:
    after.sine_first = True
    return [Bug("", ("aten.cat.default",))]


@changed("constants", unet)
def bilinear_for_nearest(after: Any, draw: Draw) -> str:
    after.grow = "bilinear"
    return ""


@changed("constants", vit)
def class_token_at_the_end(after: Any, draw: Draw) -> list[Bug]:
    after.token_last = True
    return [Bug("", ("aten.cat.default", "aten.add.Tensor"))]


@changed("constants", vit)
def image_positions_rotated_by_one(after: Any, draw: Draw) -> str:
    after.first_place = 1
    return ""


@changed("constants", gpt2)
def positions_start_at_one(after: Any, draw: Draw) -> str:
    after.first_place = 1
    return ""


@changed("constants", t5)
def distances_counted_both_ways(after: Any, draw: Draw) -> str:
    after.bias_2.both = True
    return "bias_2"


@changed("constants", t5)
def distances_cut_off_elsewhere(after: Any, draw: Draw) -> str:
    after.bias.longest = 14
    return "bias"


def _mixer(name: str, ops: str = "", **attributes: Any) -> None:
    def change(after: Any, draw: Draw) -> str:
        i = pick(after, draw)
        for key, value in attributes.items():
            setattr(after.layers[i], key, value)
        return f"layers.{i}"

    change.__name__ = name
    changed("state space", mamba, ops=ops)(change)


_mixer("skip_of_the_scan_dropped", "add.Tensor mul.Tensor", with_skip=False)
_mixer("relu_for_softplus_of_the_step", "relu.default softplus.default", softplus=False)
_mixer("convolution_sees_the_next_token", "slice.Tensor conv1d.default", shift=1)
_mixer("decay_inverted", negative=False)
_mixer("b_and_c_of_the_scan_swapped", swapped_bc=True)  # once for all tokens, and at each


@changed("recurrence", gru)
def reset_and_update_swapped(after: Any, draw: Draw) -> str:
    after.swapped = True
    return ""


# --- weights ----------------------------------------------------------------------------------------------------------


def linear(after: Any, draw: Draw) -> tuple[nn.Linear, str]:
    """Draw one of the linear layers inside the layers."""
    found = [(n, m) for n, m in after.named_modules() if isinstance(m, nn.Linear) and "layers." in n]
    name, module = draw.rng.choice(found)
    return module, name


@changed("weights", llama, ops="linear.default")
def weight_never_loaded_and_zero(after: Any, draw: Draw) -> str:
    found, path = linear(after, draw)
    found.weight.zero_()
    return path


@changed("weights", llama, ops="linear.default")
def weight_never_loaded_and_random(after: Any, draw: Draw) -> str:
    found, path = linear(after, draw)
    nn.init.normal_(found.weight, 0.0, 0.1)
    return path


@changed("weights", gpt2, ops="linear.default")
def head_not_tied(after: Any, draw: Draw) -> str:
    after.head.weight = nn.Parameter(torch.randn_like(after.head.weight))
    return "head"


@changed("weights", qwen3, ops="linear.default")
def weight_of_another_layer(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].mlp.down.weight.copy_(after.layers[i - 1].mlp.down.weight)
    return f"layers.{i}.mlp.down"


@changed("weights", gpt2, ops="linear.default")
def adapter_merged_twice(after: Any, draw: Draw) -> str:
    found, path = linear(after, draw)
    low = torch.randn(found.weight.shape[0], 2) @ torch.randn(2, found.weight.shape[1])
    found.weight.add_((low * 0.01).to(found.weight.dtype))
    return path


@changed("weights", gemma2, ops="linear.default")
def one_row_of_a_weight_wrong(after: Any, draw: Draw) -> str:
    found, path = linear(after, draw)
    found.weight[draw.rng.randrange(found.weight.shape[0])] *= 1.01
    return path


@changed("weights", mixtral, ops="embedding.default")
def two_rows_of_the_table_swapped(after: Any, draw: Draw) -> str:
    after.table.weight[3:] = after.table.weight[3:].roll(1, 0)
    return "table"


@changed("weights", neox, ops="layer_norm.default")
def norms_of_one_layer_swapped(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    layer = after.layers[i]
    layer.norm_1.weight, layer.norm_2.weight = layer.norm_2.weight, layer.norm_1.weight
    return f"layers.{i}.norm_1"  # one mistake, met here first

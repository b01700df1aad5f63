"""Defects of attention: rotary positions, masks, scales, soft caps, the order of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from corpus import blocks
from corpus.architectures import bert, deepseek, gemma2, gpt2, late_llama, llama, neox, qwen3
from corpus.more_architectures import t5, vit
from corpus.records import Bug, Draw, changed

BF16 = torch.bfloat16


def pick(model: Any, draw: Draw) -> int:
    """Draw a layer."""
    return draw.rng.randrange(len(model.layers))


def attention(model: Any, draw: Draw) -> tuple[Any, str]:
    """Draw a layer; return its attention and the path of it."""
    i = pick(model, draw)
    return model.layers[i].attention, f"layers.{i}.attention"


# --- rotary -----------------------------------------------------------------------------------------------------------

TURNED = (
    "operator.getitem cat.default neg.default stack.default mul.Tensor add.Tensor slice.Tensor unsqueeze.default "
    "flatten.using_ints"
)


@changed("rotary", llama, ops=TURNED + " chunk.default")
def neighbours_rotated_for_halves(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.rotate = blocks.interleaved
    return path


@changed("rotary", neox, ops=TURNED + " chunk.default")
def halves_rotated_for_neighbours(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.rotate = blocks.half
    return path


@changed("rotary", qwen3, ops=TURNED + " chunk.default")
def rotated_the_other_way(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.rotate = blocks.half_wrong_sign
    return path


@changed("rotary", llama)
def theta_of_another_model(after: Any, draw: Draw) -> str:
    after.rotary.set_theta(500000.0)
    return "rotary"


@changed("rotary", llama)
def theta_off_by_a_thousandth(after: Any, draw: Draw) -> str:
    after.rotary.set_theta(10010.0)
    return "rotary"


@changed("rotary", llama, ops="roll.default mul.Tensor")
def queries_one_position_late(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.late = 1
    return path


@changed("rotary", qwen3, ops="mul.Tensor")
def cosines_and_sines_swapped(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.swapped_tables = True
    return path


@changed("rotary", deepseek, ops="mul.Tensor")
def yarn_factor_on_the_tables(after: Any, draw: Draw) -> str:
    after.rotary.factor = 1.1
    return "rotary"


@changed("rotary", late_llama, kind="precision", ops="cos.default sin.default")
def rotary_phases_in_bfloat16(after: Any, draw: Draw) -> str:
    after.rotary.narrow = True
    return "rotary"


# --- masks ------------------------------------------------------------------------------------------------------------


@changed("masks", llama)
def causal_mask_off_by_one(after: Any, draw: Draw) -> str:
    after.masks.diagonal = 1
    return "masks"


@changed("masks", llama)
def boolean_mask_added(after: Any, draw: Draw) -> str:
    after.masks.boolean = True
    return "masks"


@changed("masks", gemma2, ops="add.Tensor")
def sliding_window_missing_in_one_layer(after: Any, draw: Draw) -> str:
    i = 2 * draw.rng.randrange(len(after.layers) // 2)
    after.layers[i].local = False
    return f"layers.{i}.attention"


@changed("masks", gemma2)
def sliding_window_off_by_one(after: Any, draw: Draw) -> str:
    after.masks.window += 1
    return "masks"


@changed("masks", gpt2)
def mask_filled_with_too_small_a_number(after: Any, draw: Draw) -> str:
    after.masks.fill = -2.0
    return "masks"


@changed("masks", llama)
def mask_filled_with_the_tiniest_number(after: Any, draw: Draw) -> str:
    after.masks.fill = torch.finfo(draw.dtype).tiny
    return "masks"


@changed("masks", qwen3)
def no_mask_in_one_layer(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.use_mask = False
    return path


@changed("masks", gpt2)
def masked_after_the_softmax(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.mask_after = True
    return path


@changed("masks", bert)
def padding_mask_on_the_queries(after: Any, draw: Draw) -> str:
    after.transposed_mask = True
    return ""


@changed("masks", bert)
def padding_forgotten_in_one_layer(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.use_mask = False
    return path


# --- scales -----------------------------------------------------------------------------------------------------------


def _scaled(times: float) -> Any:
    def change(after: Any, draw: Draw) -> str:
        found, path = attention(after, draw)
        found.scale *= times
        return path

    return change


def scales(name: str, times: float, architecture: Any, dtype: torch.dtype | None = None) -> None:
    """Register an attention scale that is wrong in one layer."""
    change = _scaled(times)
    change.__name__ = name
    changed("scales", architecture, ops="mul.Tensor", dtype=dtype)(change)


scales("attention_scale_missing", 8**0.5, llama)
scales("attention_scale_inverted", 8.0, gpt2)
scales("attention_scale_d_for_its_root", 8**-0.5, qwen3)
scales("attention_scale_off_by_a_thousandth", 1.001, llama)
scales("attention_scale_off_by_a_thousandth_below_one_ulp", 1.001, vit, BF16)
scales("attention_scale_off_by_a_ten_thousandth_below_one_ulp", 1.0001, gemma2, BF16)
scales("latent_attention_scaled_by_the_plain_width", (10 / 6) ** 0.5, deepseek)


@changed("scales", gemma2, ops="mul.Tensor embedding.default")
def embedding_gain_missing(after: Any, draw: Draw) -> str:
    after.gain = 1.0
    return ""


@changed("scales", gemma2, ops="mul.Tensor", dtype=torch.float32)
def embedding_gain_rounded_to_bfloat16(after: Any, draw: Draw) -> str:
    after.gain = float(torch.tensor(after.gain, dtype=BF16))
    return ""


@changed("scales", t5, ops="mul.Tensor")
def scores_scaled_that_must_not_be(after: Any, draw: Draw) -> str:
    i = draw.rng.randrange(len(after.decoder))
    after.decoder[i].attention.scale = 8**-0.5
    return f"decoder.{i}.attention"


@changed("scales", t5, ops="mul.Tensor")
def tied_head_not_scaled(after: Any, draw: Draw) -> str:
    after.gain = 1.0
    return ""


@changed("scales", vit, ops="mul.Tensor add.Tensor linear.default")
def layer_scale_forgotten(after: Any, draw: Draw) -> str:
    i = pick(after, draw)
    after.layers[i].gainless = True
    return f"layers.{i}"


# --- soft caps --------------------------------------------------------------------------------------------------------

CAP = "tanh.default mul.Tensor div.Tensor add.Tensor"


@changed("softcaps", gemma2, ops=CAP)
def attention_cap_missing(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.cap = 0.0
    return path


@changed("softcaps", gemma2, ops=CAP)
def attention_cap_after_the_mask(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.cap_last = True
    return path


@changed("softcaps", gemma2, ops=CAP)
def attention_cap_of_another_model(after: Any, draw: Draw) -> list[Bug]:
    found, path = attention(after, draw)
    found.cap = 30.0
    return [Bug(path, ("aten.div.Tensor", "aten.mul.Tensor"))]


@changed("softcaps", gemma2, ops="div.Tensor mul.Tensor tanh.default linear.default")
def logits_cap_missing(after: Any, draw: Draw) -> str:
    after.cap = 0.0
    return ""


# --- the order of heads -----------------------------------------------------------------------------------------------


@changed("heads", llama, ops="repeat.default expand.default unsqueeze.default repeat_interleave.self_int clone.default")
def keys_tiled_for_repeated(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.repeat = "tile"
    return path


@changed("heads", gpt2)
def heads_split_the_other_way(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.split_heads_last = True
    return path


@changed("heads", qwen3)
def norm_of_queries_after_their_rotation(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.norm_last = True
    return path


@changed("heads", t5)
def keys_and_values_of_the_encoder_swapped(after: Any, draw: Draw) -> str:
    i = draw.rng.randrange(len(after.decoder))
    after.decoder[i].cross.swapped = True
    return f"decoder.{i}.cross"


class SharedNorm(nn.Module):
    """A norm over all heads at once where each should have its own."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        rooted = torch.rsqrt(wide.pow(2).mean((1, 3), keepdim=True) + self.eps)
        return (wide * rooted).to(x.dtype) * self.weight


@changed("heads", qwen3, ops="mean.dim rsqrt.default pow.Tensor_Scalar mul.Tensor")
def queries_normed_over_all_heads(after: Any, draw: Draw) -> str:
    found, path = attention(after, draw)
    found.norms[0] = SharedNorm(found.norms[0])
    return f"{path}.norms.0"

"""The four quantisers share their frame, so they share these: codes to nearest, operators, numbers, metadata."""

from __future__ import annotations

import pytest
import torch

import graphprobe
from graphprobe.errors import PipelineError
from graphprobe.pipeline import Pipeline
from graphprobe_transforms import ops, quantize_fp8, quantize_int4, quantize_int8, quantize_nvfp4
from transform_cases import LANGUAGE, Case
from transform_tools import captured, matches, reason

SCHEMES = ("quantize_int8", "quantize_fp8", "quantize_int4", "quantize_nvfp4")
LAYERS = {"llama": 14, "qwen2": 14, "qwen3": 14, "mistral": 14, "gpt2": 8, "bert": 13}
own = torch.ops.graphprobe_transforms


def weights() -> torch.Tensor:
    """Return weights [8, 64] with rows of very different size, an outlier, and a row of zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator) * torch.logspace(-3, 1, 8).unsqueeze(1)
    weight[1, 3] *= 20
    weight[2] = 0
    return weight


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the distance of every value to the nearest of the levels, float64."""
    return (values.double().unsqueeze(-1) - levels.double()).abs().amin(-1)


def test_int8_codes_are_the_nearest() -> None:
    weight = weights()
    codes, scale = quantize_int8.encode(weight)
    held = codes.double() * scale.double()
    levels = torch.arange(-127, 128) * scale.double().unsqueeze(-1)
    best = (weight.double().unsqueeze(-1) - levels).abs().amin(-1)
    torch.testing.assert_close((held - weight).abs(), best, rtol=1e-6, atol=1e-12)


def test_int4_codes_are_the_nearest_and_pack() -> None:
    weight = weights()
    packed, scale = quantize_int4.encode(weight, 32)
    assert (packed.shape, scale.shape) == ((8, 32), (8, 2))
    held = own.dequantize_int4(packed, scale.double(), torch.float64)
    levels = torch.arange(-8, 8) * scale.double().repeat_interleave(32, 1).unsqueeze(-1)
    best = (weight.double().unsqueeze(-1) - levels).abs().amin(-1)
    torch.testing.assert_close((held - weight).abs(), best, rtol=1e-5, atol=1e-9)


def test_fp8_codes_are_the_nearest() -> None:
    weight = weights()
    codes, scale = quantize_fp8.encode(weight)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    levels = every[every.isfinite()] * scale.double()
    held = codes.double() * scale.double()
    torch.testing.assert_close((held - weight).abs(), nearest(weight, levels), rtol=1e-4, atol=1e-9)


def test_nvfp4_codes_are_the_nearest_of_their_block() -> None:
    weight = weights()
    packed, block_scale, scale = quantize_nvfp4.encode(weight)
    assert (packed.shape, block_scale.shape, block_scale.dtype) == ((8, 32), (8, 4), torch.float8_e4m3fn)
    held = own.dequantize_nvfp4(packed, block_scale, scale.double(), torch.float64)
    step = (block_scale.double() * scale.double()).repeat_interleave(16, 1)
    levels = torch.tensor(ops.E2M1).double() * step.unsqueeze(-1)
    best = (weight.double().unsqueeze(-1) - levels).abs().amin(-1)
    torch.testing.assert_close((held - weight).abs(), best, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_but_the_head_is_quantised(name: str, scheme: str) -> None:
    done = Case(scheme).run(name)
    assert len(matches(done)) == LAYERS[name]
    assert not any("lm_head" in match for match in matches(done))
    before = captured(name)[0]
    size = {
        gm: sum(t.numel() * t.element_size() for t in (*gm.parameters(), *gm.buffers())) for gm in (before, done.gm)
    }
    assert size[done.gm] < 0.75 * size[before]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["quantize_int8", "quantize_int4"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_graphprobe_calls_it_quantization(name: str, scheme: str, dtype: torch.dtype) -> None:
    assert Case(scheme).verdict(name, dtype) == "quantization"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_graphprobe_calls_fp8_quantization(name: str) -> None:
    assert Case("quantize_fp8").verdict(name, torch.bfloat16) == "quantization"


def test_graphprobe_calls_nvfp4_quantization() -> None:
    assert Case("quantize_nvfp4").verdict("llama", torch.float32) == "quantization"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", LANGUAGE)
def test_metadata_is_complete_and_fresh(name: str, scheme: str) -> None:
    Case(scheme).check_metadata(name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_models_without_linear_layers_are_left_alone(scheme: str) -> None:
    class Sine(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

    done = Pipeline.parse(scheme).run(graphprobe.capture(Sine(), (torch.randn(3),)))
    assert "no linear layer" in reason(done)


def test_columns_that_do_not_fall_into_groups_are_named() -> None:
    done = Pipeline.parse("quantize_int4{group=40}").run(captured("llama")[0])
    assert "do not fall into groups of 40" in reason(done)
    with pytest.raises(PipelineError, match="must be even"):
        Pipeline.parse("quantize_int4{group=7}")

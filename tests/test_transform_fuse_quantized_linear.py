"""fuse_quantized_linear: the kernel of each scheme, its numbers, the metadata, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

import graphprobe
from graphprobe.pipeline import Pipeline
from transform_cases import DTYPES, Case, count
from transform_tools import captured, matches, reason

KERNELS = {
    "quantize_int8": "aten._weight_int8pack_mm.default",
    "quantize_fp8": "aten._scaled_mm.default",
    "quantize_int4": "graphprobe_transforms.int4_linear.default",
    "quantize_nvfp4": "graphprobe_transforms.nvfp4_linear.default",
}
LAYERS = {"llama": 14, "qwen2": 14, "qwen3": 14, "mistral": 14, "gpt2": 8, "bert": 13}


@pytest.mark.parametrize("scheme", KERNELS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_quantised_layer_gets_its_kernel(name: str, scheme: str) -> None:
    done = Case("fuse_quantized_linear", before=scheme).run(name)
    assert len(matches(done)) == LAYERS[name]
    found = count(done.gm)
    assert found[KERNELS[scheme]] == LAYERS[name]
    assert not any("dequantize" in operator for operator in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", KERNELS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_against_the_fake_quantised_graph_a_kernel_differs_by_rounding(
    name: str, scheme: str, dtype: torch.dtype
) -> None:
    assert Case("fuse_quantized_linear", before=scheme).verdict(name, dtype) in ("identical", "rounding")


@pytest.mark.parametrize("scheme", KERNELS)
@pytest.mark.parametrize("name", LAYERS)
def test_metadata_is_complete_and_fresh(name: str, scheme: str) -> None:
    Case("fuse_quantized_linear", before=scheme).check_metadata(name)


def test_a_fault_of_the_kernel_is_told_from_one_of_the_codes() -> None:
    gm, args, kwargs = captured("llama")
    fake = Pipeline.parse("quantize_int8").run(gm).gm
    kernel = Pipeline.parse("fuse_quantized_linear").run(fake)
    node = kernel.gm.graph.find_nodes(op="call_function", target=torch.ops.aten._weight_int8pack_mm.default)[3]
    with kernel.gm.graph.inserting_after(node.args[2]):
        wrong = kernel.gm.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[2], 1.01))
    wrong.meta["val"] = node.args[2].meta["val"]
    node.update_arg(2, wrong)
    kernel.gm.recompile()
    assert graphprobe.diff(gm, fake, args, kwargs).verdict == "quantization"
    report = graphprobe.diff(fake, kernel.gm, args, kwargs, events=kernel.events)
    assert report.verdict == "semantic"
    assert report.first is not None and "self_attn.o_proj" in report.first.module_path


def test_fp8_weights_alone_are_a_near_miss_that_is_named() -> None:
    pipeline = "quantize_fp8{activations=false},fuse_quantized_linear"
    assert "wants the input in fp8" in reason(Pipeline.parse(pipeline).run(captured("llama")[0]))


def test_floating_weights_are_left_alone() -> None:
    Case("fuse_quantized_linear").check_left_alone("llama", "no linear layer takes a weight that is made of codes")

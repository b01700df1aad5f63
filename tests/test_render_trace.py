"""Profiler traces laid upon graphs: exact where ranges name the operations, else a guess that says so."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from graphprobe import render
from graphprobe.errors import RenderError
from graphprobe.records import GraphView
from graphprobe.render.kernels import kernel_kind, operator_kind, pair_by_name
from graphprobe.render.pairing import pair_from_the_end
from graphprobe.render.trace import kernels_by_node, read_trace, short_kernel
from render_reading import Picture
from render_samples import llama
from render_traces import GEMM, chrome, nsys, write_recorded


@pytest.fixture(params=["json", "json.gz", "sqlite"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    def write(graph: GraphView, ranges: bool) -> Path:
        path = tmp_path / f"trace.{request.param}"
        if request.param == "sqlite":
            nsys(graph, path, ranges)
        else:
            data = json.dumps(chrome(graph, ranges)).encode()
            path.write_bytes(gzip.compress(data) if request.param == "json.gz" else data)
        return path

    return write


@pytest.mark.parametrize("ranges", [True, False])
def test_each_operation_gets_the_kernels_of_its_last_run(written: Any, ranges: bool) -> None:
    graph = llama()
    found, exact = kernels_by_node(read_trace(written(graph, ranges)), graph)
    assert exact is ranges
    assert set(found) == {node.name for node in graph.nodes if node.op == "call_function" and not node.is_view}
    assert {kernel.micros for kernels in found.values() for kernel in kernels} == {3.0}


@pytest.mark.parametrize("ranges", [True, False])
def test_the_picture_names_kernels_their_times_and_the_sum_of_the_layer(written: Any, ranges: bool) -> None:
    graph = llama()
    overlay = render.overlay_trace(written(graph, ranges), graph)
    picture = Picture(render.dot_layer(graph, 1, overlay=overlay))
    text = picture.text("scale_1")
    assert "Kernel2 3.0 \u00b5s" in text and ("guess" in text) is not ranges
    assert "kernels of 38 operations take 114.0 \u00b5s together" in picture.title
    assert ("a guess" in picture.title) is not ranges


def test_a_guess_goes_on_past_operations_that_only_one_side_knows(tmp_path: Path) -> None:
    graph = llama()
    kept = [event for event in chrome(graph)["traceEvents"] if event.get("name") != "aten::softmax"]
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": kept}))
    found, exact = kernels_by_node(read_trace(tmp_path / "t.json"), graph)
    assert not exact and {"scores_0", "mixed_1", "logits", "embedding"} <= set(found) and "softmax_1" not in found


@pytest.mark.parametrize("suffix", [".json", ".sqlite"])
def test_kernels_of_a_cuda_graph_are_guessed_by_their_names(tmp_path: Path, suffix: str) -> None:
    """No host operation is in such a trace: products, norms and the like find their operations in order."""
    graph = llama(6)
    path = tmp_path / f"trace{suffix}"
    write_recorded(graph, path)
    found, exact = kernels_by_node(read_trace(path), graph)
    assert not exact
    calls = [node for node in graph.nodes if node.op == "call_function" and not node.is_view]
    right = {node.name: 100.0 + number for number, node in enumerate(calls)}  # microseconds in the last replay
    assert {name: round(kernels[0].micros, 3) for name, kernels in found.items()} == right
    overlay = render.overlay_trace(path, graph)
    assert "a guess" in overlay.title and all(text.startswith("guess: ") for text in overlay.lines["scores_1"])


def test_kernels_that_have_no_operation_and_fused_ones_do_not_shift_the_rest() -> None:
    graph = llama(6)
    linear, product = "nvjet_sm90_tst_64x8", "cutlass_80_tensorop_s16816gemm"
    wanted = [n for n in graph.nodes if operator_kind(n) in ("product", "softmax")]
    kernels = []
    for node in wanted:
        kernels += ["void splitKreduce_kernel<32>(float*)"] if kernels and kernels[-1] == linear else []
        kernels.append(
            "softmax_warp_forward" if "softmax" in node.target else linear if "linear" in node.target else product
        )
        kernels.append("triton_poi_fused_add_mul_3")  # many elementwise operations in one kernel
    found = pair_by_name(kernels, graph)
    assert {node.name for node in wanted} <= set(found)
    for node in wanted:
        assert kernel_kind(kernels[found[node.name][0]]) == operator_kind(node)


def test_long_lists_are_paired_as_late_as_may_be() -> None:
    """Against the table of the longest common subsequence, entry by entry."""
    rng = random.Random(3)
    for _ in range(60):
        wanted, given = ([rng.choice("abcd") for _ in range(rng.randrange(30))] for _ in range(2))
        pairs = pair_from_the_end(wanted, given)
        assert all(wanted[p] == given[q] for p, q in pairs)
        assert all(p < r and q < s for (p, q), (r, s) in itertools.pairwise(pairs))
        first = pairs[0][1] if pairs else len(given)
        assert len(pairs) == longest(wanted, given[first:])
        assert longest(wanted, given) - len(pairs) <= 0.1 * first  # an earlier run brings few
    many = [f"{i % 7}" for i in range(4000)]
    assert pair_from_the_end(many, many * 3) == [(i, 8000 + i) for i in range(4000)]


def longest(one: list[str], other: list[str]) -> int:
    row = [0] * (len(other) + 1)
    for x in one:
        before = row
        row = [0]
        for place, y in enumerate(other):
            row.append(before[place] + 1 if x == y else max(row[-1], before[place + 1]))
    return row[-1]


def test_of_many_kernels_the_longest_are_named(tmp_path: Path) -> None:
    graph = llama()
    trace = chrome(graph, ranges=True)
    call = [e for e in trace["traceEvents"] if e.get("name") == "graphprobe:scores_1"][-1]
    for number, (name, micros) in enumerate([("fill", 1.0), ("fill", 1.0), ("where", 2.5), ("flash_fprop", 8.0)]):
        here = {"ph": "X", "pid": 1, "tid": 7, "ts": call["ts"] + 2, "args": {"correlation": 9000 + number}}
        trace["traceEvents"] += [
            {**here, "cat": "cuda_driver", "name": "cuLaunchKernel", "dur": 1},
            {**here, "cat": "gpu_memset" if number == 0 else "kernel", "name": name, "pid": 0, "tid": 3, "dur": micros},
        ]
    (tmp_path / "t.json").write_text(json.dumps(trace))
    overlay = render.overlay_trace(tmp_path / "t.json", graph)
    assert [line.split(" ")[0] for line in overlay.lines["scores_1"]] == ["where", "flash_fprop", "Kernel2", "and"]
    assert overlay.micros["scores_1"] == pytest.approx(15.5)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "collective"),
        ("fmhaSm90Kernel_QkvE4m3OBfloat16H64_PagedKv", "attention"),
        ("void flashinfer::norm::FusedAddRMSNormKernel<8>", "norm"),
        ("void moe_align_block_size_kernel<int>", "routing"),
        ("_rope_fwd_kernel", "rotary"),
        ("void cunn_SoftMaxForward<8, float>", "softmax"),
        ("ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn", "product"),
        ("void act_and_mul_kernel<silu>", "activation"),
        ("void per_token_quant_fp8", "quantisation"),
        ("triton_poi_fused_add_0", "elementwise"),
    ],
)
def test_names_of_kernels_tell_what_they_do(kernel: str, kind: str) -> None:
    assert kernel_kind(kernel) == kind


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "cannot read the trace"),
        (b"{}", "no traceEvents"),
        (b'{"traceEvents": []}', "0 kernel launches"),
        (b"\x1f\x8bnonsense", "cannot read the trace"),
        (b"SQLite format 3\x00nonsense", "cannot read the trace"),
    ],
)
def test_files_that_are_no_trace_get_a_clear_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(RenderError, match=said):
        render.overlay_trace(path, llama())
    with pytest.raises(RenderError, match="cannot read the trace"):
        render.overlay_trace(tmp_path / "missing", llama())


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (GEMM, "Kernel2"),
        ("void at::native::(anonymous namespace)::softmax_warp<float, 4>(float*)", "softmax_warp"),
        ("triton_poi_fused_add_0", "triton_poi_fused_add_0"),
        ("nvjet_sm90_tst_64x8_h_bz_TNT", "nvjet_sm90_tst_64x8_h_bz_TNT"),
        ("void f<a::operator()<int>, (x)3>(int)", "f"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<bool>, T<1> >(int)",
            "elementwise fill",
        ),
        (
            "void at::native::elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<at::native::BinaryFunctor<"
            "float, float, float, at::native::binary_internal::MulFunctor<float> > >(at::TensorIteratorBase&)>(int)",
            "elementwise mul",
        ),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::(anonymous "
            "namespace)::where_kernel_impl(at::TensorIterator&)::{lambda()#1}::operator()() const>(int)",
            "elementwise where",
        ),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>, 4> >(R)",
            "reduce mean",
        ),
        ("", ""),
    ],
)
def test_kernels_are_called_by_their_bare_names(name: str, short: str) -> None:
    assert short_kernel(name) == short

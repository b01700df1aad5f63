"""Which operations launched a run's kernels, guessed from the kernels' names and order alone.

A CUDA graph is launched as a whole, so its trace holds no host operation to pair kernels with. What is left is that
names tell what a kernel does (`nvjet_...` multiplies matrices) and that kernels run in the order of the graph.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from graphprobe.records import GraphView, NodeView
from graphprobe.render.wiring import CALLS

_AHEAD = 60  # operations looked at for the next kernel of a kind that few operations have
_NEAR = 4  # and for one of a common kind

#: kind -> what kernels of it are called. The first that fits decides.
KERNELS = (
    ("collective", r"nccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|one_?shot|two_?shot"),
    ("attention", r"fmha|flash(?!infer)|attention|attn|\bmla|mha|paged|sdpa"),
    ("routing", r"topk|moe_?align|routing|route|sort|expert_?offset"),
    ("rotary", r"rope|rotary"),
    ("norm", r"(rms|layer|batch|group)_?norm"),
    ("quantisation", r"quant|to_?fp8|to_?fp4|cvt_?fp"),
    ("softmax", r"softmax"),
    ("embedding", r"embedding|index_?select|gather|indexing|vectorized_gather|index_elementwise"),
    ("convolution", r"conv|implicit_?gemm|winograd|fprop|dgrad"),
    ("product", r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|matmul|_mm_|splitk|dot_kernel"),
    ("activation", r"silu|gelu|swiglu|act_and_mul|relu|sigmoid|tanh"),
    ("reduction", r"reduce"),
    ("joining", r"catarray|concat"),
)
#: kind -> the operators that launch such kernels.
OPERATORS = (
    ("collective", r"all_reduce|all_gather|reduce_scatter|all_to_all"),
    ("attention", r"scaled_dot_product|attention|sdpa|fmha|flash|mla|flex"),
    ("routing", r"topk|moe|sort"),
    ("rotary", r"rope|rotary"),
    ("quantisation", r"quantize"),
    ("norm", r"(rms|layer|batch|group)_?norm"),
    ("softmax", r"softmax"),
    ("embedding", r"embedding|\.index\.|gather|index_select"),
    ("convolution", r"conv"),
    ("product", r"linear|addmm|\.b?mm\b|matmul|einsum|_mm\b|baddbmm"),
    ("activation", r"silu|gelu|swiglu|relu|sigmoid|tanh"),
    ("reduction", r"\.(mean|sum|amax|amin|var|norm|prod|argmax)\b"),
    ("joining", r"\.(cat|stack)\b"),
)
_KERNELS = tuple((kind, re.compile(pattern, re.I)) for kind, pattern in KERNELS)
_OPERATORS = tuple((kind, re.compile(pattern, re.I)) for kind, pattern in OPERATORS)
#: Kinds that are so frequent, and so often fused, that one of them says little about where a run is.
_COMMON = ("elementwise", "reduction", "joining", "activation")
#: A kernel that finishes what the one before it began.
_SEQUEL = re.compile(r"splitk_?reduce|split_?kreduce|reduce_?splitk|flash_fwd_splitkv_combine|memset", re.I)


def kernel_kind(name: str) -> str:
    """Return what a kernel does, by its name: a kind of `KERNELS`, else 'elementwise'."""
    return next((kind for kind, pattern in _KERNELS if pattern.search(name)), "elementwise")


def operator_kind(node: NodeView) -> str:
    """Return what kind of kernel an operation launches: of `OPERATORS`, else 'elementwise'; '' for none."""
    if node.op not in CALLS or node.is_view or node.target.rpartition(".")[2] == "getitem":
        return ""
    return next((kind for kind, pattern in _OPERATORS if pattern.search(node.target)), "elementwise")


def _next(operations: Sequence[tuple[str, str]], at: int, kind: str) -> int | None:
    """Return the place of the next operation of a kind, from `at` on; a common kind is sought up to a rare one."""
    common = kind in _COMMON
    for i in range(at, min(at + (_NEAR if common else _AHEAD), len(operations))):
        if operations[i][1] == kind:
            return i
        if common and operations[i][1] not in _COMMON:
            return None
    return None


def pair_by_name(kernels: Sequence[str], graph: GraphView) -> dict[str, list[int]]:
    """Return for each operation the places of its kernels in `kernels`, which are in the order of their start.

    Both are walked from the end: where several runs were recorded, the last one counts. A kernel for which no
    operation of its kind follows soon is left out, and so is an operation whose kernel was fused into another.
    """
    operations = [(node.name, operator_kind(node)) for node in graph.nodes]
    operations = [(name, kind) for name, kind in reversed(operations) if kind]
    found: dict[str, list[int]] = {}
    at = 0
    sequels: list[int] = []
    for place in range(len(kernels) - 1, -1, -1):
        if _SEQUEL.search(kernels[place]):
            sequels.append(place)
            continue
        hit = _next(operations, at, kernel_kind(kernels[place]))
        if hit is not None:
            found[operations[hit][0]] = [place, *reversed(sequels)]
            at = hit + 1
        sequels = []
    return found

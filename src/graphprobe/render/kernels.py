"""Which operations launched a run's kernels, guessed from the kernels' names and order alone.

A CUDA graph is launched as a whole, so its trace holds no host operation to pair kernels with. What is left is that
names tell what a kernel does (`nvjet_...` multiplies matrices) and that kernels run in the order of the graph.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from graphprobe.records import GraphView, NodeView
from graphprobe.render.pairing import pair_from_the_end
from graphprobe.render.wiring import CALLS

#: kind -> what kernels of it are called. The first that fits decides.
KERNELS = (
    ("collective", r"nccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|one_?shot|two_?shot"),
    ("attention", r"fmha|flash(?!infer)|attention|attn|\bmla|mha|paged|sdpa"),
    ("routing", r"topk|moe_?align|routing|route|sort|expert_?offset"),
    ("rotary", r"rope|rotary"),
    ("norm", r"(rms|layer|batch|group)_?norm"),
    ("quantisation", r"quant|to_?fp8|to_?fp4|cvt_?fp"),
    ("softmax", r"softmax"),
    ("counting", r"arange|linspace|range_cuda"),
    ("embedding", r"embedding|index_?select|gather|indexing|vectorized_gather|index_elementwise"),
    ("convolution", r"conv|implicit_?gemm|winograd|fprop|dgrad"),
    ("product", r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|matmul|_mm_|splitk|dot_kernel"),
    ("activation", r"silu|gelu|swiglu|act_and_mul|relu|sigmoid|tanh"),
    ("reduction", r"reduce"),
    ("joining", r"catarray|concat"),
    ("multiplication", r"MulFunctor"),
    ("addition", r"CUDAFunctor(OnSelf|OnOther)?_add|AddFunctor"),
    ("division", r"DivFunctor|div_true|div_trunc|div_floor"),
    ("power", r"pow_tensor"),
    ("root", r"r?sqrt_kernel"),
    ("sign", r"neg_kernel"),
    ("cosine", r"\bcos_kernel"),
    ("sine", r"\bsin_kernel"),
    ("exponential", r"\bexp_kernel"),
    ("comparison", r"Compare\w*Functor|compare_\w*kernel"),
    ("logic", r"(Bitwise|Logical)\w*Functor|(bitwise|logical)_\w+_kernel"),
    ("choice", r"where_kernel|masked_fill"),
    ("filling", r"FillFunctor"),
    ("copy", r"copy_kernel|memcpy"),
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
    ("counting", r"\.(arange|linspace)\b"),
    ("embedding", r"embedding|\.index\.|gather|index_select"),
    ("convolution", r"conv"),
    ("product", r"linear|addmm|\.b?mm\b|matmul|einsum|_mm\b|baddbmm"),
    ("activation", r"silu|gelu|swiglu|relu|sigmoid|tanh"),
    ("reduction", r"\.(mean|sum|amax|amin|var|norm|prod|argmax)\b"),
    ("joining", r"\.(cat|stack)\b"),
    ("multiplication", r"\.mul_?\b"),
    ("addition", r"\.(add|sub|rsub)_?\b"),
    ("division", r"\.div_?\b"),
    ("power", r"\.(pow|square)\b"),
    ("root", r"\.r?sqrt\b"),
    ("sign", r"\.neg\b"),
    ("cosine", r"\.cos\b"),
    ("sine", r"\.sin\b"),
    ("exponential", r"\.exp\b"),
    ("comparison", r"\.(eq|ne|lt|le|gt|ge)\b"),
    ("logic", r"\.(__and__|__or__|__xor__|bitwise_\w+|logical_\w+)\b"),
    ("choice", r"\.(where|masked_fill)_?\b"),
    ("filling", r"\.(full|zeros|ones|full_like|zeros_like|ones_like|new_ones|new_zeros|new_full|fill)_?\b"),
    ("copy", r"\.(to|_to_copy|clone|contiguous|copy|reshape)_?\b"),
)
_KERNELS = tuple((kind, re.compile(pattern, re.I)) for kind, pattern in KERNELS)
_OPERATORS = tuple((kind, re.compile(pattern, re.I)) for kind, pattern in OPERATORS)
#: What the kernels that only their wrapper's name is known of may be: one element after the other, whatever is done.
_ONE_BY_ONE = (
    "multiplication", "addition", "division", "power", "root", "sign", "cosine", "sine", "exponential", "comparison",
    "logic", "choice", "filling", "copy", "counting", "activation",
)  # fmt: skip
#: Kinds that are so frequent, and so often fused, that one of them says little about where a run is.
_COMMON = {"elementwise", "reduction", "joining", *_ONE_BY_ONE}
_ALSO = dict.fromkeys(_ONE_BY_ONE, ("elementwise",))
#: Operations that check and launch nothing.
_CHECKS = re.compile(r"_assert|sym_constrain|_check|device_assert", re.I)
_MAY_COPY = re.compile(r"\.(reshape|contiguous|to)\b")
#: A kernel that finishes what the one before it began.
_SEQUEL = re.compile(r"splitk_?reduce|split_?kreduce|reduce_?splitk|flash_fwd_splitkv_combine|memset", re.I)


def kernel_kind(name: str) -> str:
    """Return what a kernel does, by its name: a kind of `KERNELS`, else 'elementwise'."""
    return next((kind for kind, pattern in _KERNELS if pattern.search(name)), "elementwise")


def operator_kind(node: NodeView) -> str:
    """Return what kind of kernel an operation launches: of `OPERATORS`, else 'elementwise'; '' for none."""
    if node.op not in CALLS or node.target.rpartition(".")[2] == "getitem" or _CHECKS.search(node.target):
        return ""
    if node.is_view and not _MAY_COPY.search(node.target):
        return ""
    return next((kind for kind, pattern in _OPERATORS if pattern.search(node.target)), "elementwise")


def pair_by_name(kernels: Sequence[str], graph: GraphView) -> dict[str, list[int]]:
    """Return for each operation the places of its kernels in `kernels`, which are in the order of their start.

    Both are aligned from the end: where several runs were recorded, the last one counts. A kernel for which there is no
    operation of its kind in that place is left out, and so is an operation whose kernel was fused into another.
    """
    operations = [(node.name, operator_kind(node)) for node in graph.nodes]
    operations = [(name, kind) for name, kind in operations if kind]
    own = [place for place, name in enumerate(kernels) if not _SEQUEL.search(name)]
    kinds = [kernel_kind(kernels[place]) for place in own]
    found: dict[str, list[int]] = {}
    for at, place in _paired([kind for _, kind in operations], kinds):
        following = own[place + 1] if place + 1 < len(own) else len(kernels)
        found[operations[at][0]] = list(range(own[place], following))  # itself, and what finishes what it began
    return found


def _paired(wanted: Sequence[str], given: Sequence[str]) -> list[tuple[int, int]]:
    """Pair what is rare first, for it cannot be mistaken; then, between these, what is common and often fused."""
    rare = [[i for i, kind in enumerate(kinds) if kind not in _COMMON] for kinds in (wanted, given)]
    anchors = [
        (rare[0][p], rare[1][q])
        for p, q in pair_from_the_end([wanted[i] for i in rare[0]], [given[i] for i in rare[1]])
    ]
    found = list(anchors)
    edges = [(-1, -1), *anchors, (len(wanted), len(given))]
    for (p, q), (to_p, to_q) in itertools.pairwise(edges):
        between = pair_from_the_end(wanted[p + 1 : to_p], given[q + 1 : to_q], _ALSO)
        found += [(p + 1 + at, q + 1 + place) for at, place in between]
    return found

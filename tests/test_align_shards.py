"""Models in one piece against the same models in pieces: shards of a tensor-parallel group, chunks, lone experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphprobe
from corpus import chunked, sharded
from corpus.sharded import BUGS, GPT2, LLAMA, Fused, Sharded, Sizes, Whole
from graphprobe.align.forms import Form
from graphprobe.align.rest import _gaps
from graphprobe.judge.constants import _is_block
from graphprobe.records import Report

FINE, COARSE = torch.float32, torch.bfloat16
SIZES = {"llama": LLAMA, "gpt2": GPT2}
QUICK = {
    ("gpt2", 2, True, False, COARSE), ("llama", 2, False, True, FINE),
    ("gpt2", 2, "words", False, COARSE), ("gpt2", 2, "scale", True, COARSE),
}  # fmt: skip
#: Sizes that no other test has: three shards, copies of keys, a weight for several projections.
OTHERS: dict[str, tuple[Sizes, int, type[Sharded]]] = {
    "three": (Sizes(heads=6, kv=3, inner=72, words=90, tokens=10), 3, Sharded),
    "biased": (Sizes(gated=False, heads=6, kv=6, inner=72, words=90, tokens=10, layers=3), 3, Sharded),
    "fused": (LLAMA, 2, Fused),
    "copies": (Sizes(kv=2), 4, Fused),
}
#: What a bug may be named as: what is wrong, or what it makes differ; and how many operations may be in doubt.
NAMES = {
    "slice": ({"linear"}, 2),
    "activation": ({"silu", "gelu"}, 10),
    "missing": ({"add", "linear", "mul", "silu", "gelu"}, 10),
    "kv": ({"linear"}, 2),
    "words": ({"ge", "mul", "embedding"}, 10),
    "bias": ({"linear", "add"}, 9),
    "scale": ({"mul"}, 6),
}


def either_way(one: nn.Module, other: nn.Module, turned: bool, dtype: torch.dtype, args: Any) -> Report:
    sides = [m.to(dtype).eval() for m in ((other, one) if turned else (one, other))]
    return graphprobe.diff(*sides, args)


def is_same(report: Report) -> None:
    assert report.verdict in ("identical", "rounding"), (report.findings, report.coverage)
    assert report.coverage.resolution >= 0.9 and not report.coverage.unknown, report.coverage


def is_one(report: Report) -> Any:
    assert report.verdict == "semantic", (report.verdict, report.coverage)
    found = [f for f in report.findings if f.kind == "semantic"]
    assert len(found) == 1, found
    return found[0]


def param(*values: Any, quick: bool) -> Any:
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "world", "sequence", "turned", "dtype"),
    [
        param(n, w, s, t, d, quick=(n, w, s, t, d) in QUICK)
        for n in SIZES for w in (2, 4) for s in (False, True) for t in (False, True) for d in (FINE, COARSE)
    ],
    ids=str,
)  # fmt: skip
def test_shards_are_parts_of_the_whole(name: str, world: int, sequence: bool, turned: bool, dtype: torch.dtype) -> None:
    sizes = SIZES[name]
    report = either_way(Whole(sizes), Sharded(sizes, world, "", sequence), turned, dtype, sharded.prompt(sizes))
    is_same(report)
    assert report.coverage.resolution >= 0.98 and report.coverage.evidence["slice"] >= 10 * world


@pytest.mark.parametrize(
    ("name", "world", "bug", "turned", "dtype"),
    [
        param(n, w, b, t, d, quick=(n, w, b, t, d) in QUICK)
        for n in SIZES for w in (2, 4) for b in BUGS for t in (False, True) for d in (FINE, COARSE)
        if (n, b) != ("llama", "bias")
    ],
    ids=str,
)  # fmt: skip
def test_what_one_shard_has_wrong_is_one_finding(
    name: str, world: int, bug: str, turned: bool, dtype: torch.dtype
) -> None:
    sizes = SIZES[name]
    report = either_way(Whole(sizes), Sharded(sizes, world, bug), turned, dtype, sharded.prompt(sizes))
    found = is_one(report)
    names, most = NAMES[bug]
    assert found.located and min(len(found.before), len(found.after)) <= most, found
    # where the wrong side is taken for right, it is the right one that is too much: there the place is what counts
    assert turned or found.op.split(".")[1] in names, found.op


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [FINE, COARSE], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_other_sizes_are_shards_as_well(name: str, dtype: torch.dtype, turned: bool) -> None:
    sizes, world, kind = OTHERS[name]
    is_same(either_way(Whole(sizes), kind(sizes, world), turned, dtype, sharded.prompt(sizes)))
    for bug in ("activation", "scale", "kv"):
        is_one(either_way(Whole(sizes), kind(sizes, world, bug), turned, dtype, sharded.prompt(sizes)))


@pytest.mark.parametrize(
    ("name", "kind", "bug", "turned", "dtype"),
    [
        param(n, k, b, t, d, quick=(n, k, t, d) == ("gpt2", "mlp", False, COARSE))
        for n in SIZES for k, b in (("mlp", "activation"), ("queries", "mask"), ("head", "token"))
        for t in (False, True) for d in (FINE, COARSE)
    ],
    ids=str,
)  # fmt: skip
def test_chunks_are_parts_of_the_whole(name: str, kind: str, bug: str, turned: bool, dtype: torch.dtype) -> None:
    sizes, whole = SIZES[name], lambda: chunked.Written(SIZES[name], last=kind == "head")
    is_same(either_way(whole(), chunked.Chunked(sizes, kind), turned, dtype, sharded.prompt(sizes)))
    wrong = chunked.Chunked(sizes, kind, bug=bug)
    assert is_one(either_way(whole(), wrong, turned, dtype, sharded.prompt(sizes))).located


@pytest.mark.parametrize(
    ("bug", "turned", "dtype"),
    [
        param(b, t, d, quick=d is COARSE and (b, t) in (("", False), ("scale", True)))
        for b in ("", "shifted", "scale") for t in (False, True) for d in (FINE, COARSE)
    ],
    ids=str,
)  # fmt: skip
def test_experts_on_their_own_tokens_are_rows_of_all_on_all(bug: str, turned: bool, dtype: torch.dtype) -> None:
    """In bfloat16, too: what one weight of a stack rounds to is no constant that was computed ahead."""
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    report = either_way(chunked.Experts(), chunked.Looped(bug=bug), turned, dtype, (x,))
    assert report.coverage.evidence["slice"] >= 20
    is_one(report) if bug else is_same(report)


# --- units ----------------------------------------------------------------------------------------------------------


def test_what_parts_leave_is_told_in_parts_of_their_size() -> None:
    def parts(*places: tuple[int, int], of: int = 12) -> list[Form]:
        return [Form("after", of, tuple(range(*p)), True) for p in places]

    assert list(_gaps(parts((0, 4), (4, 8), (8, 12)))) == []
    assert list(_gaps(parts((4, 8)))) == [(0, 4), (8, 4)]
    assert list(_gaps(parts((0, 5), (5, 10)))) == [(10, 2)]


@pytest.mark.parametrize("shape", [(24, 16), (4, 12, 16), (64,)], ids=str)
def test_a_block_of_a_weight_is_known_along_any_dimension(shape: tuple[int, ...]) -> None:
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(COARSE)
    for dim, size in enumerate(shape):
        part = whole.narrow(dim, size // 4, size // 2)
        assert _is_block(part.clone(), whole)
        assert not _is_block(part * 1.01, whole) and not _is_block(whole, part)
        if part.dim() > 1:
            assert _is_block(part.mT.contiguous(), whole) and _is_block(whole.select(dim, 1).clone(), whole)

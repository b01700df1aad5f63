"""The same prompt in another form: padded, a row of a batch, taken in chunks with a cache. Claims carry the slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprobe
from corpus.mutations.subjects import subject
from graphprobe.cli import main

WIDTH, HEADS, WORDS, TOKENS, PADDED = 24, 2, 40, 11, 17
DTYPES = (torch.float32, torch.bfloat16)


class Decoder(nn.Module):
    """Two layers of causal attention with a padding mask; `leaks` forgets the mask in the second layer."""

    def __init__(self, leaks: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.table = nn.Parameter(torch.randn(WORDS, WIDTH))
            self.mixers = nn.ParameterList([torch.randn(WIDTH, 3 * WIDTH) * WIDTH**-0.5 for _ in range(2)])
            self.outs = nn.ParameterList([torch.randn(WIDTH, WIDTH) * WIDTH**-0.5 for _ in range(2)])
        self.leaks = leaks
        self.to(dtype)

    def layer(self, i: int, h: torch.Tensor, mask: torch.Tensor, past: Any = None) -> tuple[torch.Tensor, Any]:
        q, k, v = (torch.rms_norm(h, (WIDTH,)) @ self.mixers[i]).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        score = q @ k.transpose(-1, -2) * (WIDTH / HEADS) ** -0.5
        score = score.masked_fill(~mask, -1e9)
        mixed = (torch.softmax(score.float(), -1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return h + nn.functional.gelu(mixed @ self.outs[i]), (k, v)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        count = ids.shape[1]
        causal = torch.arange(count)[:, None] >= torch.arange(count)[None]
        seen = causal & (mask[:, None, None, :] == 1)
        h = self.table[ids]
        for i in range(2):
            h, _ = self.layer(i, h, torch.ones_like(seen) if self.leaks and i == 1 else seen)
        return h @ self.table.T


class Chunked(Decoder):
    """The same decoder, which takes its prompt in chunks; `stale` scales what it keeps of the first one."""

    def __init__(self, sizes: tuple[int, ...], stale: float = 1.0) -> None:
        super().__init__()
        self.sizes, self.stale = sizes, stale

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        at, past, out = 0, [None, None], []
        for number, size in enumerate(self.sizes):
            end = at + size
            causal = torch.arange(at, end)[:, None] >= torch.arange(end)[None]
            h = self.table[ids[:, at:end]]
            for i in range(2):
                h, past[i] = self.layer(i, h, causal[None, None], past[i])
                if number == 0 and i == 1:
                    past[i] = (past[i][0] * self.stale, past[i][1])
            out.append(h @ self.table.T)
            at = end
        return torch.cat(out, 1)


def prompt(seed: int = 0, rows: int = 1, count: int = TOKENS) -> torch.Tensor:
    return torch.randint(1, WORDS, (rows, count), generator=torch.Generator().manual_seed(seed))


def padded(ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    pad = torch.zeros(1, PADDED - TOKENS, dtype=torch.long)
    ones = torch.ones_like(ids)
    parts = ([pad, ids], [pad, ones]) if side == "left" else ([ids, pad], [ones, pad])
    return torch.cat(parts[0], 1), torch.cat(parts[1], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_what_is_not_padding(side: str, dtype: torch.dtype) -> None:
    ids = prompt()
    model = Decoder(dtype=dtype)
    report = graphprobe.diff(model, model, (ids, torch.ones_like(ids)), after_args=padded(ids, side))
    assert report.verdict in ("identical", "rounding"), report.findings
    assert report.coverage.resolution == 1.0 and report.coverage.evidence["slice"] > 20
    assert [row.shape for row in report.outputs] == [(1, TOKENS, WORDS)]
    views = {claim.view for claim in report.claims if claim.evidence == "slice"}
    first = 0 if side == "right" else PADDED - TOKENS
    assert f"dimension 1: {first} to {first + TOKENS - 1} of {PADDED}" in views


def test_the_padded_one_may_be_before() -> None:
    ids = prompt()
    model = Decoder()
    report = graphprobe.diff(model, model, padded(ids, "left"), after_args=(ids, torch.ones_like(ids)))
    assert report.verdict in ("identical", "rounding") and report.coverage.resolution == 1.0


def test_padding_on_the_left_without_positions_is_explained() -> None:
    model, _, _ = subject("llama", torch.float32, 1, seed=0)
    ids = prompt() % 32 + 1
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    longer, mask = padded(ids, "left")
    after = {"input_ids": longer, "attention_mask": mask, "use_cache": False}
    report = graphprobe.diff(model, model, (), given, after_args=(), after_kwargs=after)
    assert report.verdict == "unknown" and max(row.error or 0.0 for row in report.outputs) < 1e-5
    said = f"begin at place {PADDED - TOKENS} of input_ids in after, and no input says at which positions"
    assert any(said in note and "Give position_ids" in note for note in report.notes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_that_leaks_is_met_in_the_attention_that_lets_it_in(dtype: torch.dtype) -> None:
    ids = prompt()
    before, after = Decoder(dtype=dtype), Decoder(leaks=True, dtype=dtype)
    report = graphprobe.diff(before, after, (ids, torch.ones_like(ids)), after_args=padded(ids, "left"))
    assert report.verdict == "semantic"
    scores = {f.outputs[1] for f in report.findings if f.kind == "semantic"}
    assert len(scores) == 1 and report.outputs[0].error is not None and report.outputs[0].error > 1e-3
    # the first layer keeps its mask, and nothing before the second layer's mask is blamed
    first = report.first
    assert first is not None and first.introduced is not None and first.introduced > 1e-3


def test_a_prompt_is_the_same_alone_and_as_a_row_of_a_batch() -> None:
    ids = prompt()
    batch = prompt(1, rows=8)
    batch[5] = ids[0]
    model = Decoder()
    report = graphprobe.diff(model, model, (ids, torch.ones_like(ids)), after_args=(batch, torch.ones_like(batch)))
    assert report.verdict in ("identical", "rounding") and report.coverage.resolution == 1.0
    assert "dimension 0: 5 of 8" in {claim.view for claim in report.claims}


@pytest.mark.parametrize("sizes", [(5, 4, 2), (8, 1, 1, 1)], ids=str)
def test_chunks_with_a_cache_are_slices_of_the_prompt_in_one_go(sizes: tuple[int, ...]) -> None:
    args = (prompt(), torch.ones_like(prompt()))
    report = graphprobe.diff(Decoder(), Chunked(sizes), args)
    assert report.verdict in ("identical", "rounding"), report.findings
    assert report.coverage.resolution >= 0.95 and report.coverage.evidence["slice"] > 40


def test_a_stale_cache_is_met_where_it_is_read() -> None:
    args = (prompt(), torch.ones_like(prompt()))
    report = graphprobe.diff(Decoder(), Chunked((6, 5), stale=1.001), args)
    assert report.verdict == "semantic" and report.coverage.resolution >= 0.95
    assert len([f for f in report.findings if f.kind == "semantic"]) == 1


def test_inputs_that_do_not_lie_in_one_another_are_compared_by_nothing() -> None:
    ids = prompt()
    model = Decoder()
    other = prompt(9, count=PADDED)
    report = graphprobe.diff(model, model, (ids, torch.ones_like(ids)), after_args=(other, torch.ones_like(other)))
    assert not report.ok and "slice" not in report.coverage.evidence


def test_files_with_inputs_of_another_form_are_compared_slice_by_slice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = prompt()
    model = Decoder()
    calls = {"before": (ids, torch.ones_like(ids)), "after": padded(ids, "right")}
    for name, args in calls.items():
        graphprobe.save(graphprobe.capture(model, args), tmp_path / f"{name}.fx", args=args)
    files = [str(tmp_path / f"{name}.fx") for name in calls]
    assert main(["diff", *files]) == 0
    main(["align", *files])
    assert "dimension 1: 0 to 10 of 17" in capsys.readouterr().out
    assert main(["diff", files[0], files[0], "--after-inputs", files[1]]) == 2  # captured for the other shape

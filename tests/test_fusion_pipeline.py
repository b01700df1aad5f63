"""All fusions together: on every architecture one verdict of rounding, on a trained model the same words."""

from __future__ import annotations

import pytest

import graphprobe
from graphprobe.demo import speech, subjects
from transform_tools import DTYPES, captured

FUSIONS = (
    "remove_noops,merge_common,fold_constants,fuse_rmsnorm,eager_attention_to_sdpa,eliminate_repeat_kv,fuse_rotary,"
    "fuse_qkv,fuse_gate_up,fuse_swiglu,fuse_add_rmsnorm"
)
APPLIED = {"llama": 11, "qwen2": 11, "qwen3": 11, "mistral": 11, "gpt2": 4, "bert": 5}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", APPLIED)
def test_all_fusions_together_differ_by_rounding_at_most(name: str, dtype: object) -> None:
    gm, args, kwargs = captured(name, dtype)  # type: ignore[arg-type]
    report = graphprobe.run(gm, args, kwargs, pipeline=FUSIONS, check=("lint", "total"))
    assert report.ok, str(report)
    assert sum(step.status == "applied" for step in report.steps) == APPLIED[name]
    assert report.report is not None and report.report.verdict == "rounding"


def says(subject: subjects.Subject) -> tuple[str, str]:
    """Return what the subject says before and after all fusions."""
    tokens = subject.encode(subject.prompt)
    call = {"input_ids": speech.padded(subject, tokens), **subject.options}
    before = graphprobe.capture(subject.model, (), call)
    report = graphprobe.run(before, (), call, pipeline=FUSIONS)
    assert report.ok and all(step.status == "applied" for step in report.steps), str(report)
    first, second = (subject.decode(speech.answer(gm, subject, tokens)) for gm in (before, report.gm))
    return first, second


@pytest.mark.slow
def test_smollm2_says_the_same_after_all_fusions() -> None:
    if subjects._missing():
        pytest.skip(subjects._missing())
    before, after = says(subjects.smollm2(lambda _: None))
    assert before and after == before

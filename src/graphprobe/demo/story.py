"""The demo, step by step: capture, transform with a planted bug, talk, ask graphprobe, mend, ask again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.fx import GraphModule

import graphprobe
from graphprobe import render
from graphprobe.demo import bug, speech, subjects
from graphprobe.demo.subjects import Subject
from graphprobe.errors import InputError
from graphprobe.pipeline import Applied, Pipeline, Run
from graphprobe.records import Report

HONEST = "fuse_rmsnorm,fuse_qkv,eager_attention_to_sdpa"

Say = Callable[[str], None]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Told:
    """What the demo showed; `ok` if the bug was found where it was planted and the honest pipeline passed."""

    model: str
    prompt: str
    layer: int
    said_before: str
    said_with_bug: str
    said_after: str
    with_bug: Report
    honest: Report
    files: tuple[str, ...]
    ok: bool


@dataclass(frozen=True)
class _Stage:
    """What all steps of one telling share."""

    subject: Subject
    before: GraphModule
    tokens: list[int]
    inputs: dict[str, object]
    say: Say
    progress: Progress


def tell(*, model: str, layer: int | None, prompt: str | None, directory: str, say: Say, progress: Progress) -> Told:
    """Tell the story, line by line through `say`, and write pictures and reports into `directory`.

    `model` is "auto", "smollm2" or "tiny". Raises InputError where the model, the layer or the directory is none.
    """
    out = _directory(directory)
    subject = subjects.choose(model, say)
    layer = subject.layer if layer is None else layer
    if not 0 <= layer < subject.layers:
        raise InputError(f"--layer {layer}: {subject.name} has layers 0 to {subject.layers - 1}")
    prompt = prompt or subject.prompt

    stage, said_before = _capture(subject, prompt, say, progress)
    broken, said_with_bug = _transform(stage, _planted(layer), "2  A pipeline of graph transforms runs over it")
    say(f"     the model said   {said_before!r}\n     now it says      {said_with_bug!r}\n")

    say("3  graphprobe.diff(before, after): which operation is to blame?\n")
    with_bug = _diff(stage, broken)
    say(_indented(render.text(with_bug)) + "\n")
    files = _write(with_bug, out)
    say("".join(f"     wrote {file}\n" for file in files))

    mended, said_after = _transform(stage, Pipeline.parse(HONEST), "4  The same pipeline without the bug")
    say(f"     now it says      {said_after!r}\n")
    honest = _diff(stage, mended)
    say(_indented(_brief(honest)) + "\n")
    ok = _is_found(with_bug, layer) and honest.ok
    say(_ending(with_bug, honest, layer))
    return Told(subject.name, prompt, layer, said_before, said_with_bug, said_after, with_bug, honest, tuple(files), ok)


def _planted(layer: int) -> Pipeline:
    planted = bug.FuseQkvWithBug(layer)
    honest = Pipeline.parse(HONEST).transforms
    return Pipeline(tuple(planted if t.name == "fuse_qkv" else t for t in honest))


def _capture(subject: Subject, prompt: str, say: Say, progress: Progress) -> tuple[_Stage, str]:
    """Capture the subject at the length of question and answer; the inputs are the question with before's answer."""
    tokens = subject.encode(prompt)
    call = {"input_ids": speech.padded(subject, tokens), **subject.options}
    before = graphprobe.capture(subject.model, (), call)
    operations = sum(node.op == "call_function" for node in before.graph.nodes)
    say(f"1  Capture {subject.name} (bfloat16, {subject.layers} layers): {operations} operations")
    said = speech.answer(before, subject, tokens)
    call["input_ids"][0, len(tokens) : len(tokens) + len(said)] = call["input_ids"].new_tensor(said)
    answer = subject.decode(said)
    say(f"     asked            {prompt!r}\n     it says          {answer!r}\n")
    return _Stage(subject, before, tokens, call, say, progress), answer


def _transform(stage: _Stage, pipeline: Pipeline, title: str) -> tuple[Run, str]:
    """Run a pipeline under observation, say what matched, and let the result speak."""
    stage.say(title)
    run = pipeline.run(stage.before)
    for step in run.steps:
        came = f"{len(step.outcome.matches)} matches" if isinstance(step.outcome, Applied) else step.outcome.reason
        stage.say(f"     {step.transform:<28} {came}")
    stage.say("")
    return run, stage.subject.decode(speech.answer(run.gm, stage.subject, stage.tokens))


def _diff(stage: _Stage, run: Run) -> Report:
    report = graphprobe.diff(
        stage.before, run.gm, (), stage.inputs, events=run.events, exact="always", progress=stage.progress
    )
    return run.attributed(report)


def _is_found(report: Report, layer: int) -> bool:
    first = report.first
    return first is not None and report.verdict == "semantic" and f".layers.{layer}." in f".{first.module_path}."


def _write(report: Report, out: Path) -> list[str]:
    files = [out / name for name in ("culprit.dot", "culprit.png", "report.html", "report.json")]
    dot, png, page, data = files
    report.render(str(dot))
    report.render(str(png))
    report.to_html(str(page))
    data.write_text(report.to_json(indent=2) + "\n", encoding="utf-8")
    return [str(file) for file in files]


def _directory(path: str) -> Path:
    out = Path(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {path}: {error.strerror}") from error
    return out


def _indented(text: str) -> str:
    return "\n".join(f"     {line}".rstrip() for line in text.splitlines())


def _brief(report: Report) -> str:
    """Say in three lines what an honest comparison gave."""
    lines = [f"verdict: {report.verdict} (exit status {report.exit_code})"]
    standing = [f for f in report.findings if f.causal and f.introduced is not None]
    if standing:
        worst = max(standing, key=lambda f: f.introduced or 0.0)
        exact = "" if worst.exact is None else f", {worst.exact:.1e} in exact arithmetic"
        lines.append(
            f"{len(standing)} places round differently; most: {worst.introduced:.1e} at {worst.module_path}{exact}"
        )
    coverage = report.coverage
    lines.append(f"{coverage.inside} operations judged, resolution {coverage.resolution:.0%}, {report.seconds:.1f} s")
    return "\n".join(lines)


def _ending(with_bug: Report, honest: Report, layer: int) -> str:
    found = "found" if _is_found(with_bug, layer) else "NOT found"
    return (
        f"The planted bug in layer {layer} was {found} (diff exits with {with_bug.exit_code}); "
        f"without it the verdict is {honest.verdict} (diff exits with {honest.exit_code})."
    )

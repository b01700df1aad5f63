"""What holds of every transform of the library, asked for one case: a transform, a model, what runs before it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule

import graphprobe
from graphprobe import provenance
from graphprobe.pipeline import Pipeline, Run, fresh_copy
from graphprobe.pipeline.hygiene import clean_up
from transform_tools import assert_metadata, captured, matches, reason

DECODERS = ("llama", "qwen2", "qwen3", "mistral")
LANGUAGE = (*DECODERS, "gpt2", "bert")
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One transform: what runs before it, how many places match, how the counts of operators change."""

    transform: str
    before: str = ""
    matches: int = 0
    change: dict[str, int] = field(default_factory=dict)

    def run(self, name: str, dtype: torch.dtype = torch.float32) -> Run:
        """Run it, and what comes before it, over a model of the corpus."""
        pipeline = ",".join(part for part in (self.before, self.transform) if part)
        return Pipeline.parse(pipeline).run(captured(name, dtype)[0])

    def check_operators(self, name: str) -> None:
        """Exactly the expected operators come and go, nothing else."""
        before = fresh_copy(captured(name)[0])
        clean_up(before)  # as the pipeline does after each transform
        if self.before:
            before = Pipeline.parse(self.before).run(before).gm
        done = self.run(name)
        assert len(matches(done)) == self.matches, matches(done)
        was, now = count(before), count(done.gm)
        assert {op: now.get(op, 0) - was.get(op, 0) for op in {*was, *now} if now.get(op) != was.get(op)} == self.change

    def check_metadata(self, name: str) -> None:
        """Every value is known, fresh, and says where it comes from; no rule of `lint` is broken."""
        done = self.run(name)
        assert_metadata(done.gm)
        assert graphprobe.lint(done.gm) == ()

    def verdict(self, name: str, dtype: torch.dtype) -> str:
        """Return the verdict on the transform alone: the graph just before it against the graph after it."""
        before, args, kwargs = captured(name, dtype)
        if self.before:
            before = Pipeline.parse(self.before).run(before).gm
        done = Pipeline.parse(self.transform).run(before)
        return graphprobe.diff(before, done.gm, args, kwargs, events=done.events).verdict

    def check_left_alone(self, name: str, why: str) -> None:
        """Nothing matches, the reason says why, and no node is made."""
        done = self.run(name)
        assert why in reason(done)
        seen = done.steps[-1].observation
        assert (seen.created, seen.rewritten, seen.replacements) == ((), (), ())


def count(gm: GraphModule) -> dict[str, int]:
    """Count the operators of a graph, assertions left out."""
    found: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and "_assert" not in str(node.target):
            target = provenance.target_name(node)
            found[target] = found.get(target, 0) + 1
    return found


def apply(transform: str, model: torch.nn.Module, *args: torch.Tensor) -> tuple[Run, tuple[torch.Tensor, ...]]:
    """Run one transform over a model of the test's own."""
    gm = graphprobe.capture(model.eval(), args)
    return Pipeline.parse(transform).run(gm), args

"""What holds of every transform of the library: the cases, and the checks that `test_transforms` asks of each.

A case is a transform, what runs before it, and the models of the corpus over which it runs.
"""

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
    """One transform: where it runs, what runs before it, and what is expected of it.

    `matches` places match (None: as many as the model has, which a test of its own counts), and the counts of
    operators change by `change`. `alone` holds models that are left as they are, with what the reason must say.
    """

    transform: str
    models: tuple[str, ...] = DECODERS
    before: str = ""
    matches: int | None = None
    change: dict[str, int] = field(default_factory=dict)
    verdicts: tuple[str, ...] = ("identical", "rounding")
    dtypes: tuple[torch.dtype, ...] = DTYPES
    alone: dict[str, str] = field(default_factory=dict)

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


GPT2_BERT = ("gpt2", "bert")
WITH_ATTENTION = ("llama", "mistral", "mixtral", "qwen3", "bert")

CASES = (
    Case(
        "eager_attention_to_sdpa",
        models=(*WITH_ATTENTION, "gpt2"),
        alone=dict.fromkeys(("conv", "mlp"), "no aten.softmax"),
    ),
    Case(
        "eliminate_repeat_kv",
        before="eager_attention_to_sdpa",
        matches=2,
        change={"aten.unsqueeze.default": -4, "aten.expand.default": -4, "aten.reshape.default": -4},
        alone=dict.fromkeys(GPT2_BERT, "keys and values are not both repeated"),
    ),
    Case("fold_constants", models=LANGUAGE, verdicts=("identical",)),
    Case(
        "fold_conv_bn",
        models=("conv",),
        matches=1,
        change={"aten.batch_norm.default": -1},
        alone={"gpt2": "there is no aten.batch_norm"},
    ),
    Case(
        "fuse_add_rmsnorm",
        before="remove_noops,fuse_rmsnorm",
        matches=4,
        change={
            "aten.add.Tensor": -4,
            "aten.rms_norm.default": -4,
            "graphprobe_transforms.add_rms_norm.default": 4,
            "operator.getitem": 7,
        },
        alone=dict.fromkeys(GPT2_BERT, "run fuse_rmsnorm before this"),
    ),
    Case(
        "fuse_gate_up",
        matches=2,
        change={"aten.linear.default": -2, "aten.split_with_sizes.default": 2, "operator.getitem": 4},
        alone=dict.fromkeys(GPT2_BERT, "multiplied with another linear"),
    ),
    Case("fuse_qkv", models=WITH_ATTENTION, alone=dict.fromkeys(("gpt2", "conv", "mlp"), "no three linears")),
    Case(
        "fuse_rmsnorm",
        models=("llama", "mistral", "mixtral", "qwen3"),
        alone=dict.fromkeys((*GPT2_BERT, "conv"), "no aten.rsqrt"),
    ),
    Case(
        "fuse_rotary",
        matches=4,
        change={
            "aten.mul.Tensor": -8,
            "aten.add.Tensor": -4,
            "aten.cat.default": -4,
            "aten.neg.default": -4,
            "aten.slice.Tensor": -8,
            "graphprobe_transforms.rotary.default": 4,
        },
        alone=dict.fromkeys(GPT2_BERT, "nothing is rotated by halves"),
    ),
    Case(
        "fuse_swiglu",
        matches=2,
        change={"aten.silu.default": -2, "aten.mul.Tensor": -2, "graphprobe_transforms.silu_mul.default": 2},
        alone=dict.fromkeys(GPT2_BERT, "nothing is multiplied with aten.silu"),
    ),
    Case("lower_dtype", models=LANGUAGE, dtypes=(torch.float32,)),
    Case("merge_common", models=LANGUAGE, verdicts=("identical",)),
    Case("remove_noops", models=LANGUAGE, verdicts=("identical",)),
    Case("shard_linears", models=LANGUAGE),
)


def case(transform: str) -> Case:
    """Return the case of one transform."""
    return next(one for one in CASES if one.transform == transform)


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

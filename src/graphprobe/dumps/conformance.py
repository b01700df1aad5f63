"""Is what a configuration asked for really in the graphs? One answer a transform, with the operators that prove it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphprobe.dumps import comparing
from graphprobe.dumps.reading import Dumps, Entry

#: AutoDeploy's transforms and the operators they put into a graph, as far as their names tell.
AUTODEPLOY: dict[str, str] = {
    "match_rmsnorm_pattern": r"torch_rmsnorm",
    "fuse_rmsnorm": r"flashinfer_rms_norm|triton_rms_norm|aten\.rms_norm",
    "fuse_add_rms_norm": r"fused_add_rms_norm",
    "fuse_allreduce_residual_rmsnorm": r"fused_allreduce_residual_rmsnorm",
    "fuse_rmsnorm_quant_fp8": r"rms_norm_quant_fp8",
    "fuse_relu2_quant_nvfp4": r"fused_relu2_quant_nvfp4",
    "match_swiglu_pattern": r"torch_swiglu_mlp",
    "fuse_swiglu": r"fused_swiglu_mlp",
    "fuse_silu_mul": r"silu_and_mul",
    "quantize_fp8_linear_from_config": r"fake_quant_fp8_linear",
    "quantize_nvfp4_linear_from_config": r"fake_quant_nvfp4_linear",
    "quantize_int4_linear_from_config": r"fake_quant_int4_linear",
    "fuse_fp8_linear": r"(?<!fake_)quant_fp8_linear",
    "fuse_nvfp4_linear": r"(?<!fake_)quant_nvfp4_linear",
    "match_repeat_kv": r"attention_repeat_kv",
    "match_eager_attention": r"torch_attention_sdpa",
    "match_grouped_attention": r"torch_attention",
    "match_rope_pattern": r"torch_rope_with",
    "optimize_rope": r"flashinfer_rope|triton_rope",
    "match_moe_routing_pattern": r"fused_topk_softmax",
    "match_moe_pattern": r"torch_moe",
    "fuse_moe": r"moe_fused",
    "insert_cached_attention": r"cached_|attention_with_cache|mha_with_cache",
    "sharding_transform_executor": r"all_reduce|all_gather",
    "apply_sharding_hints": r"all_reduce|all_gather",
}


@dataclass(frozen=True)
class Answer:
    """Whether one transform of a configuration is in the graphs."""

    transform: str
    stage: str
    status: str  # "applied", "not found", "in conflict", "disabled", "failed"
    operators: dict[str, int]  # how many more (+) or fewer (-) it left
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the graphs are as configured."""
        return self.status in ("applied", "disabled")


def conformance(dumps: Dumps, config: Mapping[str, Mapping[str, Any]]) -> tuple[Answer, ...]:
    """Compare {transform: its keys} with the dumps of a run, in the order of the configuration."""
    makes = {name: pattern for name in config if (pattern := _makes(name))}
    return tuple(_answer(dumps, name, keys, makes) for name, keys in config.items())


def _answer(dumps: Dumps, name: str, keys: Mapping[str, Any], makes: Mapping[str, str]) -> Answer:
    enabled = keys.get("enabled", True)
    index = next((i for i, e in reversed(list(enumerate(dumps.entries))) if e.transform == name), None)
    entry = None if index is None else dumps.entries[index]
    stage = str(keys.get("stage", entry.stage if entry is not None else ""))
    change = comparing.change(dumps.entries[index - 1], dumps.entries[index]) if index else comparing.Change()
    status, reason = _judged(dumps, name, enabled, entry, change, makes)
    if entry is not None and stage != entry.stage:
        status, reason = "in conflict", f"configured for the stage {stage}, but it ran in {entry.stage}"
    return Answer(name, stage, status, change.operators, reason)


def _judged(
    dumps: Dumps, name: str, enabled: bool, entry: Entry | None, change: comparing.Change, makes: Mapping[str, str]
) -> tuple[str, str]:
    step = next((s for s in reversed(dumps.run.steps) if s.name == name), None) if dumps.run is not None else None
    noted = f": {step.reason}" if step is not None and step.reason else ""
    if not enabled:
        return _disabled(dumps, name, change, makes)
    if step is not None and (step.status == "failed" or (step.status == "skipped" and step.error)):
        return "failed", f"{step.status}{noted}"
    if step is not None and step.status == "skipped":
        return "not found", f"skipped{noted}"
    if step is not None and step.status == "disabled":
        return "in conflict", "configured to run, but it was disabled in the run"
    if entry is None:
        return "not found", "there is no dump of it: it did not run, or it raised"
    if not change and step is not None and step.status == "applied":
        return "applied", "it changed what the text form does not show: keyword arguments, or the values of weights"
    if not change:
        return "not found", f"it left the graph as it was{noted}"
    return _made(dumps, name, entry, change, makes)


def _disabled(dumps: Dumps, name: str, change: comparing.Change, makes: Mapping[str, str]) -> tuple[str, str]:
    if change:
        return "in conflict", "disabled, but the graph changed where it would have run"
    others = [pattern for other, pattern in makes.items() if other != name]
    first, last = comparing.operators(dumps.entries[0]), comparing.operators(dumps.entries[-1])
    for operator, number in last.items():
        mine = name in makes and re.search(makes[name], operator) and operator not in first
        if mine and not any(re.search(pattern, operator) for pattern in others):
            return (
                "in conflict",
                f"disabled, but the last graph holds {number} {operator}, which only it is known to make",
            )
    return "disabled", ""


def _made(dumps: Dumps, name: str, entry: Entry, change: comparing.Change, makes: Mapping[str, str]) -> tuple[str, str]:
    pattern = makes.get(name)
    if pattern is None:
        return "applied", ""
    made = {op: n for op, n in change.operators.items() if n > 0 and re.search(pattern, op)}
    if not made:
        return (
            "not found",
            "the graph changed, but it holds no more of the operators that this transform is known to make",
        )
    last = comparing.operators(dumps.entries[-1])
    gone = [op for op in made if not last[op]]
    return "applied", f"no {gone[0]} is left in the last graph: a later transform replaced it" if gone else ""


def _makes(name: str) -> str:
    """Return a pattern of the operators that a transform is known to make: from its class, else from the table."""
    from graphprobe.pipeline.registry import installed

    point = installed().get(name)
    declared = getattr(point.load(), "makes", ()) if point is not None else ()
    # a name may be that of a transform of each: both have a fuse_rmsnorm
    patterns = [*(re.escape(operator) for operator in declared), *([AUTODEPLOY[name]] if name in AUTODEPLOY else [])]
    return "|".join(patterns)


def signed(operators: Mapping[str, int]) -> str:
    """Return '+5 aten.rms_norm.default, -5 aten.rsqrt.default', what was added first."""
    return ", ".join(f"{number:+d} {name}" for name, number in sorted(operators.items(), key=lambda item: -item[1]))

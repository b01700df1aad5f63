"""Two implementations with nothing in common but the mathematics and the weights, with and without a bug."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphprobe
from corpus import text_models
from graphprobe import align, inputs
from graphprobe.program import copied, program
from models import tiny
from plain_models import PLAIN

Sides = tuple[torch.nn.Module, torch.nn.Module, tuple[Any, ...], dict[str, Any]]
#: Architecture, bug, where in the original it shows, and what takes part in it there.
BUGS = [
    ("gpt2", "scale", "h.1.attn", "scaled_dot_product_attention_1"),
    ("gpt2", "gelu", "h.1.mlp.act", "tanh_1"),
    ("bert", "bias", "layer.1.attention.output", "linear_9"),
    ("bert", "residual", "layer.1.attention.output.LayerNorm", "add_6"),
    ("mixtral", "routing", "layers.1.mlp", "topk_1"),
    ("mixtral", "gate", "layers.1.mlp", "silu_1"),
    ("conv", "eps", "norm", "batch_norm"),
    ("conv", "groups", "", "conv2d_1"),
]
DTYPES = (torch.float32, torch.bfloat16)
QUICK = {("bert", "bias"), ("conv", "eps"), ("conv", "groups")}


class Original(torch.nn.Module):
    """A transformers model that returns what its plain form returns."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        if hasattr(out, "logits"):
            return {"logits": out.logits}
        return {"last": out.last_hidden_state, "pooled": out.pooler_output}


def two(name: str, dtype: torch.dtype, bug: str = "") -> Sides:
    """Return an original, its plain form with the same weights, and the inputs of both."""
    if name == "conv":
        model, args, _ = tiny("conv", dtype)
        return model, PLAIN[name](model, bug), args, {}
    model, args, kwargs = text_models.build(name, dtype=dtype)
    model.config.use_cache = False
    kwargs = {k: v for k, v in kwargs.items() if k != "use_cache"}
    if name != "bert":  # the plain forms of the others know no padding
        kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
    return Original(model), PLAIN[name](model, bug), args, kwargs


def _slow(*values: Any, quick: bool) -> Any:
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [_slow(n, d, quick=(n, d) in (("bert", DTYPES[0]), ("conv", DTYPES[1]))) for n in PLAIN for d in DTYPES],
    ids=str,
)
def test_another_way_to_write_a_model_is_rounding(name: str, dtype: torch.dtype) -> None:
    report = graphprobe.diff(*two(name, dtype))
    assert report.verdict == "rounding", report.findings
    assert report.coverage.resolution >= 0.9, report.coverage


@pytest.mark.parametrize(
    ("name", "dtype", "bug", "path", "operation"),
    [_slow(n, d, *rest, quick=(n, rest[0]) in QUICK and d is DTYPES[0]) for n, *rest in BUGS for d in DTYPES],
    ids=str,
)
def test_a_bug_in_another_way_to_write_a_model_is_one_finding_where_it_is(
    name: str, dtype: torch.dtype, bug: str, path: str, operation: str
) -> None:
    report = graphprobe.diff(*two(name, dtype, bug))
    assert report.verdict == "semantic" and report.coverage.resolution >= 0.9, report.coverage
    found = [f for f in report.findings if f.kind == "semantic"]
    # sorted and grouped tokens have no value in common with dense experts: there the finding is all of the routing
    assert len(found) == 1 and found[0].located == (name != "mixtral"), found
    assert path in found[0].module_path and operation in found[0].before, found[0]


def test_what_lies_below_a_bug_is_claimed_by_value() -> None:
    """All below is met again from before's values; what the missing bias changes may be left over."""
    before, wrong, args, kwargs = two("bert", torch.float32, "bias")
    right = PLAIN["bert"](before.inner)
    counts = [sum(c.evidence == "value" for c in _aligned(before, one, args, kwargs).claims) for one in (wrong, right)]
    assert counts[0] >= counts[1] - 1


def _aligned(before: Any, after: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> align.Alignment:
    graphs = [graphprobe.capture(model, args, kwargs) for model in (before, after)]
    left, right = (copied(program(gm, args, kwargs)) for gm in graphs)
    return align.align(left, right, (), inputs.bind(graphs[0], args, kwargs, "before"))

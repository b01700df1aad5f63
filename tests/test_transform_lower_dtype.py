"""lower_dtype: what becomes 16-bit, what stays float32, the numbers and the metadata."""

from __future__ import annotations

import pytest
import torch

import graphprobe
from graphprobe.pipeline import Pipeline
from transform_cases import LANGUAGE, apply, case
from transform_tools import captured, matches, reason


def dtypes(gm: torch.fx.GraphModule, *targets: object) -> set[torch.dtype]:
    return {n.meta["val"].dtype for n in gm.graph.nodes if n.op == "call_function" and n.target in targets}


@pytest.mark.parametrize("name", LANGUAGE)
def test_products_are_narrow_and_what_is_delicate_stays_wide(name: str) -> None:
    gm = case("lower_dtype").run(name).gm
    aten = torch.ops.aten
    assert dtypes(gm, aten.linear.default, aten.addmm.default, aten.matmul.default) == {torch.bfloat16}
    wide = dtypes(gm, aten.softmax.int, aten.cos.default, aten.sin.default, aten.rsqrt.default, aten.mean.dim)
    assert wide == {torch.float32}
    assert {p.dtype for p in gm.parameters()} == {torch.bfloat16}


def verdict(name: str, dtype: str) -> str:
    gm, args, kwargs = captured(name)
    done = Pipeline.parse(f'lower_dtype{{dtype="{dtype}"}}').run(gm)
    return graphprobe.diff(gm, done.gm, args, kwargs, events=done.events).verdict


def test_float16_differs_by_rounding_at_most() -> None:
    assert verdict("llama", "float16") in ("identical", "rounding")


@pytest.mark.parametrize("name", LANGUAGE)
def test_float16_is_as_near_as_its_precision_allows(name: str) -> None:
    gm, args, kwargs = captured(name)
    done = Pipeline.parse('lower_dtype{dtype="float16"}').run(gm)
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(gm(*args, **kwargs))[0]
        got = torch.utils._pytree.tree_leaves(done.gm(*args, **kwargs))[0].float()
    assert float((got - wanted).norm() / wanted.norm()) < 8 * 2.0**-11


@pytest.mark.parametrize("name", LANGUAGE)
def test_outputs_are_finite_and_narrow(name: str) -> None:
    _, args, kwargs = captured(name)
    done = case("lower_dtype").run(name)
    assert len(matches(done)) > 50
    for value in torch.utils._pytree.tree_leaves(done.gm(*args, **kwargs)):
        if torch.is_tensor(value) and value.is_floating_point():
            # the mask's -3.4e38 would be -inf in a 16-bit dtype
            assert value.dtype == torch.bfloat16 and bool(value.isfinite().all())


def test_a_16_bit_graph_is_left_alone() -> None:
    gm = captured("llama", torch.bfloat16)[0]
    assert "nothing is computed in float32" in reason(Pipeline.parse("lower_dtype").run(gm))


class Masked(torch.nn.Module):
    """A mask below the smallest bfloat16, and infinity, which is no number to clamp."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.zeros(4, dtype=torch.float32).masked_fill(torch.arange(4) > 1, -3.4028234663852886e38)
        return x + mask, (x * 2).masked_fill(torch.arange(4) > 1, float("-inf"))


def test_constants_beyond_the_dtype_become_its_largest_and_infinity_stays() -> None:
    done, args = apply("lower_dtype", Masked(), torch.randn(4))
    finite, infinite = done.gm(*args)
    assert bool(finite.isfinite().all())
    assert bool(infinite[2:].isinf().all())

"""What looks like a pattern and is not one, and what is one in an odd place: a corpus that every transform shares.

Each case is a function of tensors and the transform that it is a case of. A near miss is left as it is, and the reason
is the true one; a hit keeps the numbers, at the second call too, and leaves no defect behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprobe
from graphprobe.pipeline import Pipeline
from transform_tools import matches, reason


@dataclass(frozen=True)
class Case:
    """One function, what it is called with, and the transform to try on it."""

    transform: str
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    why: str = ""  # the near miss's reason
    found: int = 1  # how many places a hit has
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def model(self) -> nn.Module:
        return _Net(self.function, self.weights).eval()

    def args(self) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(shape, generator=generator) for shape in self.shapes)


class _Net(nn.Module):
    """A function of itself and the inputs; what it holds are linear layers, parameters and buffers."""

    def __init__(self, function: Callable[..., Any], weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(1)
        for name, (rows, columns) in {"gate": (24, 16), "up": (24, 16), "q": (16, 16), "k": (16, 16)}.items():
            weight = nn.Parameter(torch.randn(rows, columns, generator=generator) / 4)
            self.register_module(name, nn.Linear(columns, rows, bias=False))
            self.get_submodule(name).weight = weight  # type: ignore[assignment]
        self.scale = nn.Parameter(torch.rand(16, generator=generator) + 0.5)
        for name, value in weights.items():
            self.register_buffer(name, value)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def soft(scores: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores, -1)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(2, 3) * 0.3


def turned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((-x[..., 4:], x[..., :4]), -1)


def repeated(x: torch.Tensor, times: int = 2) -> torch.Tensor:
    batch, heads, tokens, size = x.shape
    return x[:, :, None].expand(batch, heads, times, tokens, size).reshape(batch, heads * times, tokens, size)


def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (16,), scale, 1e-5)


def written(x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x


X, HEADS, GROUPS, MASK = (2, 4, 16), (2, 4, 6, 8), (2, 2, 6, 8), (2, 1, 6, 6)
QKV = (HEADS, HEADS, HEADS)
ATTENTION, ROTARY, NORM, ADD = "eager_attention_to_sdpa", "fuse_rotary", "fuse_rmsnorm", "fuse_add_rmsnorm"
GATE, SWIGLU, REPEAT, FOLD = "fuse_gate_up", "fuse_swiglu", "eliminate_repeat_kv", "fold_constants"
KERNEL, QKV_PROJ, NOOPS = "fuse_quantized_linear", "fuse_qkv", "remove_noops"
CODES = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(16, 16)
FP8 = (CODES.float() / 64).to(torch.float8_e4m3fn)


def in_fp8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax() / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32) * scale


def mean_square(x: torch.Tensor, **options: Any) -> torch.Tensor:
    return x.pow(2).mean(-1, keepdim=True, **options)


def rms(m: Any, x: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    return m.scale * (x * torch.rsqrt(variance + 1e-5))


def squared_first(m: Any, x: torch.Tensor) -> torch.Tensor:
    active = F.silu(m.gate(x))
    return active * active + active * m.up(x)


def doubled_first(m: Any, x: torch.Tensor) -> torch.Tensor:
    active = F.silu(m.gate(x))
    return active * 2.0 + active * m.up(x)


def with_itself(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate = m.gate(x)
    return F.silu(gate) * gate


def queries_written_into(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q = q * 1.5
    weights = soft(scores(q, k))
    return written(q) + weights @ v


def gate_written_into(m: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    gate = a * 2
    active = F.silu(gate)
    return written(gate) + active * b


def weights_returned(m: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    weights = soft(scores(q, k))
    return weights @ v, weights


def values_of_the_weights(m: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    weights = soft(scores(q, k))
    return weights @ weights


def sum_used_before(m: Any, x: torch.Tensor) -> torch.Tensor:
    total = x + x.cos()
    early = total.sin()
    return norm(total, m.scale) + early


def sum_used_after(m: Any, x: torch.Tensor) -> torch.Tensor:
    total = x + x.cos()
    return norm(total, m.scale) + total


def zeros_written_into(m: Any, x: torch.Tensor) -> torch.Tensor:
    held = torch.zeros(16)
    held.add_(x[0, 0])
    return held * 2


def part_written_into(m: Any, x: torch.Tensor) -> torch.Tensor:
    held = torch.full((4, 16), 1.0)
    held[1:3].mul_(x[0, :2])
    return held + 1


def copied_output(m: Any, x: torch.Tensor) -> Any:
    y = x * 2
    return y, y.clone()


NEAR_MISSES = {
    "a mask of more batches": Case(
        ATTENTION,
        lambda m, q, k, v, mask: soft(scores(q, k) + mask) @ v,
        ((1, 4, 6, 8), (1, 4, 6, 8), (1, 4, 6, 8), MASK),
        "the mask makes the scores larger",
    ),
    "one head of keys": Case(
        ATTENTION, lambda m, q, k, v: soft(scores(q, k)) @ v, (HEADS, (2, 1, 6, 8), (2, 1, 6, 8)), "number of heads"
    ),
    "a mask times two": Case(
        ATTENTION,
        lambda m, q, k, v, mask: soft(torch.add(scores(q, k), mask, alpha=2)) @ v,
        (*QKV, MASK),
        "no product of queries and keys",
    ),
    "scale after mask": Case(
        ATTENTION,
        lambda m, q, k, v, mask: soft((q @ k.transpose(2, 3) + mask) * 0.3) @ v,
        (*QKV, MASK),
        "no product of queries and keys",
    ),
    "soft caps": Case(
        ATTENTION, lambda m, q, k, v: soft(torch.tanh(scores(q, k)) * 5) @ v, QKV, "no product of queries and keys"
    ),
    "weights returned": Case(ATTENTION, weights_returned, QKV, "values alone"),
    "weights as values": Case(ATTENTION, values_of_the_weights, QKV[:2], "values are made of the scores"),
    "queries written into": Case(ATTENTION, queries_written_into, QKV, "something writes"),
    "rotation times two": Case(
        ROTARY,
        lambda m, x, c, s: torch.add(x * c, turned(x) * s, alpha=2),
        (HEADS, (6, 8), (6, 8)),
        "with sines and added",
    ),
    "rotation of another": Case(
        ROTARY, lambda m, x, y, c, s: x * c + turned(y) * s, (HEADS, HEADS, (6, 8), (6, 8)), "times cosines"
    ),
    "wrong half negated": Case(
        ROTARY,
        lambda m, x, c, s: x * c + torch.cat((-x[..., :4], x[..., 4:]), -1) * s,
        (HEADS, (6, 8), (6, 8)),
        "not the two halves",
    ),
    "eps times three": Case(
        NORM,
        lambda m, x: m.scale * (x * torch.rsqrt(torch.add(mean_square(x), 1e-2, alpha=3.0))),
        (X,),
        "a mean plus a constant",
    ),
    "mean in float64": Case(
        NORM,
        lambda m, x: rms(m, x, mean_square(x, dtype=torch.float64)).float(),
        (X,),
        "a mean over the last dimension",
    ),
    "root used twice": Case(
        NORM,
        lambda m, x: (root := torch.rsqrt(mean_square(x) + 1e-5)) + m.scale * (x * root),
        (X,),
        "used elsewhere",
    ),
    "one plus the weight": Case(
        NORM, lambda m, x: (1 + m.scale) * (x * torch.rsqrt(mean_square(x) + 1e-5)), (X,), "not a weight of the size"
    ),
    "norm of another": Case(NORM, lambda m, x: rms(m, x + 1, mean_square(x)), (X,), "the value it came from"),
    "sum that broadcasts": Case(ADD, lambda m, x, y: norm(x + y, m.scale), (X, (16,)), "broadcasts"),
    "sum normalised twice": Case(
        ADD, lambda m, x, y: norm(t := x + y, m.scale) * norm(t, m.scale.sin()), (X, X), "normalised twice"
    ),
    "gate and up in one": Case(GATE, with_itself, (X,), "one projection"),
    "activation used twice": Case(
        SWIGLU, lambda m, a, b: (s := F.silu(a)) * b + s.cos(), (X, X), "used elsewhere"
    ),
    "gate that broadcasts": Case(SWIGLU, lambda m, a, b: F.silu(a) * b, (X, (16,)), "different shapes"),
    "gate written into": Case(SWIGLU, gate_written_into, (X, X), "something writes"),
    "shared projections": Case(
        QKV_PROJ, lambda m, x: m.q(x) + m.k(x) * F.linear(x, m.q.weight), (X,), "read elsewhere"
    ),
    "vectors for weights": Case(
        QKV_PROJ,
        lambda m, x: F.linear(x, m.scale) + F.linear(x, m.one) + F.linear(x, m.two),
        (X,),
        "no matrix",
        weights={"one": torch.ones(16), "two": torch.ones(16)},
    ),
    "heads tiled": Case(
        REPEAT,
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)),
        (HEADS, GROUPS, GROUPS),
        "not both repeated",
    ),
    "keys repeated alone": Case(
        REPEAT,
        lambda m, q, k, v: F.scaled_dot_product_attention(q, repeated(k), v),
        (HEADS, GROUPS, HEADS),
        "not both repeated",
    ),
    "repeated unequally": Case(
        REPEAT,
        lambda m, q, k, v: F.scaled_dot_product_attention(q, repeated(k), repeated(v, 4)),
        (HEADS, GROUPS, (2, 1, 6, 8)),
        "no multiple",
    ),
    "constant written into": Case(FOLD, zeros_written_into, (X,), "written into"),
    "part of a constant written into": Case(FOLD, part_written_into, (X,), "written into"),
    "constant returned": Case(FOLD, lambda m, x: (x + 1, torch.arange(4) * 2), (X,), "is returned"),
    "weight made of codes": Case(
        FOLD, lambda m, x: F.linear(x, m.codes.float() * 0.1), (X,), "is a weight", weights={"codes": CODES}
    ),
    "one scale for int8": Case(
        KERNEL, lambda m, x: F.linear(x, m.codes.float() * m.s), (X,), "one scale a row",
        weights={"codes": CODES, "s": torch.tensor(0.1)},
    ),
    "a scale a row for fp8": Case(
        KERNEL, lambda m, x: F.linear(in_fp8(x), m.codes.float() * m.s), (X,), "one float32 scale",
        weights={"codes": FP8, "s": torch.rand(16, 1)},
    ),
    "odd sizes for fp8": Case(
        KERNEL, lambda m, x: F.linear(in_fp8(x), m.codes.float() * m.s), (X,), "multiples of 16",
        weights={"codes": FP8[:12], "s": torch.tensor(0.1)},
    ),
    "expanded times one": Case(
        NOOPS, lambda m, x: (x.expand(3, *X) * 1.0).view(-1), (X,), "every operation changes something"
    ),
    "another memory format": Case(
        NOOPS,
        lambda m, x: x.to(torch.float32, memory_format=torch.channels_last).sin(),
        ((2, 3, 4, 5),),
        "every operation changes something",
    ),
    "output copied": Case(NOOPS, copied_output, (X,), "every operation changes something"),
}  # fmt: skip

HITS = {
    "scaled by one": Case(ATTENTION, lambda m, q, k, v: soft(q @ k.transpose(2, 3)) @ v, QKV),
    "sines first": Case(ROTARY, lambda m, x, c, s: turned(x) * s + x * c, (HEADS, (6, 8), (6, 8))),
    "weight last": Case(NORM, lambda m, x: x * torch.rsqrt(mean_square(x) + 1e-5) * m.scale, (X,)),
    "sum used before": Case(ADD, sum_used_before, (X,)),
    "sum used after": Case(ADD, sum_used_after, (X,)),
    "sum of one value": Case(ADD, lambda m, x: norm(x + x, m.scale), (X,)),
    "gate squared before": Case(GATE, squared_first, (X,)),
    "gate doubled before": Case(GATE, doubled_first, (X,)),
    "up first": Case(GATE, lambda m, x: m.up(x) * F.silu(m.gate(x)), (X,)),
    "two activations": Case(SWIGLU, lambda m, a, b: F.silu(a) * F.silu(b), (X, X)),
    "repeated and used": Case(
        REPEAT,
        lambda m, q, k, v: F.scaled_dot_product_attention(q, r := repeated(k), repeated(v)) + r,
        (HEADS, GROUPS, GROUPS),
    ),
    "causal": Case(
        REPEAT,
        lambda m, q, k, v: F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True),
        (HEADS, GROUPS, GROUPS),
    ),
    "sums computed twice": Case(
        "merge_common", lambda m, x: x.sum(-1, keepdim=True) + x.sum(-1, keepdim=True) + x, (X,)
    ),
    "a scale a row for int8": Case(
        KERNEL,
        lambda m, x: F.linear(x, m.codes.float() * m.s) + x,
        (X,),
        weights={"codes": CODES, "s": torch.rand(16, 1) / 100},
    ),
    "projections of the model's own": Case(
        'shard_linears{column=["*.gate"],row=["*.q"]}', lambda m, x: (m.gate(x), m.q(x)), (X,), found=2
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_explained(name: str) -> None:
    case = NEAR_MISSES[name]
    gm = graphprobe.capture(case.model(), case.args())
    done = Pipeline.parse(case.transform).run(gm)
    assert case.why in reason(done)
    assert not done.steps[-1].observation.changed


@pytest.mark.parametrize("name", HITS)
def test_a_hit_keeps_the_numbers_at_every_call(name: str) -> None:
    case = HITS[name]
    model, args = case.model(), case.args()
    gm = graphprobe.capture(model, args)
    done = Pipeline.parse(case.transform).run(gm)
    assert len(matches(done)) == case.found and all(matches(done))
    assert graphprobe.lint(done.gm) == ()
    wanted = model(*args)
    for _ in range(2):
        torch.testing.assert_close(done.gm(*args), wanted)
    assert graphprobe.diff(gm, done.gm, args, events=done.events).verdict in ("identical", "rounding")


class _Two(nn.Module):
    """The same layer at two places; an embedding that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 32)
        self.layer = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 48, bias=False)
        self.lm_head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.layer(self.layer(self.table(tokens)).sin()))


@pytest.mark.parametrize("scheme", ["quantize_int8", "quantize_fp8", "quantize_int4", "quantize_nvfp4"])
def test_layers_that_share_their_weight_share_its_codes(scheme: str) -> None:
    tokens = torch.arange(6).reshape(2, 3)
    done = Pipeline.parse(scheme).run(graphprobe.capture(_Two().eval(), (tokens,)))
    assert matches(done) == ("layer", "layer")
    codes = [name for name, held in done.gm.named_buffers() if held.dtype.itemsize == 1 and held.shape[0] == 32]
    assert len([name for name in codes if "scale" not in name]) == 1


def test_a_tied_embedding_stays_one_when_it_is_lowered_and_keeps_its_name() -> None:
    tokens = torch.arange(6).reshape(2, 3)
    gm = graphprobe.capture(_Two().eval(), (tokens,))
    done = Pipeline.parse("lower_dtype").run(gm)
    before = dict(gm.named_parameters(remove_duplicate=False))
    after = dict(done.gm.named_parameters(remove_duplicate=False))
    assert after.keys() <= before.keys()
    assert len({id(p) for p in after.values()}) == len({id(before[path]) for path in after}) == 3
    assert {p.dtype for p in after.values()} == {torch.bfloat16} and {p.dtype for p in before.values()} == {
        torch.float32
    }
    assert graphprobe.lint(done.gm) == ()


@pytest.mark.parametrize("transform", [ATTENTION, ROTARY, NORM, SWIGLU])
def test_lost_metadata_is_the_reason_where_it_is_the_reason(transform: str) -> None:
    case = next(c for c in HITS.values() if c.transform == transform)
    gm = graphprobe.capture(case.model(), case.args())

    def lose(gm: torch.fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.op == "call_function":
                node.meta.pop("val")

    done = Pipeline.of([lose, transform]).run(gm)
    assert "meta['val'] of a node is missing" in reason(done)

"""Versions that people write by hand: other names, folded weights, own kernels. What is said of them must be true."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphprobe

Tensor = torch.Tensor
WIDTH = 16


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(seed: int, width: int = WIDTH, out: int = WIDTH) -> nn.Linear:
    made = nn.Linear(width, out)
    made.weight.data, made.bias.data = drawn(out, width, seed=seed) / 4, drawn(out, seed=seed + 100) / 4
    return made


# --- kernels that cast inside -------------------------------------------------------------------------------------


def _silu(x: Tensor, y: Tensor, factor: float) -> Tensor:
    return (F.silu(x.float()) * y.float() * factor).to(x.dtype)


def _softmax(x: Tensor, y: Tensor, factor: float) -> Tensor:
    return ((x.float() * factor).softmax(-1) * y.float()).to(x.dtype)


def _norm(x: Tensor, y: Tensor, factor: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * y.float() * factor).to(x.dtype)


def _plain_norm(x: Tensor, y: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * y


KERNELS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "silu": (lambda x, y: F.silu(x) * y, _silu),
    "softmax": (lambda x, y: x.softmax(-1) * y, _softmax),
    "norm": (_plain_norm, _norm),
}


class Two(nn.Module):
    def __init__(self, kernel: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last, self.kernel = linear(1), linear(2), linear(3), kernel

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.kernel(self.first(x), self.second(x)))
        return made


def _operator(name: str, body: Callable[..., Tensor]) -> Callable[..., Tensor]:
    body.__annotations__ = {"x": Tensor, "y": Tensor, "factor": float, "return": Tensor}
    made = torch.library.custom_op(f"hand::{name}", body, mutates_args=())
    made.register_fake(lambda x, y, factor: torch.empty_like(x))
    return made


OPERATORS = {name: _operator(name, cast) for name, (_, cast) in KERNELS.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_computes_in_float32_inside_is_no_other_function(name: str, dtype: torch.dtype) -> None:
    x = (drawn(24, WIDTH, seed=9).to(dtype),)
    before = Two(KERNELS[name][0]).to(dtype)
    honest = graphprobe.diff(before, Two(lambda x, y: OPERATORS[name](x, y, 1.0)).to(dtype), x)
    assert honest.verdict in ("rounding", "identical"), [(f.kind, f.rule, f.hint) for f in honest.findings]
    wrong = graphprobe.diff(before, Two(lambda x, y: OPERATORS[name](x, y, 1.5)).to(dtype), x)
    assert wrong.verdict == "semantic" and wrong.first is not None and wrong.first.op == f"hand.{name}.default"


# --- what is folded into weights ----------------------------------------------------------------------------------


class Adapted(nn.Module):
    """Layers of a linear with a low-rank adapter beside it, or merged by `merged` times."""

    def __init__(self, layers: int, scale: float = 2.0, merged: dict[int, float] | None = None) -> None:
        super().__init__()
        self.rows = nn.ModuleList(linear(10 * i + 1) for i in range(layers))
        self.up = nn.ParameterList(drawn(WIDTH, 2, seed=10 * i + 5) / 4 for i in range(layers))
        self.down = nn.ParameterList(drawn(2, WIDTH, seed=10 * i + 6) / 4 for i in range(layers))
        self.scale, self.merged = scale, merged is not None
        for i, times in (merged or {}).items():
            self.rows[i].weight.data += times * (self.up[i] @ self.down[i]).detach()

    def forward(self, x: Tensor) -> Tensor:
        for row, up, down in zip(self.rows, self.up, self.down, strict=True):
            y = row(x)
            x = torch.tanh(y if self.merged else y + F.linear(F.linear(x, down), up) * self.scale)
        return x


@pytest.mark.parametrize("times", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("where", [(1,), (0, 2)])
def test_an_adapter_that_is_merged_by_another_scale_is_one_finding_a_layer(
    where: tuple[int, ...], times: float
) -> None:
    merged = {i: times if i in where else 2.0 for i in range(3)}
    report = graphprobe.diff(Adapted(3), Adapted(3, merged=merged), (drawn(12, WIDTH, seed=4),))
    found = [f for f in report.findings if f.kind == "semantic"]
    assert len(found) == len(where), [(f.outputs, f.hint) for f in found]
    assert all(f"took {times:g} where before has 2" in f.hint or times == 0 for f in found), [f.hint for f in found]
    honest = graphprobe.diff(Adapted(3), Adapted(3, merged={i: 2.0 for i in range(3)}), (drawn(12, WIDTH, seed=4),))
    assert honest.verdict == "rounding"


class Normed(nn.Module):
    def __init__(self, folded: str = "") -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), linear(3, 10, 5)
        self.conv.weight.data, self.conv.bias.data = drawn(8, 4, 3, seed=1), drawn(8, seed=2)
        self.norm.running_mean, self.norm.running_var = drawn(8, seed=3), drawn(8, seed=4).square() + 0.3
        self.folded = folded
        if folded:
            scale = (self.norm.running_var + self.norm.eps).rsqrt()
            shift = (self.conv.bias.data - self.norm.running_mean) * (1 if folded == "no scale" else scale)
            self.conv.weight.data *= scale[:, None, None]
            self.conv.bias.data = {"sign": -shift}.get(folded, shift)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        made: Tensor = self.last(torch.relu(y if self.folded else self.norm(y)))
        return made


@pytest.mark.parametrize("folded", ["rightly", "no scale", "sign"])
def test_a_batch_norm_that_is_folded_wrongly_is_one_finding(folded: str) -> None:
    report = graphprobe.diff(Normed().eval(), Normed(folded).eval(), (drawn(6, 4, 12, seed=5),))
    found = [f for f in report.findings if f.kind == "semantic"]
    assert len(found) == (folded != "rightly"), [(f.outputs, f.hint) for f in found]
    assert all(f.cures is not None and f.cures > 0.99 for f in found)


# --- what is named, and what is said of it ------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), linear(seed), linear(seed + 1)


class Deep(nn.Module):
    """Residual blocks; `changed` is applied to what block 1 hands on, `inner` to what is between its linears."""

    def __init__(
        self, changed: Callable[[Tensor], Tensor] | None = None, gain: float = 1.0, like: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(10 * i) for i in range(4))
        self.blocks[1].up.weight.data *= gain
        self.changed, self.like = changed, like

    def forward(self, x: Tensor) -> Tensor:
        start = x = x.to(self.blocks[0].up.weight.dtype)
        for i, block in enumerate(self.blocks):
            h = block.up(block.norm(x))
            h = (h * torch.sigmoid(h)).type_as(x) if self.like else F.silu(h)
            x = x + block.down(h.type_as(start) if self.like else h)
            x = self.changed(x) if self.changed is not None and i == 1 else x
        return x


X = (drawn(6, WIDTH, seed=7),)


@pytest.mark.parametrize(
    ("changed", "op"), [(lambda x: x * 1.01, "aten.mul.Tensor"), (lambda x: x.tanh(), "aten.tanh.default")]
)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, where it copies a program
@pytest.mark.parametrize("decomposed", [False, True])
def test_what_is_added_between_two_blocks_is_named_and_not_the_norm_that_takes_it(
    changed: Callable[[Tensor], Tensor], op: str, decomposed: bool
) -> None:
    after: torch.nn.Module | torch.export.ExportedProgram = Deep(changed)
    if decomposed:
        after = torch.export.export(Deep(changed), X).run_decompositions()
    report = graphprobe.diff(Deep(), after, X)
    found = [f for f in report.findings if f.kind == "semantic"]
    assert [(f.op, f.module_path) for f in found] == [(op, "")], [(f.op, f.module_path, f.hint) for f in found]
    assert found[0].introduced is not None and found[0].introduced > 5e-3  # a norm hardly sees the factor, the sum does


def test_an_operand_that_only_gives_its_dtype_ties_no_region_to_what_makes_it() -> None:
    report = graphprobe.diff(Deep(), Deep(like=True), X)
    assert report.verdict == "rounding" and report.coverage.resolution == 1.0
    assert all(len(f.after) <= 4 for f in report.findings), [f.after for f in report.findings]


def test_what_overflows_is_named_once_and_what_takes_the_infinity_is_not() -> None:
    report = graphprobe.diff(Deep(gain=4e4), Deep(gain=4e4).half(), X)
    found = [f for f in report.findings if f.kind == "nonfinite"]
    assert [(f.op, f.module_path) for f in found] == [("aten.linear.default", "blocks.1.up")]
    assert "overflow" in found[0].hint and "float16 ends at 65504" in found[0].hint


class Scores(nn.Module):
    """Scores of two projections, whose rows may lie in another order on both sides, or in each other's place."""

    def __init__(self, order: Tensor | None = None, exchanged: bool = False) -> None:
        super().__init__()
        q, k = (drawn(WIDTH, WIDTH, seed=s) for s in (1, 2))
        self.scaled = order is not None
        rows = order if order is not None else torch.arange(WIDTH)
        self.q, self.k = (nn.Parameter(w[rows]) for w in ((k, q) if exchanged else (q, k)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = F.linear(x, self.q) @ F.linear(y, self.k).transpose(-1, -2)
        return (scores / 4.0 if self.scaled else scores * 0.25).softmax(-1)


def test_a_weight_in_another_layout_is_not_blamed_for_what_is_wrong_beside_it() -> None:
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))
    args = (drawn(5, WIDTH, seed=3), drawn(7, WIDTH, seed=4))
    assert graphprobe.diff(Scores(), Scores(order), args).verdict == "rounding"
    report = graphprobe.diff(Scores(), Scores(order, exchanged=True), args)
    assert report.verdict == "semantic" and report.first is not None
    assert "q holds what before has as k, its rows in another order" in report.first.hint


def test_a_version_in_training_mode_is_told() -> None:
    before = nn.Sequential(linear(1), nn.Dropout(0.2), linear(2)).eval()
    after = nn.Sequential(linear(1), nn.Dropout(0.2), linear(2)).train()
    report = graphprobe.diff(before, after, X)
    assert report.first is not None and "training mode" in report.first.hint and ".eval()" in report.first.explanation


# --- masks of numbers and of infinities ---------------------------------------------------------------------------

INF, LOWEST = float("inf"), torch.finfo(torch.float32).min


class Masked(nn.Module):
    def __init__(self, fill: float, how: str) -> None:
        super().__init__()
        self.q, self.last, self.fill, self.how = linear(1), linear(2), fill, how

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        scores = self.q(x) @ x.transpose(-1, -2)
        fill = torch.tensor(self.fill)
        if self.how == "fill":
            scores = scores.masked_fill(seen == 0, self.fill)
        elif self.how == "where":
            scores = torch.where(seen == 0, fill, scores)
        else:
            scores = scores + torch.where(seen == 0, fill, torch.tensor(0.0))
        made: Tensor = self.last(scores.softmax(-1) @ x)
        return made


@pytest.mark.parametrize("how", ["fill", "where", "add"])
@pytest.mark.parametrize(("mine", "theirs"), [(-1e4, -INF), (-INF, -1e4), (LOWEST, -INF), (-INF, LOWEST)])
def test_a_mask_may_be_written_otherwise_unless_a_row_is_masked_whole(mine: float, theirs: float, how: str) -> None:
    x, seen = drawn(2, 6, WIDTH, seed=3), torch.ones(2, 6, 6).tril()
    before, after = Masked(mine, how), Masked(theirs, how)
    honest = graphprobe.diff(before, after, (x, seen))
    assert honest.verdict in ("identical", "rounding"), [(f.kind, f.op, f.hint) for f in honest.findings]
    seen[1, 2] = 0
    whole = graphprobe.diff(before, after, (x, seen))
    assert torch.isnan(after(x, seen)).any() == (theirs == -INF)
    wanted = ("nonfinite",) if theirs == -INF else ("identical", "rounding")
    assert whole.verdict in wanted, [(f.kind, f.op, f.hint) for f in whole.findings]


class Sparse(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.weight, x) if self.weight.is_sparse else self.weight @ x


def test_sparse_weights_are_no_crash_and_no_pass() -> None:
    weight = drawn(WIDTH, WIDTH).relu()
    x = (drawn(WIDTH, 4),)
    honest = graphprobe.diff(Sparse(weight), Sparse(weight.to_sparse()), x)
    assert honest.verdict in ("identical", "rounding", "unknown")
    wrong = graphprobe.diff(Sparse(weight.to_sparse()), Sparse(weight.t().contiguous().to_sparse()), x)
    assert wrong.verdict == "unknown" and "could not be judged" in str(wrong).splitlines()[0]

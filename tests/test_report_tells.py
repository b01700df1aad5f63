"""What a user reads of a report is true: it names what can be to blame, says what to do, and can always be drawn."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import graphprobe
from graphprobe import render
from graphprobe.judge.hints import trials
from graphprobe.lanes.replay import Replay

VIEWS = ("view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "new_zeros")


class Block(nn.Module):
    """Group norm and attention over pixels, as diffusion models have it; `way` writes it anew."""

    def __init__(self, way="plain", unbiased=False, stretch=1.0):
        super().__init__()
        self.way, self.unbiased, self.stretch = way, unbiased, stretch
        self.norm, self.qkv, self.out = nn.GroupNorm(4, 16), nn.Linear(16, 48), nn.Linear(16, 16)

    def normed(self, x):
        if self.way == "plain":
            return self.norm(x)
        z = x.reshape(x.shape[0], 4, -1)
        z = (z - z.mean(-1, keepdim=True)) * (z.var(-1, keepdim=True, unbiased=self.unbiased) + 1e-5).rsqrt()
        return z.reshape(x.shape) * self.norm.weight[None, :, None, None] + self.norm.bias[None, :, None, None]

    def forward(self, x):  # [batch, 16, height, width]
        q, k, v = self.qkv(self.normed(x).flatten(2).transpose(1, 2)).chunk(3, -1)
        if self.way == "plain":
            mixed = torch.softmax(q @ k.transpose(1, 2) / 4.0, -1) @ v
        else:
            heads = (t.unsqueeze(1) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(*heads, scale=0.25 * self.stretch)[:, 0]
        return x + self.out(mixed).transpose(1, 2).reshape(x.shape)


class Recurrent(nn.Module):
    """An LSTM as one kernel, or step by step."""

    def __init__(self, unrolled=False, squash=torch.tanh):
        super().__init__()
        self.unrolled, self.squash = unrolled, squash
        self.rnn, self.out = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):  # [batch, steps, 6]
        if not self.unrolled:
            return self.out(self.rnn(x)[0])
        h, c = x.new_zeros(x.shape[0], 5), x.new_zeros(x.shape[0], 5)
        steps = []
        for t in range(x.shape[1]):
            gates = F.linear(x[:, t], self.rnn.weight_ih_l0, self.rnn.bias_ih_l0)
            i, f, g, o = (gates + F.linear(h, self.rnn.weight_hh_l0, self.rnn.bias_hh_l0)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * self.squash(g)
            h = o.sigmoid() * c.tanh()
            steps.append(h)
        return self.out(torch.stack(steps, 1))


class Folded(nn.Module):
    """Convolution and batch norm, which a conversion folds into one."""

    def __init__(self, eps=None):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.norm.running_var.uniform_(0.5, 1.5)
        self.eps = eps

    def forward(self, x):
        if self.eps is None:
            return self.head(F.relu(self.norm(self.conv(x))))
        scale = self.norm.weight * torch.rsqrt(self.norm.running_var + self.eps)
        shift = (self.conv.bias - self.norm.running_mean) * scale + self.norm.bias
        return self.head(F.relu(F.conv2d(x, self.conv.weight * scale[:, None, None, None], shift)))


def made(kind, *arguments, **options):
    torch.manual_seed(0)
    return kind(*arguments, **options).eval()


def image(*shape):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)),)


SEQUENCE, PIXELS = image(2, 3, 6), image(2, 16, 6, 6)
PAIRS = {
    "block": (made(Block), made(Block, "anew"), PIXELS),
    "block, other variance": (made(Block), made(Block, "anew", unbiased=True), PIXELS),
    "block, other scale": (made(Block), made(Block, "anew", stretch=1.01), PIXELS),
    "lstm": (made(Recurrent), made(Recurrent, True), SEQUENCE),
    "lstm, other function": (made(Recurrent), made(Recurrent, True, F.hardtanh), SEQUENCE),
    "folded": (made(Folded), made(Folded, eps=1e-5), image(1, 3, 8, 8)),
    "folded, other epsilon": (made(Folded), made(Folded, eps=1e-2), image(1, 3, 8, 8)),
}


@pytest.fixture(scope="module")
def reports():
    return {name: graphprobe.diff(*pair) for name, pair in PAIRS.items()}


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_named_can_be_to_blame(name, reports):
    report = reports[name]
    assert (report.verdict == "semantic") == ("other" in name)
    for finding in report.findings:
        if finding.located:
            assert not any(f".{view}." in finding.op for view in VIEWS), finding.op
        else:
            end = f"that ends in {finding.outputs[1]}"
            assert end in finding.explanation and finding.op not in finding.explanation
            assert finding is not report.first or end in render.headline(report)


@pytest.mark.parametrize("name", PAIRS)
def test_every_report_can_be_drawn_and_read_again(name, reports):
    report = reports[name]
    again = graphprobe.Report.from_json(report.to_json())
    assert render.text(again, verbose=True) == render.text(report, verbose=True)
    assert "<html" in render.page(report)
    assert not report.findings or "digraph" in render.dot_divergence(report)


@pytest.mark.parametrize("verdict", ["pardoned", "identical", "unknown"])
def test_any_kind_of_region_beside_a_finding_can_be_drawn(verdict, reports):
    report = reports["folded, other epsilon"]
    regions = tuple(dataclasses.replace(row, verdict=verdict) for row in report.regions)
    assert "<html" in render.page(dataclasses.replace(report, regions=regions))


def test_too_little_says_what_would_do(reports):
    before, after, inputs = PAIRS["lstm"]
    told = " ".join(render.text(reports["lstm"]).split()).replace("- ", "-")
    share = float(re.search(r"--min-coverage ([\d.]+) accepts", told).group(1))
    assert reports["lstm"].exit_code == 2 and 0 < share < 0.9
    assert graphprobe.diff(before, after, inputs, min_coverage=share).ok
    assert not any("accepts it" in render.text(report) for name, report in reports.items() if "lstm" not in name)


class Number(nn.Module):
    """One operation with a number; the inputs lie between 0.1 and 0.4."""

    def __init__(self, function):
        super().__init__()
        self.function, self.lin = function, nn.Linear(4, 4)

    def forward(self, x):
        return self.lin(self.function(x))


UNSEEN = {
    "threshold": (lambda x: x * (x > 0.5), lambda x: x * (x > 0.45)),
    "clamp": (lambda x: x.clamp(min=0.01), lambda x: x.clamp(min=0.02)),
    "whole clamp": (lambda x: x.clamp(max=1), lambda x: x.clamp(max=2)),
    "slope": (lambda x: F.leaky_relu(x, 0.1), lambda x: F.leaky_relu(x, 0.2)),
    "where": (lambda x: torch.where(x < 0.6, x, -x), lambda x: torch.where(x < 0.7, x, -x)),
    "filled": (lambda x: x.masked_fill(x > 2, 0.5), lambda x: x.masked_fill(x > 2, 0.25)),
}
NO_OTHER = {
    "same": (lambda x: x * (x > 0.5), lambda x: x * (x > 0.5)),
    "axis": (lambda x: x.softmax(-1), lambda x: x.softmax(1)),
    "mask": (lambda x: x.masked_fill(x > 2, -1e9), lambda x: x.masked_fill(x > 2, -float("inf"))),
    "dropout": (lambda x: F.dropout(x, 0.1, False), lambda x: F.dropout(x, 0.2, False)),
    "slice": (lambda x: x[:, :4] * 2, lambda x: x[:, :9] * 2),
    "whole": (lambda x: x.clamp(max=1), lambda x: x.clamp(max=1.0)),
}


@pytest.mark.parametrize("name", [*UNSEEN, *NO_OTHER])
def test_a_number_that_shows_nothing_is_noted(name):
    inputs = (torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.1,)
    report = graphprobe.diff(*(made(Number, one) for one in {**UNSEEN, **NO_OTHER}[name]), inputs)
    assert report.ok
    assert any("makes no difference" in note for note in report.notes) == (name in UNSEEN)


class Table(nn.Module):
    """An embedding, a table of sines and a norm: what 16 bits round."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(11, 16), nn.LayerNorm(16), nn.Linear(16, 5)
        self.register_buffer("phases", torch.arange(8.0)[:, None] * 1.7 ** -torch.arange(16.0))
        self.scale = scale

    def forward(self, tokens):
        return self.out(self.norm(self.embed(tokens) * self.scale + self.phases.sin()))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1.003])
def test_raised_to_a_wider_dtype_is_no_loss(narrow, scale):
    inputs = (torch.arange(8)[None],)
    report = graphprobe.diff(made(Table).to(narrow), made(Table, scale), inputs)
    assert report.verdict == ("rounding" if scale == 1.0 else "semantic"), render.text(report)
    assert not any(f.kind == "precision" for f in report.findings)


def test_a_hint_costs_no_more_than_some_runs_of_its_region(monkeypatch):
    ran = []
    exact = Replay.exact

    def counted(self, side, region, *arguments, **options):
        ran.append(len(region.operations(side)))
        return exact(self, side, region, *arguments, **options)

    monkeypatch.setattr(Replay, "exact", counted)
    before, after, inputs = PAIRS["lstm, other function"]
    monkeypatch.setattr(trials, "_MOST_WORK", 400)
    assert graphprobe.diff(before, after, inputs).verdict == "semantic"
    few = sum(ran)
    monkeypatch.setattr(trials, "_MOST_WORK", 10**6)
    ran.clear()
    graphprobe.diff(before, after, inputs)
    assert few < sum(ran) / 2


class Stateful(nn.Module):
    """Writes what it keeps: a buffer of its own, or a cache that it is given."""

    def __init__(self, write, name="kept"):
        super().__init__()
        self.write, self.name = write, name
        self.register_buffer(name, torch.zeros(4))

    def forward(self, x, cache):
        y = x + getattr(self, self.name) + cache
        self.write(getattr(self, self.name), cache, y)
        return y


WRITES = {
    "nothing": lambda own, cache, y: None,
    "own": lambda own, cache, y: own.add_(1),
    "cache": lambda own, cache, y: cache.copy_(y),
    "both": lambda own, cache, y: (own.mul_(2), cache.add_(y)),
}


@pytest.mark.parametrize(
    ("mine", "theirs"), [("nothing", "both"), ("own", "nothing"), ("own", "cache"), ("both", "cache"), ("both", "both")]
)
def test_what_one_side_alone_writes_is_told(mine, theirs):
    inputs = (torch.ones(4), torch.ones(4))
    report = graphprobe.diff(Stateful(WRITES[mine]), Stateful(WRITES[theirs]), inputs)
    alone = [f for f in report.findings if f.rule == "9 state"]
    written = {"nothing": set(), "own": {"kept"}, "cache": {"cache"}, "both": {"kept", "cache"}}
    assert len(alone) == bool(written[mine] - written[theirs]) + bool(written[theirs] - written[mine])
    assert report.ok == (mine == theirs)
    for finding in alone:
        which = written[theirs] - written[mine] if finding.after else written[mine] - written[theirs]
        assert all(f"'{name}'" in finding.explanation for name in which)
    assert len(report.findings) > len(alone) or not alone or alone[0].hint in " ".join(render.text(report).split())


class Cached(nn.Module):
    """Keeps what it has seen, for a next call; the plain model has no such thing."""

    def __init__(self, keeps):
        super().__init__()
        if keeps:
            self.register_buffer("seen", torch.zeros(2, 4))

    def forward(self, x):
        if hasattr(self, "seen"):
            self.seen.copy_(x)
        return x.cos()


@pytest.mark.parametrize("turned", [False, True])
def test_a_cache_that_one_side_brings_along_is_noted(turned):
    sides = [Cached(False), Cached(True)]
    report = graphprobe.diff(*(sides[::-1] if turned else sides), (torch.ones(2, 4),))
    assert report.ok and not report.findings, render.text(report)
    assert sum("'seen'" in note for note in report.notes) == 1


def test_a_model_in_training_mode_is_named_before_what_it_writes():
    before, after = made(Folded), made(Folded).train()
    report = graphprobe.diff(before, after, image(2, 3, 8, 8))
    assert report.verdict == "semantic" and "training mode" in report.first.hint
    assert [f.rule for f in report.findings].count("9 state") == 1


def test_state_of_another_name_is_paired_and_compared():
    def pair(theirs):
        return graphprobe.diff(
            Stateful(WRITES["own"]), Stateful(theirs, "other"), (torch.ones(4), torch.ones(4)), exact="always"
        )

    assert pair(WRITES["own"]).ok
    assert pair(lambda own, cache, y: own.add_(1.5)).verdict == "semantic"


NOTHING = {
    "empty": torch.zeros(0, 4),
    "NaN": torch.full((2, 4), float("nan")),
    "a number": torch.tensor([[float("nan"), 0.5, 1.0, 2.0]]),
    "zero": torch.zeros(2, 4),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_is_compared_nothing_passes(name):
    """x sinh(x) and x sin(x) are one function of zeros, and of nothing at all."""
    one, other = Number(lambda x: x * x.sinh()), Number(lambda x: x * x.sin())
    one.lin = other.lin = nn.Identity()
    told = graphprobe.diff(one, other, (NOTHING[name],))
    assert told.verdict == {"a number": "semantic", "zero": "identical"}.get(name, "unknown")
    assert any("nothing was compared of" in note for note in told.notes) == (name in ("empty", "NaN"))
    assert graphprobe.diff(one, one, (NOTHING[name],)).ok  # the same program on the same weights is the same


def test_names_of_the_user_are_no_kind_of_defect():
    """An output, an operation or a weight may be called a mask, or an order."""

    class Masked(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.rows = rows

        def forward(self, mask):
            return {"mask": mask.exp()[: self.rows], "split order": mask.sin()}

    report = graphprobe.diff(Masked(3), Masked(2), (torch.ones(3, 4),))
    assert report.verdict == "structural" and "mask" in report.findings[0].hint
    assert "Next: draw both masks" not in report.findings[0].explanation
    assert "has shape (2, 4)" in render.headline(report)


class Router(nn.Module):
    """Writes into a tensor, so that it is run as a functional copy, and casts its weight as routers do."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        scores = F.linear(x.to(torch.float32), self.gate.weight.to(torch.float32))
        kept = torch.zeros(3, 4)
        kept.copy_(scores.softmax(-1))
        return kept


def _rows(weight):
    return weight[[1, 0, 3, 2]]


@pytest.mark.parametrize(
    ("change", "told"), [(_rows, "permuted"), (lambda w: w * 2, "another scale"), (torch.zeros_like, "never loaded")]
)
def test_weights_are_called_what_the_user_calls_them(change, told):
    before, after = made(Router), made(Router)
    after.gate.weight.data = change(after.gate.weight.data)
    finding = graphprobe.diff(before, after, image(3, 6)).first
    assert told in finding.hint and "gate.weight" in finding.hint, finding.hint
    assert "_state_" not in finding.hint and "_assert" not in finding.hint


class Rewired(nn.Module):
    """Attention as one operator, and a gate that a relu closes."""

    def __init__(self, values="v", gated=True):
        super().__init__()
        self.values, self.gated = values, gated
        self.q, self.k, self.v, self.gate = (nn.Linear(8, 8) for _ in range(4))
        self.gate.bias.data -= 10.0

    def forward(self, x):  # [batch, tokens, 8]
        taken = {name: getattr(self, name)(x).unflatten(-1, (2, 4)).transpose(1, 2) for name in "qkv"}
        mixed = F.scaled_dot_product_attention(taken["q"], taken["k"], taken[self.values], is_causal=True)
        shut = self.gate(x)
        return mixed.transpose(1, 2).flatten(2) + (F.relu(shut) if self.gated else shut)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"values": "k"}, "wrong operand"), ({"values": "q"}, "wrong operand"), ({"gated": False}, "")],
)
def test_an_operand_that_is_not_read_is_no_mask_and_what_is_closed_no_scale(options, told):
    finding = graphprobe.diff(made(Rewired), made(Rewired, **options), image(2, 5, 8)).first
    assert told in finding.hint, finding.hint
    assert not any(words in finding.hint for words in ("mask", "scale (0)")), finding.hint


def test_what_cannot_be_run_is_said_with_a_way_out():
    conv, inputs = made(nn.Conv1d, 2, 2, 1), image(1, 2, 4)
    half = made(nn.Conv1d, 2, 2, 1).half()
    with pytest.raises(graphprobe.errors.CaptureError, match=r"graphprobe\.capture"):
        graphprobe.diff(conv, half, inputs)
    assert graphprobe.diff(conv, graphprobe.capture(half, (inputs[0].half(),)), inputs).ok  # that way
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(inputs[0])
    graph = graphprobe.capture(conv, inputs)
    with pytest.raises(graphprobe.errors.InputError, match="holds no values"):
        graphprobe.diff(graph, graph, (fake,))

"""Rule 4 on formats of many kinds: honest codes are quantisation, one wrong scale or order among them is a finding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphprobe.judge.codes import Grid, fit
from graphprobe.judge.packing import flip
from judge_tools import Pair, module, randn

ROWS, COLUMNS, BLOCK = 48, 64, 16
DTYPES = [torch.float32, torch.bfloat16]
Forward = Callable[..., torch.Tensor]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
#: Dettmers et al. 2023, QLoRA, appendix E
NF4 = torch.tensor([
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302, 0.2461123,
    0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
])  # fmt: skip


@dataclass(frozen=True)
class Format:
    """How a weight is stored: what it becomes, how that is read, and how it can be stored wrongly."""

    store: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    read: Callable[[nn.Module], torch.Tensor]
    scale: str = "s"  # the tensor that a defect changes


def weight_of(dtype: torch.dtype) -> torch.Tensor:
    return (randn(ROWS, COLUMNS) * 0.1).to(dtype)


def pack(codes: torch.Tensor) -> torch.Tensor:
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)


def looked_up(levels: torch.Tensor, block: int, power_of_two: bool) -> Format:
    top = float(levels.abs().max())

    def store(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        blocks = weight.float().reshape(ROWS, -1, block)
        largest = blocks.abs().amax(-1, True)
        # OCP Microscaling Formats 1.0, section 6.3: the largest power of two that the format's top binade can take
        scale = torch.exp2(torch.floor(torch.log2(largest)) - 2) if power_of_two else largest / top
        codes = (blocks.unsqueeze(-1) / scale.unsqueeze(-1) - levels).abs().argmin(-1)
        return {"p": pack(codes.reshape(ROWS, COLUMNS).to(torch.uint8)), "s": scale.squeeze(-1), "t": levels}

    def read(m: nn.Module) -> torch.Tensor:
        values = m.t[unpack(m.p).long()].reshape(ROWS, -1, block) * m.s.unsqueeze(-1)
        return values.reshape(ROWS, COLUMNS)

    return Format(store, read)


def float8_blocks(dtype: torch.dtype, high: int, wide: int) -> Format:
    def store(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        tiles = weight.float().reshape(ROWS // high, high, COLUMNS // wide, wide)
        scale = tiles.abs().amax((1, 3)) / torch.finfo(dtype).max
        codes = (tiles / scale[:, None, :, None]).to(dtype)
        return {"c": codes.reshape(ROWS, COLUMNS), "s": scale}

    def read(m: nn.Module) -> torch.Tensor:
        return m.c.float() * m.s.repeat_interleave(high, 0).repeat_interleave(wide, 1)

    return Format(store, read)


def microscaling_float8() -> Format:
    def store(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        blocks = weight.float().reshape(ROWS, -1, 32)
        power = torch.floor(torch.log2(blocks.abs().amax(-1, True))) - 8
        codes = (blocks / torch.exp2(power)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"c": codes.reshape(ROWS, COLUMNS), "s": (power + 127).to(torch.uint8).squeeze(-1)}

    def read(m: nn.Module) -> torch.Tensor:
        scale = torch.exp2(m.s.float() - 127).repeat_interleave(32, 1)
        return m.c.float() * scale

    return Format(store, read)


def eight_to_a_word(asymmetric: bool) -> Format:
    def store(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.float().reshape(ROWS, -1, BLOCK)
        low, high = groups.amin(-1, True), groups.amax(-1, True)
        scale = (high - low) / 15 if asymmetric else groups.abs().amax(-1, True) / 7
        zero = -low / scale if asymmetric else torch.full_like(low, 8.0)  # a zero point that is no integer
        codes = torch.round(groups / scale + zero).clamp(0, 15).reshape(ROWS, COLUMNS // 8, 8).long()
        words = (codes << (4 * torch.arange(8))).sum(-1)
        words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
        return {"p": words, "s": scale.squeeze(-1), "z": zero.squeeze(-1)}

    def read(m: nn.Module) -> torch.Tensor:
        codes = (m.p.unsqueeze(-1) >> (4 * torch.arange(8, dtype=torch.int32))) & 15
        groups = codes.reshape(ROWS, -1, BLOCK).float()
        return ((groups - m.z.unsqueeze(-1)) * m.s.unsqueeze(-1)).reshape(ROWS, COLUMNS)

    return Format(store, read)


def int8_of_the_tensor() -> Format:
    def store(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.float().abs().amax() / 127
        return {"c": torch.round(weight.float() / scale).to(torch.int8), "s": scale.reshape(1)}

    return Format(store, lambda m: m.c.float() * m.s)


def columns_in_another_order() -> Format:
    """Groups of columns that are not neighbours, as GPTQ's act-order makes them."""

    def store(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        group = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3)) // BLOCK
        largest = torch.stack([weight.float()[:, group == g].abs().amax(1) for g in range(COLUMNS // BLOCK)], 1)
        scale = largest / 7
        codes = torch.round(weight.float() / scale[:, group]).clamp(-8, 7) + 8
        return {"p": pack(codes.to(torch.uint8)), "s": scale, "g": group}

    return Format(store, lambda m: (unpack(m.p).float() - 8) * m.s[:, m.g])


FORMATS = {
    "mxfp4": looked_up(E2M1, 32, True),
    "e2m1 in blocks": looked_up(E2M1, BLOCK, False),
    "nf4": looked_up(NF4, BLOCK, False),
    "e4m3 in tiles": float8_blocks(torch.float8_e4m3fn, 16, 16),
    "e5m2 in rows": float8_blocks(torch.float8_e5m2, 1, COLUMNS),
    "mxfp8": microscaling_float8(),
    "int4, eight to a word": eight_to_a_word(False),
    "int4 with fractional zero points": eight_to_a_word(True),
    "int4 in scattered groups": columns_in_another_order(),
    "int8 with one scale": int8_of_the_tensor(),
}


def pair(stored: dict[str, torch.Tensor], how: Format, dtype: torch.dtype, verdict: str, factor: float = 1.0) -> Pair:
    bias = randn(ROWS, seed=9, dtype=dtype)
    before = module(lambda m, x: torch.tanh(F.linear(x, m.w, m.b)), w=weight_of(dtype), b=bias)

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, how.read(m).to(x.dtype), m.b)
        return torch.tanh(y * factor if factor != 1 else y)

    return Pair(before, module(forward, b=bias, **stored), (randn(2, 8, COLUMNS, seed=1, dtype=dtype),), verdict)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_honest_codes_are_quantisation(name: str, dtype: torch.dtype) -> None:
    how = FORMATS[name]
    pair(how.store(weight_of(dtype)), how, dtype, "quantization").check()


@pytest.mark.parametrize("name", FORMATS)
def test_a_factor_beside_honest_codes_is_found(name: str) -> None:
    how = FORMATS[name]
    pair(how.store(weight_of(torch.float32)), how, torch.float32, "semantic", 1.001).check()


@pytest.mark.parametrize("bug", ["rolled", "one row", "one row too large"])
@pytest.mark.parametrize("name", FORMATS)
def test_wrong_scales_are_found(name: str, bug: str) -> None:
    how = FORMATS[name]
    stored = how.store(weight_of(torch.float32))
    scale = stored[how.scale].clone()
    if scale.numel() == 1:
        scale = scale * 1.2
    elif bug == "rolled":
        scale = scale.roll(1, 0)
    elif scale.dtype == torch.uint8:
        scale[1] += 1
    else:
        scale[1] *= 1.25 if bug == "one row too large" else 0.8
    pair({**stored, how.scale: scale}, how, torch.float32, "semantic").check()


# --- activations and caches -------------------------------------------------------------------------------------------


def held(x: torch.Tensor, kind: str, wrong: bool) -> torch.Tensor:
    """Quantise and dequantise a value on the fly."""
    wide = x.float()
    if kind == "uint8, asymmetric, of the token":
        low, high = wide.amin(-1, True).clamp(max=0), wide.amax(-1, True).clamp(min=0)
        scale = (high - low) / 255
        zero = torch.round(-low / scale)
        codes = torch.clamp(torch.round(wide / scale) + zero, 0, 255).to(torch.uint8)
        return ((codes.float() - zero + (1 if wrong else 0)) * scale).to(x.dtype)
    if kind == "int8, static":
        codes = torch.clamp(torch.round(wide / 0.04), -128, 127).to(torch.int8)
        return (codes.float() * (0.042 if wrong else 0.04)).to(x.dtype)
    if kind == "int8, of the channel":
        scale = wide.abs().amax(-2, True) / 127
        codes = torch.round(wide / scale).to(torch.int8)
        return (codes.float() * (scale.roll(1, -1) if wrong else scale)).to(x.dtype)
    dtype = torch.float8_e5m2 if "e5m2" in kind else torch.float8_e4m3fn
    scale = wide.abs().amax(-1, True) / torch.finfo(dtype).max
    codes = (wide / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    return (codes.float() * scale * (1.1 if wrong else 1.0)).to(x.dtype)


KINDS = (
    "uint8, asymmetric, of the token", "int8, static", "int8, of the channel", "e4m3 of the token", "e5m2 of the token",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_activations(kind: str, wrong: bool, dtype: torch.dtype) -> None:
    w = weight_of(dtype)
    before = module(lambda m, x: torch.tanh(F.linear(4 * torch.sin(x), m.w)), w=w)
    after = module(lambda m, x: torch.tanh(F.linear(held(4 * torch.sin(x), kind, wrong), m.w)), w=w)
    x = randn(2, 8, COLUMNS, seed=1, dtype=dtype) * 2
    Pair(before, after, (x,), "semantic" if wrong else "quantization").check()


@pytest.mark.parametrize("wrong", ["", "keys", "scale"])
@pytest.mark.parametrize("kind", KINDS)
def test_caches(kind: str, wrong: str) -> None:
    """A cache that is given, extended by a token and read through codes."""

    def attention(quantised: bool, scale: float) -> Forward:
        def forward(m: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
            keys = torch.cat([old, k * 1.5], 2)
            if quantised:
                keys, v = held(keys, kind, wrong == "keys"), held(v, kind, False)
            return F.scaled_dot_product_attention(q, keys, v, scale=scale)

        return forward

    q, k, v, old = (
        randn(2, 4, 1, 16),
        randn(2, 4, 1, 16, seed=1),
        randn(2, 4, 12, 16, seed=2),
        randn(2, 4, 11, 16, seed=3),
    )
    after = module(attention(True, 0.2502 if wrong == "scale" else 0.25))
    Pair(module(attention(False, 0.25)), after, (q, k, v, old), "semantic" if wrong else "quantization").check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int4_that_only_its_kernel_unpacks(dtype: torch.dtype) -> None:
    """_weight_int4pack_mm's layout is its own affair; codes and scales are found by asking it."""
    weight = weight_of(torch.float32)[:32]
    groups = weight.reshape(32, -1, 32)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / 15
    codes = torch.round((groups - low[..., None]) / scale[..., None]).clamp(0, 15).to(torch.int32).reshape(32, COLUMNS)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    before = module(lambda m, x: torch.tanh(F.linear(x, m.w)), w=weight.to(dtype))

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.ops.aten._weight_int4pack_mm_for_cpu(x, m.p, 32, m.s))

    for factor, verdict in ((1.0, "quantization"), (1.03, "semantic")):
        pairs = torch.stack([scale * factor, low + 8 * scale], -1).transpose(0, 1).contiguous().to(dtype)
        x = randn(4, COLUMNS, seed=2, dtype=dtype)
        Pair(before, module(forward, p=packed, s=pairs), (x,), verdict).check()


@pytest.mark.parametrize("columns", [16, 32, 256])
def test_short_rows_of_honest_codes_are_not_off_scale(columns: int) -> None:
    """A few large elements fit their own rounding errors; over many rows one looks like a wrong scale by chance."""
    torch.manual_seed(0)
    for _ in range(60):
        wanted = torch.randn(32, columns, dtype=torch.float64)
        top = wanted.abs().amax() / 448
        codes = (wanted / top).to(torch.float8_e4m3fn)
        held = codes.double() * top
        step = ((flip(codes, 1).double() - codes.double()).abs() * top).nan_to_num(nan=float(top) * 32)
        found = fit(
            wanted, held, Grid(step, 8, torch.float8_e4m3fn, 2.0**-24, top=torch.full_like(held, 448 * float(top)))
        )
        assert found.holds, found.why
        assert not fit(wanted, held * 1.1, Grid(step * 1.1, 8, torch.float8_e4m3fn, 2.0**-24)).holds

"""Linear layers held in codes, honestly or with one thing wrong: int8, int4 in groups, fp8, nvfp4, int8 on the fly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor
FP8 = torch.float8_e4m3fn
GROUP = 8
#: The magnitudes that four-bit floats (e2m1) hold.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


class Coded(nn.Module):
    """A linear layer whose weight is the product of codes and scales; `wrong` names what its author got wrong."""

    def __init__(self, source: nn.Linear, wrong: str = "") -> None:
        super().__init__()
        self.wrong, self.dtype = wrong, source.weight.dtype
        self.bias = source.bias
        self.encode(source.weight.detach().float())

    def encode(self, weight: Tensor) -> None:
        raise NotImplementedError

    def decoded(self) -> Tensor:
        raise NotImplementedError

    def keep(self, **tensors: Tensor) -> None:
        for name, value in tensors.items():
            self.register_buffer(name, value.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.decoded().to(x.dtype), self.bias)


class Int8(Coded):
    """One scale a row. Wrong: "rolled" (rows' scales shifted), "inverted", "missing", "other axis" (by columns)."""

    def encode(self, weight: Tensor) -> None:
        scale = weight.abs().amax(1, True) / 127
        codes = (weight / scale).round().to(torch.int8)
        scale = {
            "rolled": lambda s: s.roll(1, 0),
            "inverted": lambda s: 1 / s,
            "missing": torch.ones_like,
            "first for all": lambda s: s[:1].expand_as(s),
            "other axis": lambda s: s.t() if s.shape[0] == weight.shape[1] else s.roll(3, 0),
        }.get(self.wrong, lambda s: s)(scale)
        self.keep(codes=codes, scale=scale.to(self.dtype))

    def decoded(self) -> Tensor:
        return self.codes.to(self.dtype) * self.scale


class Int8Dynamic(Int8):
    """Activations are rounded to codes per token, too; the product is one of integers."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
        codes = (x.float() / step).round().clamp(-128, 127).to(torch.int8)
        if self.wrong == "truncated":
            codes = (x.float() / step).clamp(-128, 127).to(torch.int8)
        flat = codes.flatten(0, -2)
        product = torch._int_mm(flat, self.codes.t().contiguous()).view(*x.shape[:-1], -1)
        y = (product.float() * step * self.scale.float().reshape(-1)).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int4(Coded):
    """Two codes a byte, a scale and a zero point for every group of columns.

    Wrong: "nibbles" (high half first), "zero ignored", "zero plus one" (as GPTQ stores it), "groups" (scales laid out
    by columns first).
    """

    def encode(self, weight: Tensor) -> None:
        groups = weight.unflatten(1, (-1, GROUP))
        low, high = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
        scale = (high - low) / 15
        zero = (-low / scale).round().clamp(0, 15)
        codes = ((groups / scale).round() + zero).clamp(0, 15).flatten(1).to(torch.uint8)
        packed = codes[:, ::2] | (codes[:, 1::2] << 4)
        if self.wrong == "nibbles":
            packed = (packed >> 4) | (packed << 4)
        if self.wrong == "groups":
            scale = scale.transpose(0, 1).reshape(scale.shape)
        shift = {"zero ignored": -zero, "zero plus one": torch.ones_like(zero)}.get(self.wrong, torch.zeros_like(zero))
        self.keep(packed=packed, scale=scale.to(self.dtype), zero=(zero + shift).to(self.dtype))

    def decoded(self) -> Tensor:
        codes = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1).unflatten(1, (-1, GROUP))
        return ((codes.to(self.dtype) - self.zero) * self.scale).flatten(1)


class Fp8(Coded):
    """Eight-bit floats with one scale. Wrong: "inverted", "missing", "cast" (bytes converted instead of viewed)."""

    def encode(self, weight: Tensor) -> None:
        scale = weight.abs().amax() / 448
        codes = (weight / scale).to(FP8)
        scale = {"inverted": 1 / scale, "missing": torch.ones(())}.get(self.wrong, scale)
        self.keep(codes=codes.view(torch.uint8), scale=scale.to(self.dtype))

    def decoded(self) -> Tensor:
        codes = self.codes.to(FP8) if self.wrong == "cast" else self.codes.view(FP8)
        return codes.to(self.dtype) * self.scale


class Fp8Blocks(Coded):
    """Eight-bit floats with a scale for every block of 8x8. Wrong: "transposed", "missing", "inverted"."""

    def encode(self, weight: Tensor) -> None:
        rows, columns = weight.shape
        padded = F.pad(weight, (0, -columns % 8, 0, -rows % 8))  # the last blocks may be smaller
        blocks = padded.unflatten(0, (-1, 8)).unflatten(2, (-1, 8))
        scale = blocks.abs().amax((1, 3), True) / 448
        codes = (blocks / scale).to(FP8).flatten(2).flatten(0, 1)[:rows, :columns]
        flat = scale.squeeze(3).squeeze(1)
        flat = {
            "transposed": lambda s: s.t().reshape(s.shape),
            "missing": torch.ones_like,
            "inverted": lambda s: 1 / s,
        }.get(self.wrong, lambda s: s)(flat)
        self.keep(codes=codes, scale=flat)

    def decoded(self) -> Tensor:
        wide = self.scale.repeat_interleave(8, 0).repeat_interleave(8, 1)
        rows, columns = self.codes.shape
        return (self.codes.float() * wide[:rows, :columns]).to(self.dtype)


class Nvfp4(Coded):
    """Four-bit floats, an eight-bit float scale for every group, and one global scale.

    Wrong: "global dropped", "first group" (its scale used for all).
    """

    def encode(self, weight: Tensor) -> None:
        groups = weight.unflatten(1, (-1, GROUP))
        top = weight.abs().amax() / (448 * 6)
        scale = (groups.abs().amax(-1, True) / 6 / top).to(FP8)
        ratio = groups / (scale.float() * top)
        nearest = (ratio.abs()[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
        codes = (nearest | ((ratio < 0).to(torch.uint8) << 3)).flatten(1)
        if self.wrong == "first group":
            scale = scale[:, :1].expand_as(scale)
        if self.wrong == "global dropped":
            top = torch.ones(())
        self.keep(packed=codes[:, ::2] | (codes[:, 1::2] << 4), scale=scale.squeeze(-1), top=top)
        self.keep(table=torch.cat([E2M1, -E2M1]))

    def decoded(self) -> Tensor:
        codes = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1).int()
        values = self.table[codes].unflatten(1, (-1, GROUP))
        return (values * (self.scale.float() * self.top)[..., None]).flatten(1).to(self.dtype)


KINDS: dict[str, Callable[..., Coded]] = {
    "int8": Int8, "int8 dynamic": Int8Dynamic, "int4": Int4, "fp8": Fp8, "fp8 blocks": Fp8Blocks, "nvfp4": Nvfp4,
}  # fmt: skip


def names(model: nn.Module) -> list[str]:
    """Return the paths of the linear layers inside the model's layers."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in n and "router" not in n]


def quantise(model: Any, kind: str, wrong: dict[str, str] | None = None) -> None:
    """Put codes in the place of all linear layers; `wrong` says what is wrong with which of them."""
    for name in names(model):
        parent, _, last = name.rpartition(".")
        source = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, KINDS[kind](source, (wrong or {}).get(name, "")))

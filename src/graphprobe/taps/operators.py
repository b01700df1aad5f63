"""The operators that observe: ``graphprobe::tap``, ``graphprobe::tap_several`` and ``graphprobe::keep``.

They return nothing and write into a buffer. That is what survives dead-code elimination, decomposition, re-export,
``torch.compile`` and CUDA graphs: an operator without effect is removed, a host callback runs at capture only.
They are bare library operators because ``torch.library.custom_op`` costs ten times as much per call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from graphprobe.taps import cpu_stats, torch_stats

_LIBRARY: Any = torch.library.Library("graphprobe", "DEF")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define("tap(Tensor value, Tensor(a!) stats, int row) -> ()", tags=_TAGS)
_LIBRARY.define("tap_several(Tensor[] values, Tensor(a!) stats, int[] rows) -> ()", tags=_TAGS)
_LIBRARY.define("keep(Tensor value, Tensor(a!) kept) -> ()", tags=_TAGS)

TAP: Any = torch.ops.graphprobe.tap.default
TAP_SEVERAL: Any = torch.ops.graphprobe.tap_several.default
KEEP: Any = torch.ops.graphprobe.keep.default


def _tap_cpu(value: torch.Tensor, stats: torch.Tensor, row: int) -> None:
    cpu_stats.write_row(_plain(value), stats, row)


def _tap_cuda(value: torch.Tensor, stats: torch.Tensor, row: int) -> None:
    kernels = _kernels()
    if kernels is None or not kernels.write_row(value, stats, row):
        _tap_anywhere(value, stats, row)


def _tap_several_cuda(values: list[torch.Tensor], stats: torch.Tensor, rows: list[int]) -> None:
    kernels = _kernels()
    for k in range(len(values)) if kernels is None else kernels.write_rows(values, stats, rows):
        _tap_anywhere(values[k], stats, rows[k])


def _tap_several(values: list[torch.Tensor], stats: torch.Tensor, rows: list[int]) -> None:
    for value, row in zip(values, rows, strict=True):
        TAP(value, stats, row)


def _tap_anywhere(value: torch.Tensor, stats: torch.Tensor, row: int) -> None:
    stats[row, 0].copy_(torch_stats.row_of(_plain(value), stats.shape[2]), non_blocking=True)


def _plain(value: torch.Tensor) -> torch.Tensor:
    if value.requires_grad:
        value = value.detach()
    return value if value.layout is torch.strided else value.to_dense()


@functools.cache
def _kernels() -> Any:
    """Return `triton_stats`, None where Triton is not installed."""
    from torch.utils._triton import has_triton_package

    if not has_triton_package():
        return None
    from graphprobe.taps import triton_stats

    return triton_stats


def _keep(value: torch.Tensor, kept: torch.Tensor) -> None:
    kept.copy_(value.detach())


def _nothing(*_args: Any) -> None:
    return None


_LIBRARY.impl("tap", _tap_cpu, "CPU")
_LIBRARY.impl("tap", _tap_cuda, "CUDA")
_LIBRARY.impl("tap", _tap_anywhere, "CompositeExplicitAutograd")
_LIBRARY.impl("tap_several", _tap_several_cuda, "CUDA")
_LIBRARY.impl("tap_several", _tap_several, "CompositeExplicitAutograd")
_LIBRARY.impl("keep", _keep, "CompositeExplicitAutograd")
for _name in ("tap", "tap_several", "keep"):
    # nothing to differentiate: the value is read, the buffer needs no gradient
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"graphprobe::{_name}", _nothing, lib=_LIBRARY)


@torch.fx.has_side_effect
def tap_if_tensor(value: Any, stats: torch.Tensor, row: int) -> None:
    """Tap a value of which the graph does not tell whether it is a tensor."""
    if isinstance(value, torch.Tensor):
        TAP(value, stats, row)


def is_tap(target: Any) -> bool:
    """Whether a node's target is one of the operators that observe."""
    return target in (TAP, TAP_SEVERAL, KEEP, tap_if_tensor)

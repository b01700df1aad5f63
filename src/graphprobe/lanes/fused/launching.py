"""Launch the fused comparisons: which tensors they take, and how the work is cut (see benchmarks/kernel_rates.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from graphprobe import launches
from graphprobe.lanes.fused import common, exact, float8, native, several
from graphprobe.lanes.fused.joint import Joint, joint

Tensor = torch.Tensor

_LAUNCHES = launches.Launches()
#: Programs of one native comparison at most, rows of 16 bytes that each reads per step, and steps that are under way.
_PROGRAMS, _ROWS, _WARPS, _STAGES = 528, 256, 4, 3
#: The same of one exact comparison; elements of a step, at most so many rows high, and rows that one column sum spans.
_EXACT_PROGRAMS, _EXACT_WARPS, _EXACT_STAGES = 1024, 1, 1
_TILE, _HEIGHT, _SPAN = 256, 2, 64
#: Programs of one value at most where several are compared together, and elements that it may have.
_SEVERAL_PROGRAMS, _SEVERAL_MOST = 128, 2**30
#: Told apart in float32.
NARROW = {torch.float32, torch.float16, torch.bfloat16, *float8.KINDS}
_WHOLE = {torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
#: What the kernels read as it lies.
READABLE = {torch.float64, *_WHOLE, *NARROW}


def new_partials(device: torch.device) -> Tensor:
    """Return room for the partial results of as many rows as are joined at once."""
    shape = (common.RING, common.GROUPS, common.COLUMNS, common.SLOTS)
    return torch.zeros(shape, dtype=torch.float64, device=device)


def compare_native(
    partials: Tensor, row: int, b: Tensor, f: Tensor | None, r: Tensor | None, moved: Tensor | None,
    bounds: tuple[float, float],
) -> bool:  # fmt: skip
    """Start measuring the free and the forced lane against before; False where the kernels cannot read a tensor."""
    given = [t for t in (b, f, r, moved) if t is not None]
    key = ("native", bounds, f is None, r is None, moved is None, partials.device.index, *map(launches.kind, given))
    known = _LAUNCHES.get(key)
    if known is None:
        walk = joint(tuple(given), inner=False) if _readable(partials, given) else None
        known = _LAUNCHES.note(key, walk is not None and _native(walk, b, f, r, moved, bounds))
    if known is False:
        return False
    values = [b if t is None else t for t in (b, f, r, moved)]
    known[1](known[0], (*values, partials), (_place(row),))
    return True


def _native(
    walk: Joint, b: Tensor, f: Tensor | None, r: Tensor | None, moved: Tensor | None, bounds: tuple[float, float]
) -> tuple[launches.Grid, launches.Launch]:
    lanes = [t.dtype for t in (b, f, r) if t is not None]
    narrow = all(dtype in NARROW for dtype in lanes)
    across = 16 // max(dtype.itemsize for dtype in lanes)
    grid = (max(1, min(_PROGRAMS, -(-walk.numel // (_ROWS * across)))), 1)
    settled = (walk.numel, *walk.sizes[1:], *walk.spread([t is not None for t in (b, f, r, moved)]))
    constants = dict(
        BOUND=bounds[0], OTHER=bounds[1],
        HAS_F=f is not None, HAS_R=r is not None, HAS_M=moved is not None,
        SAME_F=f is not None and f.dtype == b.dtype, SAME_R=r is not None and r.dtype == b.dtype,
        FAST=narrow and moved is None, WIDE=not narrow, DENSE=walk.dense, LONG=walk.is_long,
        ROWS=_ROWS, ACROSS=across, STAGES=_STAGES, **_kinds([None if t is None else t.dtype for t in (b, f, r)]),
    )  # fmt: skip
    return grid, launches.Launch(native.compare_native, settled, constants, _WARPS)


class _Group(NamedTuple):
    """Values that one launch compares: their places in the lists, and how many elements each has."""

    places: list[int]
    counts: list[int]
    grid: launches.Grid
    launch: launches.Launch


def compare_several(
    partials: Tensor, rows: Sequence[int], b: Sequence[Tensor], f: Sequence[Tensor], r: Sequence[Tensor | None],
    bounds: Sequence[tuple[float, float]],
) -> list[int]:  # fmt: skip
    """Start measuring small values, many in one launch; return the places of those that cannot be read together."""
    kinds = [None if t is None else launches.kind(t) for lane in (b, f, r) for t in lane]
    key = ("several", tuple(bounds), partials.device.index, *kinds)
    known = _LAUNCHES.get(key)
    if known is None:
        known = _LAUNCHES.note(key, _grouped(partials, b, f, r, bounds))
    groups, alone = known
    for group in groups:
        spare = several.SEVERAL - len(group.places)  # filled with the last value again, which no program looks at
        chosen = [*group.places, *group.places[-1:] * spare]
        lanes = (b, f, b if r[chosen[0]] is None else r)
        addresses = [lane[k].data_ptr() for lane in lanes for k in chosen]
        counts = [*group.counts, *group.counts[-1:] * spare]
        group.launch(group.grid, (partials,), [*addresses, *counts, *(_place(rows[k]) for k in chosen)])
    return alone  # type: ignore[no-any-return]


def _grouped(
    partials: Tensor, b: Sequence[Tensor], f: Sequence[Tensor], r: Sequence[Tensor | None],
    bounds: Sequence[tuple[float, float]],
) -> tuple[list[_Group], list[int]]:  # fmt: skip
    """Sort values by what a variant of the kernel is compiled for."""
    together: dict[Any, list[int]] = {}
    alone = []
    for k, lanes in enumerate(zip(b, f, r, strict=True)):
        given = [t for t in lanes if t is not None]
        walk = joint(tuple(given), inner=False) if _readable(partials, given) else None
        if (
            walk is None
            or not walk.dense
            or not 0 < walk.numel < _SEVERAL_MOST
            or any(t.data_ptr() % 16 for t in given)
        ):
            alone.append(k)
        else:
            dtypes = tuple(None if t is None else t.dtype for t in lanes)
            together.setdefault((bounds[k], *dtypes), []).append(k)
    groups = []
    for (bound, *dtypes), places in together.items():
        launch = _several(partials, bound, dtypes)
        step = _ROWS * 16 // max(dtype.itemsize for dtype in dtypes if dtype is not None)
        for start in range(0, len(places), several.SEVERAL):
            chosen = places[start : start + several.SEVERAL]
            counts = [b[k].numel() for k in chosen]
            grid = (min(_SEVERAL_PROGRAMS, -(-max(counts) // step)), len(chosen))
            groups.append(_Group(chosen, counts, grid, launch))
    return groups, alone


def _kinds(dtypes: Sequence[torch.dtype | None]) -> dict[str, int]:
    """Say which lanes are of a type of 8 bits; one that is not there is read as before is."""
    names = zip(("B8", "F8", "R8"), dtypes, strict=True)
    return {name: float8.KINDS.get(dtype or dtypes[0], 0) for name, dtype in names}


def _several(partials: Tensor, bound: tuple[float, float], dtypes: Sequence[torch.dtype | None]) -> launches.Launch:
    key = ("several", bound, partials.device.index, *dtypes)
    known = _LAUNCHES.get(key)
    if known is not None:
        return known  # type: ignore[no-any-return]
    before, free, forced = dtypes
    given = [dtype for dtype in dtypes if dtype is not None]
    narrow = all(dtype in NARROW for dtype in given)
    bytes_ = [torch.uint8 if dtype in (torch.bool, *float8.KINDS) else dtype for dtype in dtypes]
    kinds = [getattr(tl, str(bytes_[0] if dtype is None else dtype).removeprefix("torch.")) for dtype in bytes_]
    constants = dict(
        B=kinds[0], F=kinds[1], R=kinds[2], BOUND=bound[0], OTHER=bound[1], HAS_F=True, HAS_R=forced is not None,
        SAME_F=free == before, SAME_R=forced == before, FAST=narrow, WIDE=not narrow, PROGRAMS=_SEVERAL_PROGRAMS,
        ROWS=_ROWS, ACROSS=16 // max(dtype.itemsize for dtype in given), MANY=several.SEVERAL,
        **_kinds(dtypes),
    )  # fmt: skip
    return _LAUNCHES.note(key, launches.Launch(several.compare_several, (), constants, _WARPS))  # type: ignore[no-any-return]


def compare_exact(
    partials: Tensor, row: int, b: Tensor, r: Tensor | None, xb: Tensor, xa: Tensor, moved: Tensor | None,
    bounds: tuple[float, float],
) -> bool:  # fmt: skip
    """Start measuring the exact lanes; False where the kernels cannot read a tensor."""
    given = [t for t in (xb, xa, b, r, moved) if t is not None]
    key = ("exact", bounds, r is None, moved is None, partials.device.index, *map(launches.kind, given))
    known = _LAUNCHES.get(key)
    if known is None:
        walk = joint(tuple(given), inner=True) if _readable(partials, given) else None
        known = _LAUNCHES.note(key, walk is not None and _exact(walk, b, r, moved, bounds))
    if known is False:
        return False
    values = (xb, xa, b, b if r is None else r, b if moved is None else moved)
    known[1](known[0], (*values, partials), (_place(row),))
    return True


def _exact(
    walk: Joint, b: Tensor, r: Tensor | None, moved: Tensor | None, bounds: tuple[float, float]
) -> tuple[launches.Grid, launches.Launch]:
    width = walk.sizes[-1]
    rows = walk.numel // width if width else 0
    height = min(_HEIGHT, _power_of_two(rows))
    across = min(_TILE // height, max(16, _power_of_two(width)))
    units = -(-width // across) * -(-rows // _SPAN)
    settled = (rows, width, *walk.sizes[1:-1], *walk.spread([True, True, True, r is not None, moved is not None]))
    constants = dict(
        BOUND=bounds[0], OTHER=bounds[1],
        HAS_R=r is not None, HAS_M=moved is not None, LONG=walk.is_long, ROWS=height, ACROSS=across, SPAN=_SPAN,
        STAGES=_EXACT_STAGES, B8=float8.KINDS.get(b.dtype, 0), R8=0 if r is None else float8.KINDS.get(r.dtype, 0),
    )  # fmt: skip
    grid = (max(1, min(_EXACT_PROGRAMS, units)), 1)
    return grid, launches.Launch(exact.compare_exact, settled, constants, _EXACT_WARPS)


def join(slots: Tensor, partials: Tensor, first: int, rows: int) -> None:
    """Write the measurements of the rows ``first .. first + rows`` into `slots`; other columns stay as they are."""
    exact.join[(rows,)](slots, partials, first, WIDTH=slots.shape[1])


def _readable(partials: Tensor, values: list[Tensor]) -> bool:
    shape, device = values[0].shape, partials.device
    return all(
        t.shape == shape and t.device == device and t.dtype in READABLE and t.layout is torch.strided for t in values
    )


def _place(row: int) -> int:
    return row % common.RING * common.GROUPS * common.GROUP


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()

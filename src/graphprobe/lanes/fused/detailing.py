"""Launch the comparison in every detail: which tensors it takes, and how the work is cut."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from graphprobe import launches
from graphprobe.lanes.details import grid_of
from graphprobe.lanes.fused import common, details, float8
from graphprobe.lanes.fused.launching import NARROW, READABLE

Tensor = torch.Tensor

_LAUNCHES = launches.Launches()
#: Programs at most, steps of each at least, elements of a step, at most so many rows high; of the second kernel slices
#: and sums of a step.
_PROGRAMS, _STEPS, _TILE, _HEIGHT, _WARPS = 528, 4, 512, 4, 4
_SIDE, _DEPTH = 8, 128
_GROUP = details.COLUMNS * common.SLOTS
_BLOCK = 1 << (details.SHARES * details.DIMS - 1).bit_length()


def new_partials(device: torch.device) -> Tensor:
    """Return room for the partial results of as many rows as are joined at once."""
    return torch.zeros(common.RING, details.COLUMNS, common.SLOTS, dtype=torch.float64, device=device)


class _Walk(NamedTuple):
    """Sizes and strides [DIMS] in the order in which the first tensor lies in memory, and which dimensions they are."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    dims: tuple[int, ...]
    is_long: bool


@functools.lru_cache(4096)
def _walk(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> _Walk | None:
    """Return the way through tensors of one shape, dimension by dimension; None where there are too many."""
    order = sorted((d for d, size in enumerate(shape) if size != 1), key=lambda d: (-strides[0][d], d))
    spare = details.DIMS - len(order)
    if spare < 0:
        return None
    reach = max(sum((shape[d] - 1) * abs(steps[d]) for d in order) for steps in strides)
    return _Walk(
        (1,) * spare + tuple(shape[d] for d in order),
        tuple((0,) * spare + tuple(steps[d] for d in order) for steps in strides),
        (-1,) * spare + tuple(order),
        max(reach, *shape, 1) >= 2**30,
    )


class _Known(NamedTuple):
    """Both kernels, as they are launched for tensors of one kind."""

    grid: launches.Grid
    compare: launches.Launch
    slices: launches.Launch
    numbers: tuple[int, int, int]  # rows, width, rows of a program
    shares: int  # of the slices of one dimension
    room: int  # sums of rows and of columns


def compare(
    partials: Tensor, row: int, x: Tensor, y: Tensor, moved: Tensor | None, bounds: tuple[float, float]
) -> bool:
    """Start comparing y with x; False where the kernels cannot read a tensor."""
    given = [t for t in (x, y, moved) if t is not None]
    key = (bounds, moved is None, partials.device.index, *map(launches.kind, given))
    known = _LAUNCHES.get(key)
    if known is None:
        known = _LAUNCHES.note(key, _prepared(partials, given, bounds))
    if known is False:
        return False
    rows, width, chunk = known.numbers
    sums = partials.new_empty(known.room)
    place = row % common.RING * _GROUP
    values = (x, y, x if moved is None else moved)
    known.compare(known.grid, (*values, partials, sums), (place, rows, width, chunk))
    known.slices((details.DIMS, known.shares), (partials, sums), (place, rows, width, known.grid[1]))
    return True


def _prepared(partials: Tensor, given: list[Tensor], bounds: tuple[float, float]) -> _Known | bool:
    x, y = given[:2]
    walk = _walk(tuple(x.shape), tuple(t.stride() for t in given)) if _is_readable(partials, given) else None
    if walk is None:
        return False
    width = walk.sizes[-1]
    rows = x.numel() // width
    height = min(_HEIGHT, _power_of_two(rows))
    across = min(_TILE // height, max(16, _power_of_two(width)))
    blocks = -(-width // across)
    beside = min(blocks, _PROGRAMS)
    chunk = -(-rows // max(1, min(_PROGRAMS // beside, rows // (_STEPS * height))))
    grid = (beside, -(-rows // chunk))
    grid_bits = grid_of(x.dtype, y.dtype)
    strides = [step for steps in walk.strides for step in steps]
    strides += [0] * (3 * details.DIMS - len(strides))
    whole = not x.dtype.is_floating_point
    constants: dict[str, Any] = dict(
        X=float8.KINDS.get(x.dtype, 0), Y=float8.KINDS.get(y.dtype, 0), BOUND=bounds[0], OTHER=bounds[1],
        HAS_M=len(given) == 3, WHOLE=whole and x.dtype == y.dtype, WIDE=not {x.dtype, y.dtype} <= NARROW,
        ALIKE=x.dtype == y.dtype and x.dtype not in float8.KINDS, BITS=0 if grid_bits is None else grid_bits.bits,
        LOWEST=0 if grid_bits is None else grid_bits.lowest, LONG=walk.is_long, ROWS=height, ACROSS=across,
    )  # fmt: skip
    second = {"ACROSS": across, "SIDE": _SIDE, "DEPTH": _DEPTH}
    return _Known(
        grid,
        launches.Launch(details.compare, (*walk.sizes[1:-1], *strides), constants, _WARPS),
        launches.Launch(details.slices, (*walk.sizes[:-1], *walk.dims), second, _WARPS),
        (rows, width, chunk),
        min(details.SHARES, -(-max(walk.sizes) // _SIDE)),
        2 * (rows * blocks + grid[1] * width),
    )


def _is_readable(partials: Tensor, given: list[Tensor]) -> bool:
    shape, device = given[0].shape, partials.device
    return given[0].numel() > 0 and all(
        t.shape == shape and t.device == device and t.layout is torch.strided and t.dtype in READABLE for t in given
    )


def join(rows: Tensor, partials: Tensor, first: int, count: int) -> None:
    """Write the measurements of the rows ``first .. first + count`` into `rows`."""
    details.join[(count,)](
        rows, partials, first, WIDTH=rows.shape[1], RING=common.RING, BLOCK=_BLOCK, GROUP=_GROUP, num_warps=4
    )


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()

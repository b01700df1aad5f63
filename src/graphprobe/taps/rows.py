"""What each row of the statistics means, and how rows become `Tap` records."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphprobe import nodes, provenance
from graphprobe.records import Tap
from graphprobe.taps import columns
from graphprobe.taps.metadata import placeholder_values

#: Key of the `Table` in ``GraphModule.meta``.
META = "graphprobe_taps"

Sizes = dict[Any, int]  # symbol of a dynamic dimension -> its size in one call


@dataclass(frozen=True)
class Row:
    """One observed or derived value; `buffer` and `index` say where its statistics lie."""

    name: str
    op: str
    module_path: str
    shape: tuple[Any, ...] | None  # numbers, or sympy expressions of dynamic dimensions; None: unknown
    dtype: str
    buffer: str = ""  # empty: a derived row
    index: int = -1
    of: str = ""


@dataclass(frozen=True)
class Table:
    """All rows of an instrumented graph, in graph order, and its buffers."""

    rows: tuple[Row, ...]
    stats: tuple[str, ...]  # names of the statistics buffers, one per device
    kept: dict[str, str]  # name of a kept value -> name of its buffer

    @functools.cached_property
    def is_dynamic(self) -> bool:
        """Whether any shape depends on the inputs."""
        return any(not isinstance(size, int) for row in self.rows for size in row.shape or ())

    def snapshot(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Copy the statistics [rows, width] to the CPU: one synchronisation per device."""
        with torch.no_grad():
            return {name: columns.merge(module.get_buffer(name)).cpu() for name in self.stats}

    def taps(self, snapshot: dict[str, torch.Tensor], sizes: Sizes) -> tuple[Tap, ...]:
        """Turn a snapshot into records; `sizes` tells the dynamic dimensions of that call."""
        cells = {name: table.tolist() for name, table in snapshot.items()}
        out = []
        for row in self.rows:
            if not row.buffer:
                out.append(_derived(row, sizes))
                continue
            found = cells[row.buffer][row.index]
            if found[columns.SLOTS] or row.shape is not None:  # else it was no tensor
                out.append(_measured(row, found, sizes))
        return tuple(out)


def read(module: torch.nn.Module, table: Table, sizes: Sizes | None = None) -> tuple[Tap, ...]:
    """Read the taps from a module that holds an instrumented graph's buffers: the graph itself, or exported again."""
    return table.taps(table.snapshot(module), sizes or {})


def describe(node: Node, name: str, value: Node, **place: Any) -> Row:
    """Make the row of `value` as it is after `node` ran."""
    tensor = nodes.tensor_val(value)
    return Row(
        name=name,
        op=provenance.target_name(node),
        module_path=provenance.module_path(node),
        shape=None if tensor is None else tuple(dimension(d) for d in tensor.shape),
        dtype="unknown" if tensor is None else nodes.dtype_name(tensor.dtype),
        **place,
    )


def bind(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sizes:
    """Find the size that each dynamic dimension has in these inputs."""
    sizes: Sizes = {}
    for node, leaf in placeholder_values(gm, args, kwargs).items():
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and isinstance(leaf, int):
            sizes[dimension(value)] = leaf
        elif isinstance(value, torch.Tensor) and isinstance(leaf, torch.Tensor):
            sizes.update((dimension(d), s) for d, s in zip(value.shape, leaf.shape, strict=True) if _is_dynamic(d))
    return sizes


def size_of(dimension: Any, sizes: Sizes) -> int | None:
    """Return a dimension's size, None where the inputs do not fix it."""
    if isinstance(dimension, int):
        return dimension
    bound = dimension.xreplace(sizes)
    return int(bound) if isinstance(bound, int) or bound.is_number else None


def _is_dynamic(size: Any) -> bool:
    return not isinstance(dimension(size), int)


def dimension(size: Any) -> Any:
    """Return a number, or the sympy expression of a dynamic size."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else expression


def _shape(row: Row, sizes: Sizes, count: int | None) -> tuple[int, ...]:
    found = [size_of(d, sizes) for d in row.shape or ()]
    unknown = found.count(None)
    if unknown == 1 and count is not None:  # a size that depends on data: the element count tells it
        others = 1
        for size in found:
            others *= 1 if size is None else size
        found = [(count // others if others else 0) if size is None else size for size in found]
    return tuple(-1 if size is None else size for size in found)


def _derived(row: Row, sizes: Sizes) -> Tap:
    return Tap(row.name, row.op, row.module_path, _shape(row, sizes, None), row.dtype, derived=True, of=row.of)


def _measured(row: Row, cells: list[float], sizes: Sizes) -> Tap:
    ran = cells[columns.SLOTS] > 0
    low, high, mean, rms = (None if value != value else value for value in cells[: columns.NAN])
    return Tap(
        name=row.name,
        op=row.op,
        module_path=row.module_path,
        shape=_shape(row, sizes, int(cells[columns.COUNT]) if ran else None),
        dtype=row.dtype,
        min=low,
        max=high,
        mean=mean,
        rms=rms,
        nan=int(cells[columns.NAN]),
        inf=int(cells[columns.INF]),
        zeros=int(cells[columns.ZEROS]),
        checksum=int(cells[columns.CHECKSUM]) if ran and len(cells) > columns.CHECKSUM else None,
    )

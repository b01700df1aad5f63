"""The instrument pass: a copy of a graph in which every operation that makes values is observed.

A tap stands directly after the operation, so that a value which is changed in place later was read before. An operation
that writes in place has a row for what it wrote; where that was a part of a storage, a row for the whole follows.

On a GPU a launch costs more than reading a small value. There, small values wait for others and are read together:
never beyond an operation that writes in place, and not so many that they hold much memory.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.fx import GraphModule, Node

from graphprobe import nodes
from graphprobe.devices import redirect
from graphprobe.errors import InputError
from graphprobe.streaming import Stream
from graphprobe.taps import columns, operators
from graphprobe.taps.aliases import Aliases, returns_written, written
from graphprobe.taps.copies import copied
from graphprobe.taps.returned import kept_names
from graphprobe.taps.rows import META, Row, Sizes, Table, describe, dimension, size_of

_STATS = "_graphprobe_stats_{}"
_KEPT = "_graphprobe_kept_{}"
#: On these devices small values are read together: so many at most, each of so many bytes, holding so many bytes.
_WAITING = {"cuda"}
_SEVERAL, _SMALL, _HELD = 32, 1 << 20, 8 << 20
_INHERITED = ("nn_module_stack", "stack_trace", "torch_fn")


def instrument_graph(
    gm: GraphModule,
    *,
    keep: str | Sequence[str] | None = None,
    sizes: Sizes | None = None,
    stream: Stream | None = None,
    checksum: bool = False,
) -> GraphModule:
    """Return a copy of `gm` that observes every value; weights are shared, `gm` is not changed.

    The statistics of a run lie in buffers of the copy; ``meta["graphprobe_taps"]`` is the `Table` that reads them.
    Values that match `keep` are copied into buffers, too; `sizes` gives the dynamic dimensions these need. With a
    `stream` the graph computes on its device, and weights come from where they are, one by one. With `checksum` every
    row has one of the value's bits.
    Raises InputError where `keep` matches nothing or the size of a kept value is not known beforehand.
    """
    out = copied(gm)
    kept = kept_names(out, keep) if keep else {}
    if stream is not None and stream.device.type != "cpu":
        redirect(out, stream.device)
    plan = _Plan(_moved(out, stream))
    for node in out.graph.nodes:
        plan.visit(node)
    first = next((node for node in out.graph.nodes if node.op.startswith("call_")), None)
    if first is not None:
        names = _insert_keeps(out, kept, first, plan.moved, sizes or {})
        _insert_taps(out, plan, first, checksum)
    if stream is not None:
        stream.insert(out, out.graph, [n for n in out.graph.nodes if n.op == "get_attr"], plan.changed)
    out.meta[META] = Table(
        rows=tuple(item.row for item in plan.items),
        stats=tuple(plan.buffers),
        kept={name: names[node] for name, node in kept.items()},
    )
    out.recompile()
    return out


class _Observed(NamedTuple):
    after: Node  # the operation
    value: Node  # what is read
    row: Row
    group: int  # those of one group are read together, after the last one's operation


@dataclass
class _Waiting:
    """A group of values that are read together, while it grows."""

    group: int
    values: int = 0
    bytes: int = 0


@dataclass
class _Plan:
    """All rows in graph order, and the buffers that hold them."""

    moved: dict[torch.device, torch.device]
    items: list[_Observed] = field(default_factory=list)
    buffers: dict[str, tuple[torch.device, int]] = field(default_factory=dict)  # name -> device, rows
    aliases: Aliases = field(default_factory=Aliases)
    groups: int = 0
    waiting: dict[str, _Waiting] = field(default_factory=dict)  # buffer -> the group that is open
    changed: set[Node] = field(default_factory=set)  # weights that the graph writes to

    def visit(self, node: Node) -> None:
        """Add the rows of the next node of the graph."""
        self.aliases.visit(node)
        if node.op not in ("call_function", "call_method", "call_module"):
            return
        targets = written(node)
        if targets or node.op == "call_module":  # what waits must be read before it is changed
            self.waiting.clear()
        returns = nodes.makes_values(node) and node.target is not operator.setitem
        if returns:
            self._observe(node, node, node.name)
        elif not targets and nodes.tensor_val(node) is not None and self.aliases.writer(node) != node.name:
            row = describe(node, node.name, node, of=self.aliases.writer(node))
            self.items.append(_Observed(node, node, row, self._group("", node)))
        for target in targets:
            whole = self.aliases.root(target)
            if whole.op == "get_attr":
                self.changed.add(whole)
            if not returns_written(node):
                self._observe(node, target, f"{target.name}@{node.name}")
            if _is_part(target, whole):
                self._observe(node, whole, f"{whole.name}@{node.name}")

    def _observe(self, after: Node, value: Node, name: str) -> None:
        device = _device(value, self.moved)
        known = (buffer for buffer, (place, _) in self.buffers.items() if place == device)
        buffer = next(known, _STATS.format(len(self.buffers)))
        index = self.buffers.get(buffer, (device, 0))[1]
        self.buffers[buffer] = (device, index + 1)
        row = describe(after, name, value, buffer=buffer, index=index)
        self.items.append(_Observed(after, value, row, self._group(buffer if _waits(device) else "", value)))
        self.aliases.wrote(value, name)

    def _group(self, buffer: str, value: Node) -> int:
        """Return the group in which a value is read: one of its own, or with small ones of the same buffer."""
        size = _bytes(value)
        if not buffer or size is None or size > _SMALL:
            self.groups += 1
            return self.groups
        waiting = self.waiting.get(buffer)
        if waiting is None or waiting.values == _SEVERAL or waiting.bytes + size > _HELD:
            self.groups += 1
            waiting = self.waiting[buffer] = _Waiting(self.groups)
        waiting.values += 1
        waiting.bytes += size
        return waiting.group


def _bytes(value: Node) -> int | None:
    """Return how much memory a value takes; None where its size is not known beforehand."""
    tensor = nodes.tensor_val(value)
    if tensor is None or not all(isinstance(size, int) for size in tensor.shape):
        return None
    return tensor.numel() * tensor.element_size()


def _is_part(target: Node, whole: Node) -> bool:
    """Whether `target` is a part of a storage that this graph made: inputs and weights are not read again whole."""
    if whole.op in ("placeholder", "get_attr"):
        return False
    part, everything = nodes.tensor_val(target), nodes.tensor_val(whole)
    return part is not None and everything is not None and str(part.numel()) != str(everything.numel())


def _moved(gm: GraphModule, stream: Stream | None) -> dict[torch.device, torch.device]:
    """Map the device in the metadata to where the module really is, for a graph that was moved as a whole."""
    noted = {value.device for node in gm.graph.nodes if (value := nodes.tensor_val(node)) is not None}
    if stream is not None:
        return dict.fromkeys(noted, stream.device)
    real = {tensor.device for tensor in (*gm.parameters(), *gm.buffers())}
    if len(noted) == 1 and len(real) == 1:
        return {noted.pop(): real.pop()}
    return {}


def _device(value: Node, moved: dict[torch.device, torch.device]) -> torch.device:
    tensor = nodes.tensor_val(value)
    if tensor is None:
        return next(iter(moved.values()), torch.device("cpu"))
    return moved.get(tensor.device, tensor.device)


def _waits(device: torch.device) -> bool:
    return device.type in _WAITING


def _insert_taps(gm: GraphModule, plan: _Plan, first: Node, checksum: bool) -> None:
    stats = {}
    for name, (device, rows) in plan.buffers.items():
        stats[name] = _add_buffer(gm, name, columns.new_stats(rows, device, checksum), first)
    groups: dict[int, list[_Observed]] = {}
    for item in reversed(plan.items):  # by the last of each, so that several rows of one operation keep their order
        if item.row.buffer:
            groups.setdefault(item.group, []).append(item)
    for items in groups.values():
        after, value, row, _ = items[0]
        if len(items) > 1:
            values, indices = zip(*((item.value, item.row.index) for item in reversed(items)), strict=True)
            _insert_after(after, operators.TAP_SEVERAL, (list(values), stats[row.buffer], list(indices)))
        else:
            target = operators.TAP if row.shape is not None else operators.tap_if_tensor
            _insert_after(after, target, (value, stats[row.buffer], row.index))


def _insert_keeps(
    gm: GraphModule, kept: dict[str, Node], first: Node, moved: dict[torch.device, torch.device], sizes: Sizes
) -> dict[Node, str]:
    """Copy kept values into buffers; returns the buffer of each."""
    names: dict[Node, str] = {}
    for name, node in kept.items():
        if node not in names:
            names[node] = _KEPT.format(len(names))
            buffer = _add_buffer(gm, names[node], _room(name, node, _device(node, moved), sizes), first)
            _insert_after(node, operators.KEEP, (node, buffer))
    return names


def _room(name: str, node: Node, device: torch.device, sizes: Sizes) -> torch.Tensor:
    """Make an uninitialised tensor like the one the node returns, dense."""
    value = nodes.tensor_val(node)
    if value is None:
        raise InputError(f"cannot keep {name!r}: the graph does not tell its shape (no meta['val'] on {node.name})")
    shape = [size_of(dimension(d), sizes) for d in value.shape]
    stride = [size_of(dimension(d), sizes) for d in value.stride()]
    if None in shape or None in stride:
        raise InputError(
            f"cannot keep {name!r}: its shape {tuple(value.shape)} depends on data, not on the shapes of the inputs. "
            "Keep a value before or after it"
        )
    like = torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")  # type: ignore[arg-type]
    with torch.inference_mode(False):
        return torch.empty_like(like, device=device)


def _add_buffer(gm: GraphModule, name: str, tensor: torch.Tensor, first: Node) -> Node:
    gm.register_buffer(name, tensor, persistent=False)
    with gm.graph.inserting_before(first):
        node = gm.graph.get_attr(name)
    mode = getattr(nodes.tensor_val(first), "fake_mode", None)
    node.meta["val"] = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
    return node


def _insert_after(node: Node, target: object, args: tuple[object, ...]) -> None:
    with node.graph.inserting_after(node):
        tap = node.graph.call_function(target, args)  # type: ignore[arg-type]
    tap.meta.update({key: node.meta[key] for key in _INHERITED if key in node.meta})
    tap.meta["val"] = None

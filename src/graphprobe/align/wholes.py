"""Slices are cut out of a node, and put together into the whole that its users read: what alignment inserts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.forms import Slice
from graphprobe.program import Program


class Behind:
    """Writes nodes into a program one behind the other, under the label and with the metadata of `big`."""

    def __init__(self, program: Program, big: Node, last: Node) -> None:
        self.program, self.big, self._at = program, big, last

    def call(self, target: Any, *args: Any, shape: tuple[int, ...]) -> Node:
        """Insert a call whose result has that shape."""
        graph = self.program.gm.graph
        with graph.inserting_after(self._at):
            made = graph.call_function(target, args)
        made.meta = {k: v for k, v in self.big.meta.items() if k not in ("custom", "val")} | {nodes.INSERTED: True}
        value = nodes.tensor_val(self.big)
        if value is not None:
            made.meta["val"] = value.new_empty(shape)
        return self._stands(made)

    def constant(self, value: torch.Tensor) -> Node:
        """Insert a constant."""
        gm = self.program.gm
        name = f"_graphprobe_{len(dict(gm.named_buffers()))}_{self.big.name}"
        gm.register_buffer(name, value, persistent=False)
        with gm.graph.inserting_after(self._at):
            made = gm.graph.get_attr(name)
        made.meta["val"] = value.to("meta")
        return self._stands(made)

    def _stands(self, made: Node) -> Node:
        self.program.labels[made] = self.program.label(self.big)
        self._at = made
        return made


def insert_whole(
    program: Program,
    big: Node,
    cuts: list[Slice],
    held: torch.Tensor,
    last: Node,
    old: Sequence[tuple[Slice, Node]],
    in_turns: bool,
) -> tuple[list[Node], Node]:
    """Insert slices behind a node and the whole behind them; all its users read the whole. Returns both.

    `old` are slices that were inserted before, and `last` is the whole that was made of them, or else `big`.
    """
    users, at, shape = list(last.users), Behind(program, big, last), tuple(held.shape)
    every = [*(cut for cut, _ in old), *cuts]
    indices = [[at.constant(torch.tensor(f.index, device=held.device)) for _, f in cut.dims] for cut in every]
    made = [_taken(at, shape, cut, index) for cut, index in zip(cuts, indices[len(old) :], strict=True)]
    for node in made:
        node.meta[nodes.PART] = len(every) > 1
    for _, node in old:
        node.meta[nodes.PART] = True
    if are_parts(every):
        whole = _joined(at, held, every, [*(n for _, n in old), *made])
    else:
        whole = big if in_turns and _lacks(every, shape) else _rest(at, held.detach(), every)
        for cut, index, part in zip(every, indices, [*(n for _, n in old), *made], strict=True):
            whole = _put(at, whole, shape, cut, index, part)
    program.take_over(last, whole, users)
    return made, whole


def _taken(at: Behind, shape: tuple[int, ...], cut: Slice, index: list[Node]) -> Node:
    """Take a slice, one dimension after the other."""
    node, sizes = at.big, list(shape)
    for (dim, form), i in zip(cut.dims, index, strict=True):
        sizes[dim] = len(form.index)
        node = at.call(torch.ops.aten.index_select.default, node, dim, i, shape=tuple(sizes))
        if form.left is not None:
            node = at.call(torch.ops.aten.squeeze.dim, node, dim, shape=form.left)
    return node


def _lacks(cuts: list[Slice], shape: Sequence[int]) -> bool:
    """Whether slices along one dimension leave out some of it. Where rows see columns, the rest is masked."""
    covered = {i for cut in cuts for _, form in cut.dims for i in form.index}
    return all(len(cut.dims) == 1 for cut in cuts) and len(covered) < shape[cuts[0].dims[0][0]]


def _rest(at: Behind, held: torch.Tensor, cuts: list[Slice]) -> Node:
    """Insert what the value held. Of what is stacked, one of which nothing is claimed stays what is computed."""
    stacked = {(dim, form.index[0]) for cut in cuts for dim, form in cut.dims[1:] if form.left is not None}
    dims, shape = {dim for dim, _ in stacked}, tuple(held.shape)
    if len(dims) != 1:
        return at.constant(held.clone())
    (dim,), aten = dims, torch.ops.aten
    sizes = (*shape[:dim], 1, *shape[dim + 1 :])

    def constant(value: torch.Tensor) -> Node:
        made = at.constant(value.clone())
        made.meta[nodes.INSERTED] = True  # all that is computed of it is claimed: it brings no rounding in
        return made

    if len(stacked) == shape[dim]:
        return constant(held)
    pieces = [
        constant(held.narrow(dim, i, 1))
        if (dim, i) in stacked
        else at.call(aten.slice.Tensor, at.big, dim, i, i + 1, shape=sizes)
        for i in range(shape[dim])
    ]
    return at.call(aten.cat.default, pieces, dim, shape=shape)


def are_parts(cuts: list[Slice]) -> bool:
    """Whether the slices are parts of one dimension that the other side computes one by one."""
    return all(len(cut.dims) == 1 and cut.dims[0][1].part for cut in cuts)


def _joined(at: Behind, held: torch.Tensor, cuts: list[Slice], parts: list[Node]) -> Node:
    """Put a whole together from its parts; what is between them is taken from the whole itself."""
    aten, dim, shape = torch.ops.aten, cuts[0].dims[0][0], tuple(held.shape)
    index = [i for cut in cuts for i in cut.dims[0][1].index]
    if any(not form.is_run() for cut in cuts for _, form in cut.dims) and len(index) == shape[dim]:
        order = at.constant(torch.tensor(index, device=held.device).argsort())
        both = at.call(aten.cat.default, parts, dim, shape=shape)
        return at.call(aten.index_select.default, both, dim, order, shape=shape)
    pieces, start = [], 0

    def own(stop: int) -> None:
        if stop > start:
            sizes = (*shape[:dim], stop - start, *shape[dim + 1 :])
            pieces.append(at.call(aten.slice.Tensor, at.big, dim, start, stop, shape=sizes))

    for cut, part in sorted(zip(cuts, parts, strict=True), key=lambda pair: pair[0].dims[0][1].index):
        form = cut.dims[0][1]
        own(form.index[0])
        start = form.index[-1] + 1
        whole = (*shape[:dim], start - form.index[0], *shape[dim + 1 :])
        pieces.append(part if form.left is None else at.call(aten.unsqueeze.default, part, dim, shape=whole))
    own(shape[dim])
    return at.call(aten.cat.default, pieces, dim, shape=shape)


def _put(at: Behind, whole: Node, shape: tuple[int, ...], cut: Slice, index: list[Node], part: Node) -> Node:
    """Put a slice back in its place, the outer dimension last."""
    aten = torch.ops.aten
    (dim, form), *inner = cut.dims
    if inner:
        sizes = list(shape)
        sizes[dim] = len(form.index)
        rest = at.call(aten.index_select.default, whole, dim, index[0], shape=tuple(sizes))
        part = _put(at, rest, tuple(sizes), Slice(tuple(inner)), index[1:], part)
    elif form.left is not None:
        part = at.call(aten.unsqueeze.default, part, dim, shape=(*form.left[:dim], 1, *form.left[dim:]))
    return at.call(aten.index_copy.default, whole, dim, index[0], part, shape=shape)

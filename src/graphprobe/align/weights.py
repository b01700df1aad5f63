"""Weights by content: which weight of `after` is which of `before`, whatever it is called, and which are joined.

A weight is named by some of its elements, rounded as bfloat16 would and read in both orientations, so that a weight
that was cast or transposed keeps its name. A weight whose content is nowhere in the other program goes by its own name,
or by the blocks of rows that it was put together from (fused QKV, gate and up). Where the weights of all layers are
stacked in one tensor, what is cut out of it for one layer is a weight, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.ordered import Ordered, reorder
from graphprobe.align.steps import step_of
from graphprobe.execute import call
from graphprobe.program import Program, fetch

SAMPLES = 256
_ROW = 16  # elements of a row that name it
_GOLDEN = 0.6180339887498949

Name = tuple[Any, ...]
Content = tuple[Name, bool]  # what is in a weight; whether that is said of its other orientation


@dataclass
class Leaves:
    """How the weights of one program are called in both: (name, whether it is read transposed), and what is joined.

    They are listed by key: the target of a weight, or what `parts` says of a node that cuts one out of a stack.
    """

    names: dict[str, Content] = field(default_factory=dict)
    blocks: dict[str, list[Block]] = field(default_factory=dict)
    parts: dict[Node, str] = field(default_factory=dict)  # what is cut out of a stack and is known by name or blocks
    cut: set[str] = field(default_factory=set)  # the keys of all that is cut out of a stack
    orders: dict[str, Ordered] = field(default_factory=dict)  # what holds the other side's weights in another order

    def key(self, node: Node) -> str | None:
        """Return the name under which a node's weight is listed, None where it is no weight."""
        return str(node.target) if node.op == "get_attr" else self.parts.get(node)


Held = dict[str, torch.Tensor]  # the weights of one program, by key


def leaves(before: Program, after: Program, reordered: bool = False) -> tuple[Leaves, Leaves]:
    """Name the weights of both programs so that equal ones have equal names; find those that are `reordered`, if asked.

    What is computed with the latter is told only where the graphs may be run.
    """
    left, right = Leaves(), Leaves()
    held = (_held(before), _held(after))
    contents = [{key: _content(value) for key, value in mine.items()} for mine in held]
    cut = _cut(before, held[0], contents), _cut(after, held[1], contents[::-1])
    for values, known in zip(held, contents, strict=True):
        known.update({key: _content(value) for key, value in values.items() if key not in known})
    met = [{content for content, _ in known.values() if content} for known in contents]
    blank = {_plain(t) for mine in contents for t, (content, _) in mine.items() if not content}
    lone: list[list[str]] = [[], []]
    for column, (found, other, mine) in enumerate(((left, met[1], contents[0]), (right, met[0], contents[1]))):
        for target, (content, turned) in mine.items():
            if content in other:
                found.names[target] = (("content", *content), turned)
            else:
                known_by_name = _plain(target) in blank
                name = ("name", _plain(target)) if known_by_name else ("name", target, *content[:1])
                found.names[target] = (name, False)
                lone[column].append(target)
    _name_unknown(before, after, left, right, contents)
    _join(held[0], left, held[1], lone[0])
    _join(held[1], right, held[0], lone[1])
    if reordered:
        reorder(held, (left, right), lone)
    for named, parts in zip((left, right), cut, strict=True):
        named.cut = set(parts.values())
        met_there = {k for k, (name, _) in named.names.items() if name[0] in ("content", "ordered")}
        named.parts = {n: k for n, k in parts.items() if k in met_there or k in named.blocks}
    return left, right


def _plain(target: str) -> str:
    """Return a weight's name as a text dump writes it."""
    return target.replace(".", "_")


def _name_unknown(
    before: Program, after: Program, left: Leaves, right: Leaves, contents: list[dict[str, Content]]
) -> None:
    """Where weights have neither content nor a name in common, their shape is all there is: one is like another."""
    for program, found, other, mine in ((before, left, right, contents[0]), (after, right, left, contents[1])):
        shapes = {str(n.target): nodes.shape(n) for n in program.live if n.op == "get_attr"}
        theirs = {_plain(target) for target in other.names}
        for target, (content, _) in mine.items():
            if not content and _plain(target) not in theirs:
                found.names[target] = (("unknown", shapes[target]), False)


def _held(program: Program) -> Held:
    """Return the weights of a program by target; what is no tensor is an empty one."""
    out: Held = {}
    for node in program.live:
        target = str(node.target)
        if node.op == "get_attr" and target not in out:
            value = fetch(program.gm, target)
            plain = (
                isinstance(value, torch.Tensor) and value.layout is torch.strided
            )  # a sparse one has no bytes to sample
            out[target] = value.detach() if plain else torch.empty(0)
    return out


def _cut(program: Program, held: Held, contents: Sequence[dict[str, Content]]) -> dict[Node, str]:
    """List what is cut out of weights that the other side does not hold as a whole, and add it to what is held.

    `contents` are those of this side and of the other.
    """
    whole = {content for content, _ in contents[1].values()}
    alone = {key for key, (content, _) in contents[0].items() if content and content not in whole}
    found: dict[Node, str] = {}
    for node in program.live:
        step = step_of(node) if node.op == "call_function" else None
        if not step or step[0] != "part":
            continue
        source = node.all_input_nodes[0]
        if node.target is operator.getitem:  # of a split
            source = source.all_input_nodes[0]
        key = str(source.target) if source.op == "get_attr" else found.get(source)
        stack = held.get(key or "")
        if stack is None or stack.dim() != len(step[1]) or (source.op == "get_attr" and key not in alone):
            continue
        _, _, dim, start, stop, stride = step
        mine = stack.movedim(dim, 0)[start:stop:stride].movedim(0, dim)
        shape = nodes.shape(node) or ()
        if all(isinstance(d, int) for d in shape) and mine.numel() == math.prod(int(d) for d in shape):
            found[node] = f"{key} {node.name}"  # no target holds a blank
            held[found[node]] = mine.reshape([int(d) for d in shape])
    return found


def _content(value: torch.Tensor) -> tuple[Name, bool]:
    shape = tuple(int(d) for d in value.shape)
    if value.device.type == "meta" or value.numel() == 0 or value.dtype.is_complex:
        return (), False
    straight = _digest(_sampled(value))
    if len(shape) != 2:
        return (shape, straight), False
    other = _digest(_sampled(value.t()))
    turned = (shape[::-1], other) < (shape, straight)
    return ((shape[::-1], other) if turned else (shape, straight)), turned


def _sampled(value: torch.Tensor) -> torch.Tensor:
    count = value.numel()
    flat = value.reshape(-1) if value.is_contiguous() or count <= SAMPLES else None
    if count <= SAMPLES:
        return value.reshape(-1)
    where = ((torch.arange(SAMPLES, dtype=torch.float64) * _GOLDEN) % 1.0 * count).long().to(value.device)
    if flat is not None:
        return flat[where]
    index = []
    for size in reversed(value.shape):
        index.append(where % size)
        where = where // size
    return value[tuple(reversed(index))]


def _digest(values: torch.Tensor) -> str:
    if values.dtype.is_floating_point:
        values = values.to(torch.bfloat16)
    raw = values.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(bytes(raw.cpu().tolist()), digest_size=12).hexdigest()


# --- constants computed ahead -----------------------------------------------------------------------------------

_MOST = 1 << 24  # elements of a constant that is computed to be compared


def folded(before: Program, after: Program, lone: set[str]) -> dict[str, Node]:
    """Find the nodes of before that need no input and hold, in flat order, what a weight of after holds."""
    wanted: dict[Name, str] = {}
    for target in lone:
        value = fetch(after.gm, target)
        plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type != "meta"
        if plain and value.numel() > 1:
            wanted[_flat(value.detach())] = target
    found: dict[str, Node] = {}
    env: dict[Node, Any] = {}
    with torch.no_grad():
        for node in before.live if wanted else ():
            if node.op == "get_attr":
                held = before.attribute(node)
                if not isinstance(held, torch.Tensor) or held.device.type != "meta":
                    env[node] = held
            elif (
                node.op == "call_function" and node not in before.seeds and all(n in env for n in node.all_input_nodes)
            ):
                value = nodes.tensor_val(node)
                if value is not None and all(isinstance(d, int) for d in value.shape) and value.numel() <= _MOST:
                    with contextlib.suppress(Exception):  # what cannot be run here is no constant computed ahead
                        env[node] = call(before, node, env)
                    made = env.get(node)
                    same = (
                        wanted.get(_flat(made))
                        if isinstance(made, torch.Tensor) and made.layout is torch.strided
                        else None
                    )
                    if same is not None and nodes.makes_values(node):
                        found[same] = node
    return found


def _flat(value: torch.Tensor) -> Name:
    return value.numel(), _digest(_sampled(value.contiguous()))


# --- blocks of rows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` of a joined weight (columns, if `axis` is 1) are the weight `target` of the other side."""

    start: int
    stop: int
    target: str
    turned: bool  # its rows are the columns of that weight
    axis: int
    shape: tuple[int, ...]  # of that weight


@dataclass(frozen=True)
class _Rows:
    target: str
    turned: bool
    rows: list[bytes]
    shape: tuple[int, ...]


def _join(held: Held, found: Leaves, others: Held, lone: list[str]) -> None:
    """Find the weights of the other program that lie, row for row, in a weight that is alone."""
    joined = {t: v for t in lone if (v := _matrix(held[t])) is not None}
    if not joined:
        return
    starts: dict[tuple[Any, ...], list[_Rows]] = {}
    for target, whole in others.items():
        value = _matrix(whole)
        for turned in (False, True) if value is not None and value.dim() == 2 else (False,):
            if value is not None:
                rows = _rows(value.t() if turned else value)
                width = (value.shape[0] if turned else value.shape[1]) if value.dim() == 2 else 0
                starts.setdefault((width, rows[0]), []).append(_Rows(target, turned, rows, tuple(value.shape)))
    for target, value in joined.items():
        for axis in range(value.dim()):
            work = value.t() if axis else value
            blocks = _tiles(_rows(work), work.shape[1] if value.dim() == 2 else 0, starts, axis)
            if len(blocks) > 1:
                found.blocks[target] = blocks
                break


def _matrix(value: torch.Tensor) -> torch.Tensor | None:
    if value.dim() not in (1, 2) or value.device.type == "meta":
        return None
    return value if value.dtype.is_floating_point and value.shape[0] > 1 and value.numel() > 1 else None


def _tiles(rows: list[bytes], width: int, starts: dict[tuple[Any, ...], list[_Rows]], axis: int) -> list[Block]:
    blocks: list[Block] = []
    at = 0
    while at < len(rows):
        fitting = [c for c in starts.get((width, rows[at]), ()) if rows[at : at + len(c.rows)] == c.rows]
        if not fitting:
            return []
        best = max(fitting, key=lambda c: len(c.rows))
        blocks.append(Block(at, at + len(best.rows), best.target, best.turned, axis, best.shape))
        at += len(best.rows)
    return blocks


def _rows(value: torch.Tensor) -> list[bytes]:
    """Name every row by some of its elements; an element of a vector is a row."""
    work = value.reshape(value.shape[0], -1) if value.dim() == 1 else value
    step = max(1, work.shape[1] // _ROW)
    picked = work[:, ::step][:, :_ROW].to(torch.bfloat16).contiguous()
    raw = picked.view(torch.uint8).cpu()
    width, data = raw.shape[1], bytes(raw.reshape(-1).tolist())
    return [data[i : i + width] for i in range(0, len(data), width)]

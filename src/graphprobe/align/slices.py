"""Evidence 5, values of which one side holds more: padded prompts, one row of a batch, a prompt taken in chunks.

The *big* side holds what the other holds as a slice. A claim that carries a slice is made plain in the graph: behind
the big node the slice is inserted (that is what is claimed), and behind that the whole again, for all that consumes it:
the slices in their places, and in all other places what the node held when its own side ran. So lanes and judge know
nothing of slices, the free lane computes what the graph always computed, and a leak from the rest still shows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Claim
from graphprobe.align.forms import Form, Slice, by_inputs, forms, slices_of, windows
from graphprobe.align.matching import Matching, Sliced, is_part
from graphprobe.align.neighbours import nearest
from graphprobe.align.sketches import SAMPLES, sample
from graphprobe.align.values import AGREE, AGREE_FINE, is_chain
from graphprobe.execute import run_program
from graphprobe.program import Program

PART = "graphprobe_part"  # marks one of several slices of a node
_SMALLEST = 8  # elements of a slice that can tell anything


# --- claims -----------------------------------------------------------------------------------------------------


def claim(matching: Matching) -> None:
    """Claim values that are slices of values of the other side. Both programs must be copies."""
    known = forms(matching)
    for side in ("after", "before"):
        mine = [f for f in known if f.side == side]
        if mine:
            _claim_side(matching, side, mine)


def _claim_side(matching: Matching, side: str, known: list[Form]) -> None:
    other = "before" if side == "after" else "after"
    taken = matching.alignment.of(other)
    groups: dict[Any, tuple[list[Node], list[tuple[Node, Slice]]]] = defaultdict(lambda: ([], []))
    small = {n: s for n, s in matching.sketches(other).items() if not taken.get(n)}
    wanted = {nodes.shape(n) for n in small}
    open_ = matching.unclaimed_before() if side == "before" else matching.unclaimed_after()
    large, little = ([fixed(n) for n in group if is_fixed(n)] for group in (open_, small))
    known = [*known, *windows(known, large, little)]
    items = _sketched(matching, side, known, wanted)
    for node, sketch in small.items():
        groups[nodes.shape(node), sketch.numel()][0].append(node)
    for (node, cut), sketch in items.items():
        groups[cut.shape(fixed(node)), sketch.numel()][1].append((node, cut))
    pairs: dict[Node, list[tuple[Node, Slice]]] = defaultdict(list)
    for smalls, bigs in groups.values():
        if smalls and bigs:
            for node, big, cut in _pairs(matching, other, smalls, bigs, small, items):
                pairs[big].append((node, cut))
    # one part of many tells nothing of the others
    lone = {big for big, found in pairs.items() if len(found) == 1 and _are_parts([cut for _, cut in found])}
    insert(matching, side, {big: found for big, found in pairs.items() if big not in lone})


def fixed(node: Node) -> tuple[int, ...]:
    """Return the shape of a node whose shape is known in numbers."""
    return tuple(int(d) for d in nodes.shape(node) or ())


def _sketched(
    matching: Matching, side: str, known: list[Form], shapes: set[Any]
) -> dict[tuple[Node, Slice], torch.Tensor]:
    """Run the big side once and sketch every slice of every unclaimed value that has one of these shapes."""
    program: Program = getattr(matching, side)
    possible: dict[tuple[int, ...], list[Slice]] = {}  # by shape

    def cuts(node: Node) -> list[Slice]:
        whole = fixed(node)
        if whole not in possible:
            found = slices_of(whole, known, shapes)
            possible[whole] = [c for c in found if math.prod(c.shape(whole)) >= _SMALLEST]
        return [c for c in possible[whole] if matching.is_open(node, c)]

    wanted = {
        n: found
        for n in program.live
        if matching.may_be_cut(side, n) and (nodes.makes_values(n) or is_part(n)) and is_fixed(n) and (found := cuts(n))
    }

    def observe(node: Node, value: Any) -> torch.Tensor | None:
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != fixed(node):
            return None
        found = [sample(c.of(value)) for c in wanted[node]]
        return torch.cat([s for s in found if s is not None])

    out: dict[tuple[Node, Slice], torch.Tensor] = {}
    for node, joined in matching.observed(side, list(wanted), observe).items():
        at = 0
        for cut in wanted[node]:
            piece = joined[at : at + min(SAMPLES, math.prod(cut.shape(fixed(node))))]
            at += len(piece)
            if len(set(piece.tolist())) > 4:
                out[node, cut] = piece
    return out


def is_fixed(node: Node) -> bool:
    """Whether the node's shape is known, in numbers."""
    return all(isinstance(d, int) for d in nodes.shape(node) or ("?",))


def _pairs(
    matching: Matching,
    other: str,
    smalls: list[Node],
    bigs: list[tuple[Node, Slice]],
    small: dict[Node, torch.Tensor],
    items: dict[tuple[Node, Slice], torch.Tensor],
) -> list[tuple[Node, Node, Slice]]:
    """Pair small values with slices: what is nearest both ways; what several hold, in order where that can be told."""
    agree = AGREE if matching.is_coarse() else AGREE_FINE
    near = nearest(torch.stack([small[n] for n in smalls]), torch.stack([items[i] for i in bigs]), agree)
    numbers = matching.numbers_before() if other == "before" else matching.numbers_after()
    order: dict[Node, int] = getattr(matching, other).order
    alike: dict[tuple[Node, ...], list[tuple[Node, Slice]]] = defaultdict(list)
    for row, found in near.of_y.items():
        if all(near.is_mutual(i, d) for i, d in found):
            alike[tuple(smalls[i] for i, _ in sorted(found))].append(bigs[row])
    out = []
    for same, cuts in alike.items():
        ambiguous = len({node for node, _ in cuts}) < len(cuts)  # constant along the dimension that is cut
        if ambiguous:
            continue
        ordered = sorted(same, key=order.__getitem__)
        if len(same) > len(cuts) and is_chain(ordered):  # handed on unchanged: the last of the chain
            ordered = ordered[-len(cuts) :]
        elif len(same) > 1 and len({numbers[n] for n in same}) > 1 and len(same) != len(cuts):
            continue
        out += [(n, big, cut) for n, (big, cut) in zip(ordered, cuts, strict=False)]
    return out


# --- making claims plain ------------------------------------------------------------------------------------------


def insert(matching: Matching, side: str, pairs: dict[Node, list[tuple[Node, Slice]]], evidence: str = "slice") -> None:
    """Insert the slices of every big node and claim them.

    Of the rest the other side knows nothing if it was given less: then it is what the big side held there. Where the
    other side takes all in turns, the rest is computed there, too, and the big side goes on with its own.
    """
    chosen = {big: _disjoint(found) for big, found in pairs.items()}
    program: Program = getattr(matching, side)
    held = run_program(program, matching.bound or {}, list(chosen))
    in_turns = all(f.side != side for f in by_inputs(matching))
    for big, parts in chosen.items():
        before = matching.sliced.get(big)
        old: tuple[tuple[Slice, Node], ...] = tuple(zip(before.cuts, before.made, strict=True)) if before else ()
        cuts = [cut for _, cut in parts]
        made, whole = _insert(program, big, cuts, held[big], before.whole if before else big, old, in_turns)
        matching.sliced[big] = Sliced((*(c for c, _ in old), *cuts), (*(n for _, n in old), *made), whole)
        matching.wholes[whole] = made[0] if len(made) == 1 and side == "after" and not old else big
        for (small, cut), node in zip(parts, made, strict=True):
            x, y = (small, node) if side == "after" else (node, small)
            claim = Claim(x, y, evidence, certain=False, view=str(cut))
            matching.alignment.add(claim)
            # the whole is taken, too
            matching.alignment.of(side)[big].append(claim)
    program.refresh()
    matching.changed()


def _disjoint(found: list[tuple[Node, Slice]]) -> list[tuple[Node, Slice]]:
    """Keep slices of one node along the same dimensions that do not overlap, the most there are."""
    by_dims: dict[Any, list[tuple[Node, Slice]]] = defaultdict(list)
    for small, cut in found:
        by_dims[tuple((d, f.part, f.left is None) for d, f in cut.dims)].append((small, cut))
    best: list[tuple[Node, Slice]] = []
    for members in by_dims.values():
        kept: list[tuple[Node, Slice]] = []
        covered: set[int] = set()
        for small, cut in sorted(members, key=lambda m: (len(m[1].dims[0][1].index), m[1].dims[0][1].index)):
            index = set(cut.dims[0][1].index)
            if not index & covered:
                covered |= index
                kept.append((small, cut))
        best = max(best, kept, key=len)
    return best


def _insert(
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
    aten, users, graph = torch.ops.aten, list(last.users), program.gm.graph
    made: list[Node] = []
    at = last

    def call(target: Any, *args: Any, shape: tuple[int, ...]) -> Node:
        nonlocal at
        with graph.inserting_after(at):
            at = graph.call_function(target, args)
        at.meta = {k: v for k, v in big.meta.items() if k not in ("custom", "val")} | {nodes.INSERTED: True}
        value = nodes.tensor_val(big)
        if value is not None:
            at.meta["val"] = value.new_empty(shape)
        program.labels[at] = program.label(big)
        return at

    def constant(value: torch.Tensor) -> Node:
        nonlocal at
        name = f"_graphprobe_{len(dict(program.gm.named_buffers()))}_{big.name}"
        program.gm.register_buffer(name, value, persistent=False)
        with graph.inserting_after(at):
            at = graph.get_attr(name)
        at.meta["val"] = value.to("meta")
        program.labels[at] = program.label(big)
        return at

    def taken(node: Node, cut: Slice, index: list[Node]) -> Node:
        sizes = list(shape)
        for (dim, form), i in zip(cut.dims, index, strict=True):
            sizes[dim] = len(form.index)
            node = call(aten.index_select.default, node, dim, i, shape=tuple(sizes))
            if form.left is not None:
                node = call(aten.squeeze.dim, node, dim, shape=form.left)
        node.meta[PART] = len(cuts) > 1
        return node

    shape = tuple(held.shape)
    every = [*(cut for cut, _ in old), *cuts]
    indices = [[constant(torch.tensor(f.index, device=held.device)) for _, f in cut.dims] for cut in every]
    made = [taken(big, cut, index) for cut, index in zip(cuts, indices[len(old) :], strict=True)]
    if _are_parts(every):
        whole = _joined(call, big, shape, cuts, made)
    else:
        whole = big if in_turns and _lacks(every, shape) else constant(held.detach().clone())
        for cut, index, part in zip(every, indices, [*(n for _, n in old), *made], strict=True):
            whole = _put(call, whole, shape, cut, index, part)
    for user in users:
        user.replace_input_with(last, whole)
    for path, node in program.outputs.items():
        if node is last:
            program.outputs[path] = whole
    return made, whole


def _lacks(cuts: list[Slice], shape: Sequence[int]) -> bool:
    """Whether slices along one dimension leave out some of it. Where rows see columns, the rest is masked."""
    covered = {i for cut in cuts for _, form in cut.dims for i in form.index}
    return all(len(cut.dims) == 1 for cut in cuts) and len(covered) < shape[cuts[0].dims[0][0]]


def _are_parts(cuts: list[Slice]) -> bool:
    """Whether the slices are parts of one dimension that the other side computes one by one."""
    return all(len(cut.dims) == 1 and cut.dims[0][1].part for cut in cuts)


def _joined(call: Any, big: Node, shape: tuple[int, ...], cuts: list[Slice], parts: list[Node]) -> Node:
    """Put a whole together from its parts; what is between them is taken from the whole itself."""
    aten, dim = torch.ops.aten, cuts[0].dims[0][0]
    pieces, at = [], 0

    def own(stop: int) -> None:
        if stop > at:
            sizes = (*shape[:dim], stop - at, *shape[dim + 1 :])
            pieces.append(call(aten.slice.Tensor, big, dim, at, stop, shape=sizes))

    for cut, part in sorted(zip(cuts, parts, strict=True), key=lambda pair: pair[0].dims[0][1].index):
        form = cut.dims[0][1]
        own(form.index[0])
        at = form.index[-1] + 1
        whole = (*shape[:dim], at - form.index[0], *shape[dim + 1 :])
        pieces.append(part if form.left is None else call(aten.unsqueeze.default, part, dim, shape=whole))
    own(shape[dim])
    return call(aten.cat.default, pieces, dim, shape=shape)  # type: ignore[no-any-return]


def _put(call: Any, whole: Node, shape: tuple[int, ...], cut: Slice, index: list[Node], part: Node) -> Node:
    """Put a slice back in its place, the outer dimension last."""
    aten = torch.ops.aten
    (dim, form), *inner = cut.dims
    if inner:
        sizes = list(shape)
        sizes[dim] = len(form.index)
        rest = call(aten.index_select.default, whole, dim, index[0], shape=tuple(sizes))
        part = _put(call, rest, tuple(sizes), Slice(tuple(inner)), index[1:], part)
    return call(aten.index_copy.default, whole, dim, index[0], part, shape=shape)  # type: ignore[no-any-return]


def output(matching: Matching, x: Node, y: Node) -> tuple[Node, Node] | None:
    """Return the pair that stands for two outputs of different shape: what is claimed of them, or the only slice."""
    for one, claims in ((y, matching.alignment.of_after), (x, matching.alignment.of_before)):
        for claim in claims.get(nodes.shown(one), ()):
            if _carries_slice(claim) and claim.before in (x, claim.before) and _ends(claim, x, y):
                return claim.before, claim.after
    for side, big, small in (("after", y, x), ("before", x, y)):
        known = [f for f in forms(matching) if f.side == side]
        shape = nodes.shape(big)
        if not known or shape is None or not all(isinstance(d, int) for d in shape):
            continue
        cuts = slices_of(fixed(big), known, [nodes.shape(small)])
        if len(cuts) == 1:
            insert(matching, side, {big: [(small, cuts[0])]})
            claim = matching.alignment.claims[-1]
            return claim.before, claim.after
    return None


def _carries_slice(claim: Claim) -> bool:
    return any(nodes.INSERTED in n.meta and claim.evidence != "layout" for n in (claim.before, claim.after))


def _ends(claim: Claim, x: Node, y: Node) -> bool:
    return nodes.shown(claim.before) is nodes.shown(x) and nodes.shown(claim.after) is nodes.shown(y)

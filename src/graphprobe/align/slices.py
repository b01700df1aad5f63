"""Evidence 5, values of which one side holds more: padded prompts, one row of a batch, a prompt taken in chunks.

The *big* side holds what the other holds as a slice. A claim that carries a slice is made plain in the graph: behind
the big node the slice is inserted (that is what is claimed), and behind that the whole again, for all that consumes it:
the slices in their places, and in all other places what the node held when its own side ran. So lanes and judge know
nothing of slices, the free lane computes what the graph always computed, and a leak from the rest still shows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.claims import Claim
from graphprobe.align.forms import Form, Slice, by_inputs, forms, of_outputs, slices_of, windows
from graphprobe.align.matching import Matching, Sliced, is_part
from graphprobe.align.neighbours import nearest
from graphprobe.align.rest import Rest
from graphprobe.align.sketches import SAMPLES, sample
from graphprobe.align.values import AGREE, AGREE_FINE, is_chain
from graphprobe.align.wholes import are_parts, insert_whole
from graphprobe.execute import run_program
from graphprobe.program import Program

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
    open_ = matching.unclaimed(side)
    large, little = ([nodes.fixed(n) for n in group if nodes.is_fixed(n)] for group in (open_, small))
    known = [*known, *windows(known, large, little)]
    items = _sketched(matching, side, known, wanted)
    for node, sketch in small.items():
        groups[nodes.shape(node), sketch.numel()][0].append(node)
    for (node, cut), sketch in items.items():
        groups[cut.shape(nodes.fixed(node)), sketch.numel()][1].append((node, cut))
    pairs: dict[Node, list[tuple[Node, Slice]]] = defaultdict(list)
    for smalls, bigs in groups.values():
        if smalls and bigs:
            for node, big, cut in _pairs(matching, other, smalls, bigs, small, items):
                pairs[big].append((node, cut))
    rest = Rest(matching, side, pairs)
    # one part of many tells nothing of the others, unless it is made of one part of what the whole is made of
    lone = {big for big, found in rest.pairs.items() if _is_lone(matching, big, found) and not rest.follows(big, found)}
    chosen = {big: found for big, found in rest.pairs.items() if big not in lone}
    insert(matching, side, chosen, guessed=rest.guessed)


def _is_lone(matching: Matching, big: Node, found: list[tuple[Node, Slice]]) -> bool:
    return len(found) == 1 and big not in matching.sliced and are_parts([cut for _, cut in found])


def _sketched(
    matching: Matching, side: str, known: list[Form], shapes: set[Any]
) -> dict[tuple[Node, Slice], torch.Tensor]:
    """Run the big side once and sketch every slice of every unclaimed value that has one of these shapes."""
    program: Program = getattr(matching, side)
    possible: dict[tuple[int, ...], list[Slice]] = {}  # by shape

    def cuts(node: Node) -> list[Slice]:
        whole = nodes.fixed(node)
        if whole not in possible:
            found = slices_of(whole, known, shapes)
            possible[whole] = [c for c in found if math.prod(c.shape(whole)) >= _SMALLEST]
        return [c for c in possible[whole] if matching.is_open(node, c)]

    wanted = {
        n: found
        for n in program.live
        if matching.may_be_cut(side, n)
        and (nodes.makes_values(n) or is_part(n))
        and nodes.is_fixed(n)
        and (found := cuts(n))
    }

    def observe(node: Node, value: Any) -> torch.Tensor | None:
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != nodes.fixed(node):
            return None
        found = [sample(c.of(value)) for c in wanted[node]]
        return torch.cat([s for s in found if s is not None])

    out: dict[tuple[Node, Slice], torch.Tensor] = {}
    for node, joined in matching.observed(side, list(wanted), observe).items():
        at = 0
        for cut in wanted[node]:
            piece = joined[at : at + min(SAMPLES, math.prod(cut.shape(nodes.fixed(node))))]
            at += len(piece)
            if len(set(piece.tolist())) > 4:
                out[node, cut] = piece
    return out


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
    numbers = matching.numbers(other)
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
        elif len(cuts) == 1 and are_parts([cuts[0][1]]):  # several shards hold the same part
            out += [(n, *cuts[0]) for n in ordered[1:]]
        elif len(same) > 1 and len({numbers[n] for n in same}) > 1 and len(same) != len(cuts):
            continue
        out += [(n, big, cut) for n, (big, cut) in zip(ordered, cuts, strict=False)]
    return out


# --- making claims plain ------------------------------------------------------------------------------------------


def insert(
    matching: Matching,
    side: str,
    pairs: dict[Node, list[tuple[Node, Slice]]],
    evidence: str = "slice",
    guessed: Collection[Node] = (),
) -> None:
    """Insert the slices of every big node and claim them; what is `guessed` stands where it should.

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
        cuts = list(dict.fromkeys(cut for _, cut in parts))
        made, whole = insert_whole(program, big, cuts, held[big], before.whole if before else big, old, in_turns)
        matching.sliced[big] = Sliced((*(c for c, _ in old), *cuts), (*(n for _, n in old), *made), whole)
        matching.wholes[whole] = made[0] if len(made) == 1 and side == "after" and not old else big
        of_cut = dict(zip(cuts, made, strict=True))
        for small, cut in parts:
            x, y = (small, of_cut[cut]) if side == "after" else (of_cut[cut], small)
            if not nodes.is_fixed(small):
                of_cut[cut].meta.pop("val", None)  # of a size that no graph knows
            claim = Claim(x, y, "slot" if small in guessed else evidence, certain=False, view=str(cut))
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
        for small, cut in sorted(members, key=lambda m: (len(m[1].dims[0][1].index), m[1].dims[0][1].index)):
            same = cut.dims[0][1].part and any(cut == other for _, other in kept)  # held by several
            if same or not any(cut.meets(other) for _, other in kept):
                kept.append((small, cut))
        best = max(best, kept, key=len)
    return best


def output(matching: Matching, x: Node, y: Node) -> tuple[Node, Node] | None:
    """Return the pair that stands for two outputs of different shape: what is claimed of them, or the only slice."""
    told = of_outputs(matching)
    if not told:
        return None
    for one, claims in ((y, matching.alignment.of_after), (x, matching.alignment.of_before)):
        for claim in claims.get(nodes.shown(one), ()):
            if _carries_slice(claim) and claim.before in (x, claim.before) and _ends(claim, x, y):
                return claim.before, claim.after
    for side, big, small in (("after", y, x), ("before", x, y)):
        known = [f for f in told if f.side == side]
        shape = nodes.shape(big)
        if not known or shape is None or not all(isinstance(d, int) for d in shape):
            continue
        cuts = slices_of(nodes.fixed(big), known, [nodes.shape(small)])
        if len(cuts) == 1:
            insert(matching, side, {big: [(small, cuts[0])]})
            claim = matching.alignment.claims[-1]
            return claim.before, claim.after
    return None


def _carries_slice(claim: Claim) -> bool:
    return any(nodes.INSERTED in n.meta and claim.evidence != "layout" for n in (claim.before, claim.after))


def _ends(claim: Claim, x: Node, y: Node) -> bool:
    return nodes.shown(claim.before) is nodes.shown(x) and nodes.shown(claim.after) is nodes.shown(y)

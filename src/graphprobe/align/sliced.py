"""Evidence 4, weights, where one side holds a slice: products with the same weights of padded or chunked tokens.

Below a difference no slice agrees any more, as no value does. But what is multiplied with the same weights has the same
part to play, and the inputs say which of its tokens are the other side's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from graphprobe import nodes, provenance
from graphprobe.align import slices
from graphprobe.align.counterparts import Chain, chains
from graphprobe.align.forms import Form, Slice, of_tokens, slices_of
from graphprobe.align.matching import Matching
from graphprobe.execute import run_program
from graphprobe.program import Program

_GATHERS = {"aten::index", "aten::index_select", "aten::gather"}
_SCATTERS = {"aten::index_add", "aten::index_put", "aten::index_copy", "aten::scatter", "aten::scatter_add"}


@dataclass(frozen=True)
class Part:
    """A node whose part is played by a slice of a node of the other side."""

    small: Node
    big: Node
    cut: Slice
    side: str  # of the big one
    evidence: str


def claim(matching: Matching) -> None:
    """Claim what has the same part to play, up to a slice. Both programs must be copies."""
    found = parts(matching)
    for side in ("after", "before"):
        pairs: dict[Node, list[tuple[Node, Slice]]] = defaultdict(list)
        for part in found:
            if part.side == side:
                pairs[part.big].append((part.small, part.cut))
        if pairs:
            slices.insert(matching, side, pairs, "weight")


def parts(matching: Matching) -> list[Part]:
    """Pair nodes that do the same with the same weights to a slice, and what goes into them; each slice only once."""
    if matching.bound is None:
        return []
    known = of_tokens(matching)
    found: list[Part] = []
    of = {side: _by_weights(matching, side) for side in ("before", "after")} if known else {}
    for side, other in (("after", "before"), ("before", "after")):
        mine = [f for f in known if f.side == side]
        for place, bigs in of[side].items() if mine else ():
            for big, small, cut in _in_order(list(bigs), list(of[other].get(place, ())), mine):
                found.append(Part(small, big, cut, side, "weight"))
                into_big, into_small = bigs[big].source, of[other][place][small].source
                if into_big is not None and into_small is not None:
                    found += _sources(nodes.shown(into_big), nodes.shown(into_small), cut, side)
    return _free(matching, found)


def _by_weights(matching: Matching, side: str) -> dict[tuple[object, ...], dict[Node, Chain]]:
    """Map (operator, weights) to the nodes there, in order."""
    places: dict[tuple[object, ...], dict[Node, Chain]] = defaultdict(dict)
    shuffled = _shuffled(matching, side)
    for node, chain in chains(matching, side).items():
        if nodes.is_fixed(node) and node not in shuffled:
            places[(provenance.target_name(node), *chain.weights)][node] = chain
    return places


def _shuffled(matching: Matching, side: str) -> set[Node]:
    """Return what is computed from rows that were gathered in an order of their own: the inputs do not tell which."""
    found: dict[Node, object] = {}
    terms = matching.terms(side)
    program: Program = getattr(matching, side)
    for node in program.live:
        value, shape = nodes.tensor_val(node), nodes.shape(node)
        if value is None or not value.dtype.is_floating_point or not shape or shape[0] == 1:
            continue
        if nodes.schema_name(node) in _GATHERS:
            indices = [n for n in node.all_input_nodes[1:] if n in terms.of]
            if any(terms.root(n)[0].op == "call_function" for n in indices):
                found[node] = shape[0]
        elif nodes.schema_name(node) not in _SCATTERS and any(found.get(n) == shape[0] for n in node.all_input_nodes):
            found[node] = shape[0]
    return set(found)


def _in_order(bigs: list[Node], smalls: list[Node], known: Sequence[Form]) -> list[tuple[Node, Node, Slice]]:
    """Pair nodes with those that hold slices of them: one with one, or one with several that follow each other."""
    if len(bigs) == len(smalls):
        groups = [(big, [small]) for big, small in zip(bigs, smalls, strict=True)]
    else:
        groups = [(big, smalls) for big in bigs] if len(bigs) == 1 else []
    out = []
    for big, members in groups:
        found, at = [], -1
        for small in members:
            cuts = slices_of(nodes.fixed(big), known, [nodes.fixed(small)])
            cuts = [c for c in cuts if len(members) == 1 or (len(c.dims) == 1 and c.dims[0][1].index[0] > at)]
            if not cuts or (len(members) == 1 and len(cuts) > 1):
                break
            cut = min(cuts, key=lambda c: c.dims[0][1].index)
            at = cut.dims[0][1].index[-1]
            found.append((big, small, cut))
        if len(found) == len(members):
            out += found
    return out


def _sources(big: Node, small: Node, cut: Slice, side: str) -> list[Part]:
    """Pair what goes into two products, if it is cut in the same way."""
    if not (nodes.is_fixed(big) and nodes.is_fixed(small)):
        return []
    cuts = slices_of(nodes.fixed(big), [f for _, f in cut.dims], [nodes.fixed(small)])
    return [Part(small, big, cuts[0], side, "operand")] if len(cuts) == 1 else []


def _free(matching: Matching, found: list[Part]) -> list[Part]:
    """Keep what may still be claimed, each node once."""
    taken: dict[Node, list[Slice]] = defaultdict(list)
    out = []
    for part in found:
        theirs = matching.alignment.of("before" if part.side == "after" else "after")
        if part.small in taken or theirs.get(part.small) or part.small.op != "call_function":
            continue
        open_ = matching.may_be_cut(part.side, part.big) and matching.is_open(part.big, part.cut)
        if part.big.op != "call_function" or not open_:
            continue
        if any(part.cut.meets(cut) for cut in taken[part.big]):
            continue
        taken[part.small].append(part.cut)
        taken[part.big].append(part.cut)
        out.append(part)
    return out


def given(matching: Matching, found: Sequence[Part]) -> dict[Node, torch.Tensor]:
    """Return what nodes of `after` are given of before's values."""
    if not found:
        return {}  # where nothing is wanted, all is run
    bound = matching.bound or {}
    sources = [p.small if p.side == "after" else p.big for p in found]
    held = run_program(matching.before, bound, sources)
    whole = [p.big for p in found if p.side == "after"]
    own = run_program(matching.after, bound, whole) if whole else {}
    out: dict[Node, torch.Tensor] = {}
    for part in found:
        if part.side == "before":
            out[part.small] = part.cut.of(held[part.big])
            continue
        mine = out[part.big] if part.big in out else own[part.big]
        if isinstance(mine, torch.Tensor):
            out[part.big] = part.cut.put(mine, held[part.small])
    return out

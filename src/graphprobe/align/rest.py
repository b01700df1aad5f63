"""Evidence 4, what is left: where some parts of a value are claimed, the other parts are sought in their places.

A shard that is wrong holds no part of what the other side holds. But its siblings do, and what computes from the same
values in the same way as they do has the part to play that is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch.fx import Node

from graphprobe import nodes
from graphprobe.align.forms import Form, Slice
from graphprobe.align.matching import Matching
from graphprobe.align.wholes import are_parts

Pairs = dict[Node, list[tuple[Node, Slice]]]
Place = tuple[int, int]  # the first of a part, and how many there are


class Rest:
    """The parts of values of one side: those that are told, and in `guessed` what plays those that are left.

    Several that hold the same part are several shards that compute it, if no part is left over; else one is wrong.
    """

    def __init__(self, matching: Matching, side: str, told: Mapping[Node, list[tuple[Node, Slice]]]) -> None:
        self.matching, self.side = matching, side
        self.other = "before" if side == "after" else "after"
        self.known: dict[Node, tuple[Node, Slice]] = {}  # which small node is which part
        self.pairs: Pairs = {big: list(found) for big, found in told.items()}
        self.guessed: set[Node] = set()
        parts = self._claimed()
        spare: dict[Node, list[tuple[Node, Slice]]] = {}
        for big, found in self.pairs.items():
            if are_parts([cut for _, cut in found]):
                first = {cut: small for small, cut in reversed(found)}
                spare[big] = [(small, cut) for small, cut in found if first[cut] is not small]
                parts[big] += [(small, cut) for small, cut in found if first[cut] is small]
        self.known = {small: (big, cut) for big, found in parts.items() for small, cut in found}
        self._complete({big: found for big, found in parts.items() if are_parts([c for _, c in found])}, spare)

    def part(self, operand: Node) -> tuple[Node, Slice] | None:
        """Return the part that what an operand shows is known to be."""
        return self.known.get(operand) or self.known.get(self.root(operand))

    def root(self, operand: Node) -> Node:
        """Return what made an operand's values."""
        return self.matching.terms(self.other).root(operand)[0]

    def follows(self, big: Node, found: list[tuple[Node, Slice]]) -> bool:
        """Whether each part is made of just those parts of what the whole is made of."""
        roots = {self.matching.terms(self.side).root(n)[0] for n in big.all_input_nodes}
        return all(
            any((known := self.part(n)) and known[0] in roots and _start(known[1]) == _start(cut) for n in operands)
            for small, cut in found
            for operands in [small.all_input_nodes]
        )

    def _claimed(self) -> Pairs:
        found: Pairs = defaultdict(list)
        for big, sliced in self.matching.sliced.items():
            for cut, made in zip(sliced.cuts, sliced.made, strict=True):
                for claim in self.matching.alignment.of(self.side).get(made, ()):
                    found[big].append((claim.before if self.side == "after" else claim.after, cut))
        return found

    def _complete(self, parts: Pairs, spare: Mapping[Node, list[tuple[Node, Slice]]]) -> None:
        """Find who plays the parts that are left; what is made of them is looked at after them."""
        candidates: dict[Any, list[Node]] = defaultdict(list)
        for node in self.matching.unclaimed(self.other) if parts else ():
            if node not in self.known:
                candidates[node.target].append(node)
        order = getattr(self.matching, self.side).order
        one_way = [b for b, found in parts.items() if len({(c.dims[0][0], c.dims[0][1].left) for _, c in found}) == 1]
        for big in sorted((b for b in one_way if b in order), key=order.__getitem__):
            self._spread(big, parts[big], spare)
            found = _left_over(self, big, parts[big], candidates)
            self.known.update({small: (big, cut) for small, cut in found})
            self.guessed.update(small for small, _ in found)
            whole = not list(_gaps([cut.dims[0][1] for _, cut in (*parts[big], *found)]))
            kept = [p for p in spare.get(big, ()) if p[0] not in self.known and whole]
            self.known.update({small: (big, cut) for small, cut in kept})
            told = [p for p in self.pairs.get(big, ()) if p not in spare.get(big, ())]
            if told or found or kept:
                self.pairs[big] = [*told, *found, *kept]

    def _spread(
        self, big: Node, parts: list[tuple[Node, Slice]], spare: Mapping[Node, list[tuple[Node, Slice]]]
    ) -> None:
        """Where several hold one part, and as many others are left, each stands in the order of the graph for one."""
        places = [(cut.dims[0][1].index[0], len(cut.dims[0][1].index)) for _, cut in parts]
        gaps = list(_gaps([cut.dims[0][1] for _, cut in parts]))
        more = spare.get(big, [])
        if not gaps or len({cut for _, cut in more}) != 1 or len(more) != len(gaps):
            return
        held = more[0][1]
        at = next(i for i, (_, cut) in enumerate(parts) if cut == held)
        order = getattr(self.matching, self.other).order
        holders = sorted([parts[at][0], *(small for small, _ in more)], key=order.__getitem__)
        spread = [(n, _moved(held, p)) for n, p in zip(holders, sorted([places[at], *gaps]), strict=True)]
        if big not in self.pairs or any(cut.shape(nodes.fixed(big)) != nodes.shape(n) for n, cut in spread):
            return
        parts[at : at + 1] = spread
        self.pairs[big] = [p for p in self.pairs[big] if p[0] not in holders] + spread
        more.clear()
        self.known.update({small: (big, cut) for small, cut in spread})
        self.guessed.update(small for small, cut in spread if cut != held)


def _moved(cut: Slice, place: Place) -> Slice:
    """Return the same kind of part at another place."""
    ((dim, form),) = cut.dims
    return Slice(((dim, Form(form.side, form.big, tuple(range(place[0], sum(place))), True, form.left)),))


def _start(cut: Slice) -> float:
    """Return where a part begins, 0..1."""
    form = cut.dims[0][1]
    return form.index[0] / form.big


def _left_over(
    known: Rest, big: Node, parts: list[tuple[Node, Slice]], candidates: Mapping[Any, list[Node]]
) -> list[tuple[Node, Slice]]:
    """Return the parts of one value that nothing claims, with what has them to play."""
    forms = [cut.dims[0][1] for _, cut in parts]
    places = list(_gaps(forms))
    size, shape = forms[0].big, nodes.fixed(big)

    def cut_at(place: Place) -> Slice:
        return _moved(parts[0][1], place)

    wanted = {cut_at(place).shape(shape) for place in places}
    alike = [n for n in candidates.get(parts[0][0].target, ()) if nodes.shape(n) in wanted and n not in known.known]
    found: list[tuple[Node, Slice]] = []
    unsure: dict[int, list[Node]] = defaultdict(list)  # by how many weights they share with a sibling
    for node in alike:
        told = [t for small, _ in parts if (t := _told(known, small, node)) is not None]
        if not told:
            continue
        starts = {start for starts, _ in told for start in starts}
        if not starts:
            unsure[max(shared for _, shared in told)].append(node)
        fitting = [p for p in places if starts == {p[0] / size} and cut_at(p).shape(shape) == nodes.shape(node)]
        if fitting:
            places.remove(fitting[0])
            found.append((node, cut_at(fitting[0])))
    likely = unsure[max(unsure)] if unsure else []
    if len(likely) == len(places):
        in_order = zip(likely, map(cut_at, sorted(places)), strict=True)
        found += [(node, cut) for node, cut in in_order if cut.shape(shape) == nodes.shape(node)]
    return found


def _gaps(forms: list[Form]) -> Iterator[Place]:
    """Yield what the parts leave of a dimension, in pieces as large as they are where that comes out even."""
    unit, start = len(forms[0].index), 0
    for first, stop in sorted((f.index[0], f.index[-1] + 1) for f in (*forms, Form("", 0, (forms[0].big,)))):
        width = unit if (first - start) % unit == 0 else first - start
        yield from ((at, width) for at in range(start, first, width or 1))
        start = max(start, stop)


def _told(known: Rest, sibling: Node, node: Node) -> tuple[set[float], int] | None:
    """Return where a node's operands say its part begins, 0..1, and how many weights it shares with its sibling.

    None where it does not do what its sibling does. One operand may be another one: that may be what is wrong.
    """
    mine, theirs = node.all_input_nodes, sibling.all_input_nodes
    if len(mine) != len(theirs) or _constants(node) != _constants(sibling):
        return None
    starts: set[float] = set()
    shared, strange, weights = 0, 0, 0
    for p, q in zip(mine, theirs, strict=True):
        a, b = known.part(p), known.part(q)
        if a is not None and b is not None and a[0] is b[0]:
            starts.add(_start(a[1]))
            shared += 1
        elif known.root(p).op == known.root(q).op == "get_attr" and nodes.shape(p) == nodes.shape(q):
            weights += known.root(p).target == known.root(q).target
        elif known.root(p) is known.root(q):
            shared += 1
        else:
            strange += 1
    return (starts, weights) if shared and strange < 2 and len(starts) < 2 else None


def _constants(node: Node) -> str:
    def shown(value: Any) -> Any:
        if isinstance(value, Node):
            return "#"
        if isinstance(value, (list, tuple)):
            return [shown(v) for v in value]
        return repr(value)

    return repr(([shown(a) for a in node.args], {k: shown(v) for k, v in sorted(node.kwargs.items())}))

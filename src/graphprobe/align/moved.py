"""Repeated modules under other numbers: a layer left out or put in leaves all behind it one place further along.

Module paths then pair each layer with its neighbour. Which layer is which is told by the weights that stand once on
each side: a layer is moved where all of them say so, and what has moved keeps its order.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from graphprobe.align.weights import Leaves

Prefix = tuple[str, ...]  # the path of what holds the repeated modules, as before names it
_FEW = 4  # one of so many layers may stand out of order
Votes = dict[int, Counter[int]]  # number in after -> numbers in before that its weights speak for


@dataclass(frozen=True)
class Moved:
    """By what holds them: which number of before each number of after stands for, None for a layer put in; and which
    numbers of before nothing stands for."""

    numbers: Mapping[Prefix, Mapping[int, int | None]] = field(default_factory=dict)
    left_out: Mapping[Prefix, set[int]] = field(default_factory=dict)

    def apart(self, before: str, after: str) -> bool:
        """Whether either of two modules, by path, lies in a layer that the other side has not in this place."""
        return bool(self.numbers) and (self.path(after) is None or self._is_left_out(before))

    def _is_left_out(self, path: str) -> bool:
        parts = path.split(".")
        return any(
            len(parts) > len(holder) and tuple(parts[: len(holder)]) == holder and parts[len(holder)] in map(str, gone)
            for holder, gone in self.left_out.items()
        )

    def path(self, path: str) -> str | None:
        """Return the path in before of a module of after, None where it has none."""
        if not self.numbers:
            return path
        out: list[str] = []
        for part in path.split("."):
            known = self.numbers.get(tuple(out)) if part.isdigit() else None
            number = part if known is None else known.get(int(part), int(part))
            if number is None:
                return None
            out.append(str(number))
        return ".".join(out)


def moved(before: Leaves, after: Leaves) -> Moved:
    """Compare where the weights stand that each side holds once."""
    votes: dict[Prefix, Votes] = defaultdict(lambda: defaultdict(Counter))
    there = _once(before)
    for content, parts in _once(after).items():
        if content in there:
            _vote(votes, there[content], parts)
    found: dict[Prefix, dict[int, int | None]] = {}
    left_out: dict[Prefix, set[int]] = {}
    for prefix, said in votes.items():
        sides = [_children(leaves, prefix) for leaves in (before, after)]
        numbers = _numbers(said, *sides)
        if any(i != j for i, j in numbers.items()):
            found[prefix] = numbers
            left_out[prefix] = set(sides[0]).difference(j for j in numbers.values() if j is not None)
    return Moved(found, left_out)


def _once(leaves: Leaves) -> dict[object, list[str]]:
    """Map the content of weights that stand once on one side to their paths."""
    often = Counter(name for name, _ in leaves.names.values())
    return {
        name: key.split(".")
        for key, (name, _) in leaves.names.items()
        if name[0] == "content" and often[name] == 1 and key not in leaves.cut
    }


def _vote(votes: dict[Prefix, Votes], mine: list[str], theirs: list[str]) -> None:
    """Note what one weight says of the numbers in its path, where at most one of them is another."""
    if len(mine) != len(theirs):
        return
    other = [k for k, (x, y) in enumerate(zip(mine, theirs, strict=True)) if x != y]
    if len(other) > 1 or any(not (mine[k].isdigit() and theirs[k].isdigit()) for k in other):
        return
    for k, part in enumerate(mine):
        if part.isdigit():
            votes[tuple(mine[:k])][int(theirs[k])][int(part)] += 1


def _children(leaves: Leaves, prefix: Prefix) -> list[int]:
    """List the numbers of the modules that one holds."""
    size = len(prefix)
    paths = [key.split(".") for key in leaves.names if key not in leaves.cut]
    found = {int(p[size]) for p in paths if len(p) > size and p[size].isdigit() and tuple(p[:size]) == prefix}
    return sorted(found)


def _in_order(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return as many of the pairs as stand in order on both sides."""
    best: list[list[tuple[int, int]]] = []  # the longest choice that ends in each pair
    for i, j in pairs:
        above = max((chosen for chosen in best if chosen[-1][1] < j), key=len, default=[])
        best.append([*above, (i, j)])
    return max(best, key=len, default=[])


def _numbers(votes: Votes, before: list[int], after: list[int]) -> dict[int, int | None]:
    """Number the modules of after as before does: those that moved in their order, others where there is room between.

    A layer that stands out of order is left out in one place and put in in the other; where many do, they are no layers
    (experts stand in any order).
    """
    every = [(i, next(iter(votes[i]))) for i in after if len(votes.get(i, ())) == 1]
    told = _in_order(every)
    if len(every) - len(told) > max(1, len(every) // _FEW):
        return {}
    ends = [(-1, -1), *told, (max(after, default=-1) + 1, max(before, default=-1) + 1)]
    out: dict[int, int | None] = dict(told)
    for (i, j), (next_i, next_j) in itertools.pairwise(ends):
        room = [n for n in before if j < n < next_j]
        rest = [n for n in after if i < n < next_i]
        out.update({n: room[k] if k < len(room) else None for k, n in enumerate(rest)})
    return out

"""Which parts of a whole make it bad: binary search and delta debugging. Policy only; a test answers for each trial.

A test says good, bad or unknown ("cannot judge"), and unknown is never taken for either.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

GOOD, BAD, UNKNOWN = "good", "bad", "unknown"

Subset = tuple[int, ...]
Test = Callable[[Subset], str]
_ABLATIONS = 32  # trials at most that are spent on telling guilt from compensation


def first_bad(low: int, high: int, test: Callable[[int], str]) -> tuple[int, int]:
    """Return (last good, first bad) between `low`, which is good, and `high`, which is bad.

    They are neighbours unless all that lies between them is unknown.
    """
    unknown: set[int] = set()
    while candidates := [k for k in range(low + 1, high) if k not in unknown]:
        middle = min(candidates, key=lambda k: abs(2 * k - low - high))
        verdict = test(middle)
        if verdict == GOOD:
            low = middle
        elif verdict == BAD:
            high = middle
        else:
            unknown.add(middle)
    return low, high


def minimal(items: Subset, test: Test) -> Subset:
    """Return a part of `items`, in their order, that is bad and good (or unknown) without any one of its items.

    `items` as a whole must be bad. This is ddmin of Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing
    Input (2002): split into n pieces; go on with a bad piece, else with a bad complement, else split finer.
    """
    if not items or test(()) == BAD:
        return ()
    pieces = 2
    while len(items) > 1:
        split = list(_split(items, pieces))
        found = next((part for part in split if test(part) == BAD), None)
        if found is not None:
            items, pieces = found, 2
            continue
        complements = [tuple(i for i in items if i not in part) for part in split] if pieces > 2 else []
        found = next((rest for rest in complements if test(rest) == BAD), None)
        if found is not None:
            items, pieces = found, max(pieces - 1, 2)
            continue
        if pieces >= len(items):
            break
        pieces = min(len(items), 2 * pieces)
    return items


def _split(items: Subset, pieces: int) -> Iterator[Subset]:
    size, rest = divmod(len(items), pieces)
    start = 0
    for piece in range(pieces):
        stop = start + size + (piece < rest)
        yield items[start:stop]
        start = stop


def culprits(everything: Sequence[int], test: Test) -> Iterator[Subset]:
    """Yield minimal bad parts of a pipeline until what is left of it is no longer bad.

    `test(())` must be good. Each part is found in the shortest bad prefix of what is left, which then goes on without
    the last item of that part: several independent culprits are one part each, those that are bad only together
    are one part.
    """
    left = tuple(everything)
    while left and test(left) == BAD:
        low, high = first_bad(0, len(left), lambda k, left=left: test(left[:k]))  # type: ignore[misc]
        prefix = left[:high]
        if high - low == 1:  # whatever is bad here has the last one in it
            last = prefix[-1:]
            part = minimal(prefix[:-1], lambda some, last=last: test((*some, *last))) + last  # type: ignore[misc]
        else:
            part = minimal(prefix, test)
        yield part
        left = tuple(i for i in left if i != part[-1])


def to_blame(everything: Subset, groups: Sequence[Subset], test: Test) -> tuple[Subset, ...]:
    """Return the fewest of the bad parts that have to go for the rest of the pipeline to be good; all, if none do less.

    A part can be bad by itself and harmless in the whole, because a later one undoes what it did: then removing either
    of the two makes things worse, and it is neither that made the whole bad.
    """
    sizes = range(1, len(groups))
    choices = itertools.chain.from_iterable(itertools.combinations(groups, size) for size in sizes)
    for chosen in itertools.islice(choices, _ABLATIONS):
        gone = {group[-1] for group in chosen}
        if test(tuple(i for i in everything if i not in gone)) == GOOD:
            return chosen
    return tuple(groups)

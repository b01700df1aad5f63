"""The longest common subsequence of two long lists, so that what was run is laid upon what was written.

Both lists are walked from their ends: a trace holds several runs, and of these the last one counts. One row of the
table is one integer whose bits are the columns, so 2,000 operations against 6,000 take milliseconds.

Formula: Hyyrö, Bit-parallel LCS-length computation revisited, 2004; the way back as in the rapidfuzz library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: Pairs that one more entry of the longer list must bring on average: looking into an earlier run brings few.
_WORTH = 0.1
#: Entries of the longer list that are looked at, in lengths of the shorter one, and how many more.
_RUNS, _MORE = 8, 1000


def pair_from_the_end(
    wanted: Sequence[str], given: Sequence[str], also: Mapping[str, Sequence[str]] | None = None
) -> list[tuple[int, int]]:
    """Return pairs (place in `wanted`, place in `given`) of equal entries, both rising, as many and as late as may be.

    `also` says what else in `given` an entry of `wanted` may be paired with.
    """
    mine = wanted[::-1]
    theirs = given[: -(_RUNS * len(wanted) + _MORE) - 1 : -1]
    masks: dict[str, int] = {}
    for place, entry in enumerate(theirs):
        masks[entry] = masks.get(entry, 0) | 1 << place
    whole = (1 << len(theirs)) - 1
    rows, row = [], whole
    for entry in mine:
        fitting = masks.get(entry, 0)
        for other in (also or {}).get(entry, ()):
            fitting |= masks.get(other, 0)
        met = row & fitting
        row = ((row + met) | (row - met)) & whole
        rows.append(row)
    pairs = _back(rows, _columns(row, len(theirs)))
    return sorted((len(wanted) - 1 - p, len(given) - 1 - q) for p, q in pairs)


def _columns(row: int, width: int) -> int:
    """Return how many columns are worth looking at: those of the last run. A zero bit is one more pair."""
    best, columns, pairs = 0.0, 0, 0
    for place, bit in enumerate(bin(row | 1 << width)[:2:-1]):
        pairs += bit == "0"
        if bit == "0" and pairs - _WORTH * (place + 1) > best:
            best, columns = pairs - _WORTH * (place + 1), place + 1
    return columns


def _back(rows: Sequence[int], column: int) -> list[tuple[int, int]]:
    at, pairs = len(rows), []
    while at and column:
        bit = 1 << (column - 1)
        if rows[at - 1] & bit:
            column -= 1
            continue
        at -= 1
        if at and not rows[at - 1] & bit:
            continue
        column -= 1
        pairs.append((at, column))
    return pairs

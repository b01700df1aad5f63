"""The policy of bisection, on its own: binary search with gaps, delta debugging, several culprits."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from graphprobe.bisection.search import BAD, GOOD, UNKNOWN, culprits, first_bad, minimal, to_blame

SIZES = st.integers(1, 40)


@given(size=SIZES, data=st.data())
def test_the_first_bad_is_found_among_gaps(size: int, data: st.DataObject) -> None:
    culprit = data.draw(st.integers(1, size))
    gaps = data.draw(st.sets(st.integers(1, size - 1))) if size > 1 else set()
    asked: list[int] = []

    def test(k: int) -> str:
        asked.append(k)
        return UNKNOWN if k in gaps else BAD if k >= culprit else GOOD

    low, high = first_bad(0, size, test)
    assert low < culprit <= high
    assert all(k in gaps for k in range(low + 1, high))
    assert len(asked) == len(set(asked))
    if not gaps:
        assert (low, high) == (culprit - 1, culprit)
        assert len(asked) <= size.bit_length()


@given(size=SIZES, data=st.data())
def test_the_minimal_part_is_what_is_needed(size: int, data: st.DataObject) -> None:
    needed = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=4))
    assert set(minimal(tuple(range(size)), lambda s: BAD if needed <= set(s) else GOOD)) == needed


@given(size=SIZES, data=st.data())
def test_a_minimal_part_is_bad_and_no_item_of_it_can_go_whatever_cannot_be_judged(
    size: int, data: st.DataObject
) -> None:
    needed = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=3))
    seed = data.draw(st.integers(0, 999))

    def test(subset: tuple[int, ...]) -> str:
        if len(subset) < size and hash((seed, subset)) % 3 == 0:
            return UNKNOWN
        return BAD if needed <= set(subset) else GOOD

    part = minimal(tuple(range(size)), test)
    assert needed <= set(part)
    assert part == tuple(sorted(part)) and test(part) == BAD
    assert all(test(tuple(i for i in part if i != one)) != BAD for one in part)


@settings(max_examples=200)
@given(size=st.integers(1, 20), data=st.data())
def test_every_independent_group_is_found_and_nothing_else(size: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(size)))
    sizes = data.draw(st.lists(st.integers(1, 3), max_size=3))
    groups, at = [], 0
    for length in sizes:
        if at + length <= size:
            groups.append(frozenset(order[at : at + length]))
            at += length

    def test(subset: tuple[int, ...]) -> str:
        return BAD if any(group <= set(subset) for group in groups) else GOOD

    assert {frozenset(group) for group in culprits(range(size), test)} == set(groups)


@settings(max_examples=200)
@given(size=st.integers(3, 20), data=st.data())
def test_what_a_later_one_makes_up_for_is_not_blamed(size: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(size)))
    wrong, healed = order[0], tuple(sorted(order[1:3]))

    def test(subset: tuple[int, ...]) -> str:
        half_healed = len(set(healed) & set(subset)) == 1
        return BAD if wrong in subset or half_healed else GOOD

    everything = tuple(range(size))
    groups = list(culprits(everything, test))
    assert to_blame(everything, groups, test) == ((wrong,),)


@given(size=st.integers(1, 12), data=st.data())
def test_independent_culprits_are_all_to_blame(size: int, data: st.DataObject) -> None:
    guilty = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=4))
    everything = tuple(range(size))

    def test(subset: tuple[int, ...]) -> str:
        return BAD if guilty & set(subset) else GOOD

    groups = list(culprits(everything, test))
    assert set(to_blame(everything, groups, test)) == {(i,) for i in guilty}

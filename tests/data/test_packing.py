from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpt.data.packing import best_fit_decreasing, next_fit


def test_best_fit_decreasing_worked_by_hand():
    assert best_fit_decreasing([5, 7, 3, 5, 2, 8], 10) == [[5, 4], [1, 2], [0, 3]]
    assert best_fit_decreasing([4, 4, 4], 10) == [[0, 1], [2]]
    assert best_fit_decreasing([], 10) == []


def test_two_capacities_worked_by_hand():
    """The last goes where one medium is left, though the other bin is fuller."""
    assert best_fit_decreasing([7, 6, 2], 10, [2, 1, 1], 2) == [[0], [1, 2]]
    assert best_fit_decreasing([7, 6, 2], 10, [1, 1, 1], 2) == [[0, 2], [1]]
    assert best_fit_decreasing([1, 1, 1], 10, [1, 1, 1], 1) == [[0], [1], [2]]
    assert best_fit_decreasing([1, 1, 1], 10, [9, 9, 9], None) == [[0, 1, 2]]


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), max_size=60), st.integers(4, 12) | st.none())
def test_best_fit_decreasing_against_the_plain_search(documents: list[tuple[int, int]], media_capacity: int | None):
    bins: list[list[int]] = []
    for position in sorted(range(len(documents)), key=lambda i: -documents[i][0]):
        spaces = [50 - sum(documents[i][0] for i in members) for members in bins]
        rooms = [(media_capacity or 10**9) - sum(documents[i][1] for i in members) for members in bins]
        length, media = documents[position]
        fitting = [number for number in range(len(bins)) if spaces[number] >= length and rooms[number] >= media]
        if fitting:
            bins[min(fitting, key=lambda number: spaces[number])].append(position)
        else:
            bins.append([position])
    lengths, media = [length for length, _ in documents], [media for _, media in documents]
    assert best_fit_decreasing(lengths, 50, media, media_capacity) == bins


def test_what_fits_no_bin_is_refused():
    with pytest.raises(AssertionError, match="length of 11 is over the capacity 10"):
        best_fit_decreasing([3, 11], 10)
    with pytest.raises(AssertionError, match="3 media are over the capacity 2"):
        best_fit_decreasing([3, 4], 10, [1, 3], 2)
    with pytest.raises(AssertionError, match="length 11 at 1"):
        next_fit([3, 11], 10)


@given(st.lists(st.integers(1, 50), max_size=60))
def test_next_fit_keeps_the_order(lengths: list[int]):
    bins = next_fit(lengths, 50)
    assert [position for members in bins for position in members] == list(range(len(lengths)))
    totals = [sum(lengths[position] for position in members) for members in bins]
    assert all(total <= 50 for total in totals)
    assert all(total + lengths[after[0]] > 50 for total, after in zip(totals, bins[1:], strict=False))

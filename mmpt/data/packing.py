"""Lengths to bins: which documents share a pack.

token counts [, media counts] --best_fit_decreasing or next_fit--> positions of each pack
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit_decreasing(
    lengths: Sequence[int], capacity: int, media: Sequence[int] | None = None, media_capacity: int | None = None
) -> list[list[int]]:
    """Positions of `lengths` in bins of `capacity`: longest first, each into the fullest bin that still holds it.

    Given `media`, a bin's sum of those stays within `media_capacity` as well; the fullest bin is that with the fewest
    tokens left. Ties go to the lower position and the older bin. Bins stand in the order in which they were opened.
    """
    assert max(lengths, default=0) <= capacity, f"a length of {max(lengths)} is over the capacity {capacity}"
    bounded = media is not None and media_capacity is not None
    if not bounded:
        media, media_capacity = (0,) * len(lengths), 0
    assert max(media, default=0) <= media_capacity, f"{max(media)} media are over the capacity {media_capacity}"
    bins: list[list[int]] = []
    rooms: list[int] = []  # media that each bin still holds
    base = len(lengths) + 1
    spaces: list[int] = []  # space left * base + bin, sorted: one integer compares faster than a pair
    for position in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length, items = lengths[position], media[position]
        found = bisect_left(spaces, length * base)
        if bounded:
            while found < len(spaces) and rooms[spaces[found] % base] < items:
                found += 1
        if found < len(spaces):
            space = spaces.pop(found)
            bins[space % base].append(position)
            rooms[space % base] -= items
        else:
            space = capacity * base + len(bins)
            bins.append([position])
            rooms.append(media_capacity - items)
        insort(spaces, space - length * base)
    return bins


def next_fit(
    lengths: Sequence[int], capacity: int, media: Sequence[int] | None = None, media_capacity: int | None = None
) -> list[list[int]]:
    """The same in order: a bin ends before the first that it cannot hold."""
    bins: list[list[int]] = []
    space = room = -1.0
    most = math.inf if media_capacity is None else media_capacity
    for position, (length, items) in enumerate(zip(lengths, media or [0] * len(lengths), strict=True)):
        assert length <= capacity, f"length {length} at {position} is over the capacity {capacity}"
        assert items <= most, f"media {items} at {position} is over the capacity {media_capacity}"
        if length > space or items > room:
            bins.append([])
            space, room = capacity, most
        bins[-1].append(position)
        space, room = space - length, room - items
    return bins

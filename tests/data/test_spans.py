from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from mmpt.data.chance import draws, fractions, subset
from mmpt.data.spans import added, corrupt, counts

SENTINELS = range(1000, 1400)


def restored(left: list[int], target: list[int]) -> list[int]:
    """The text that was corrupted: every sentinel replaced by what follows it in the target."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[[*spans][-1]].append(token)
    return [word for token in left for word in (spans.pop(token) if token in SENTINELS else [token])]


@given(st.lists(st.integers(0, 999), max_size=2500), st.integers(0, 2**63 - 1))
def test_the_text_can_be_restored(ids: list[int], key: int):
    left, target = corrupt(ids, key, SENTINELS)
    assert restored(left, target) == ids
    noise, spans = (int(count) for count in counts(len(ids)))
    assert [token for token in target if token in SENTINELS] == [*SENTINELS][:spans]
    assert [token for token in left if token in SENTINELS] == [*SENTINELS][:spans]
    assert len(target) == noise + spans and len(left) == len(ids) - noise + spans
    assert len(left) + len(target) + (1 if target else 0) == len(ids) + int(added(len(ids)))
    assert not spans or (left[0] == ids[0] and left[-1] == SENTINELS[spans - 1]), "as T5's: a word first, a span at the end"


def test_as_many_words_and_spans_as_in_t5():
    """Its `random_spans_helper` says that inputs of 512 tokens want 568 words, and that their targets have 114."""
    noise, spans = counts(568)
    assert (568 - noise + spans + 1, noise + spans + 1) == (512, 114)
    few = np.arange(12)
    assert counts(few)[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2]
    assert counts(few)[1].tolist() == [0, 0, *[1] * 10]
    many = np.arange(2, 5000)
    plain = [min(max(round(length * 0.15), 1), length - 1) for length in many.tolist()]
    assert counts(many)[0].tolist() == plain and counts(many)[1].tolist() == [max(round(words / 3), 1) for words in plain]


def test_spans_lie_anywhere():
    """Of 37 words 6 are dropped, in 2 spans: every length of the first, and every place of it, is equally likely."""
    assert counts(37)[0] == 6 and counts(37)[1] == 2
    found = Counter()
    for key in range(4000):
        left, target = corrupt(range(37), key, SENTINELS)
        found[len(target[1 : target.index(1001)]), left.index(1000)] += 1
    dropped, kept = Counter(), Counter()
    for (length, place), times in found.items():
        dropped[length] += times
        kept[place] += times
    assert sorted(dropped) == [1, 2, 3, 4, 5] and sorted(kept) == list(range(1, 31))
    alike = sum(times for (length, place), times in found.items() if length == place)
    assert alike == approx(4000 / 30, abs=50), "lengths and places know nothing of each other"
    assert sum((times - 800) ** 2 / 800 for times in dropped.values()) < 23.5  # chi-square, 99.99 %, 4 degrees
    assert sum((times - 4000 / 30) ** 2 * 30 / 4000 for times in kept.values()) < 65  # 29 degrees


def test_a_key_says_it_all():
    one, other = corrupt(range(200), 5, SENTINELS), corrupt(range(200), 6, SENTINELS)
    assert corrupt(range(200), 5, SENTINELS) == one != other


def test_chance_is_splitmix64():
    """The first numbers of seed 1234567, as published with the algorithm (prng.di.unimi.it/splitmix64.c, Rosetta Code)."""
    assert draws(1234567, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    values = fractions(draws(3, 10_000))
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.01


@given(st.integers(0, 2**63 - 1), st.integers(0, 60), st.integers(0, 60))
def test_a_subset_is_one(key: int, size: int, count: int):
    chosen = subset(key, size, min(count, size)).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == min(count, size) and set(chosen) <= set(range(size))

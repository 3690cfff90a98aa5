from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.data.plan import Plan, Slot, keyed_hash, permute

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=90)


def plan(lengths: list[int], window: int, seed: int = 0) -> Plan:
    return Plan(np.array(lengths), seed=seed, pack_tokens=64, window=window)


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_permute_is_a_bijection(size: int, key: int):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@given(st.integers(1, 2**50), st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**50), max_size=20))
def test_permute_answers_each_position_alone(size: int, key: int, positions: list[int]):
    inside = np.array([position % size for position in positions], dtype=np.int64)
    together = permute(inside, size, key)
    assert ((together >= 0) & (together < size)).all()
    assert together.tolist() == [int(permute(inside[i : i + 1], size, key)[0]) for i in range(len(inside))]


def test_permute_is_even():
    """Each of the 24 orders of four things comes up about equally often: chi-square below its 99.99 % point."""
    orders = Counter(tuple(permute(np.arange(4), 4, keyed_hash("test", key)).tolist()) for key in range(4800))
    assert len(orders) == 24 and sum((count - 200) ** 2 / 200 for count in orders.values()) < 58


def test_keyed_hash_is_the_same_everywhere():
    assert keyed_hash("documents", 0, 0) == keyed_hash("documents", 0, 0) != keyed_hash("documents", 0, 1)
    assert [keyed_hash(1, "a"), keyed_hash("1a")] == [4207620368297011618, 1851804775104196079]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(0, 5))
def test_every_epoch_sees_each_document_once(lengths: list[int], window: int, seed: int):
    chosen = plan(lengths, window, seed)
    windows = -(-3 * len(lengths) // window)
    slots = [slot for number in range(windows) for pack in chosen.packs(number) for slot in pack]
    assert len(slots) == len(set(slots)) == windows * window
    assert {Slot(document=document, epoch=epoch) for document in range(len(lengths)) for epoch in range(3)} <= set(slots)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 40))
def test_no_pack_is_empty_or_overfull(lengths: list[int], window: int):
    for number in range(3):
        for pack in plan(lengths, window).packs(number):
            assert 0 < sum(lengths[slot.document] for slot in pack) <= 64


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(0, 60))
def test_walking_goes_on_from_any_cursor(lengths: list[int], window: int, steps: int):
    whole = list(islice(plan(lengths, window).walk(0, 0), steps + 5))
    cursor = whole[steps - 1][1] if steps else (0, 0)
    assert list(islice(plan(lengths, window).walk(*cursor), 5)) == whole[steps:]


def test_epochs_and_seeds_have_different_orders():
    chosen = plan([1] * 100, window=100)
    orders = [[slot.document for pack in chosen.packs(epoch) for slot in pack] for epoch in range(2)]
    orders.append([slot.document for pack in plan([1] * 100, window=100, seed=1).packs(0) for slot in pack])
    assert len({tuple(order) for order in orders}) == 3


EMOJI = {23: 358, 25: 1469, 27: 1456, 29: 962, 31: 624, 33: 366, 35: 128, 37: 62, 39: 13, 41: 12, 43: 7, 45: 4, 47: 1, 51: 1}
"""How many documents of the emoji recipe have so many tokens, at 16 tokens a picture."""


@pytest.mark.parametrize(("window", "fill"), [(256, 0.93), (1024, 0.97)])
def test_packs_are_nearly_full(window: int, fill: float):
    """A window leaves half a pack open at its end, so the more packs to a window, the fuller they are."""
    lengths = np.repeat(list(EMOJI), list(EMOJI.values()))
    chosen = Plan(lengths, seed=0, pack_tokens=512, window=window)
    packs = [pack for number in range(len(lengths) // window) for pack in chosen.packs(number)]
    assert sum(lengths[slot.document] for pack in packs for slot in pack) >= fill * 512 * len(packs)


def test_packs_of_a_window_are_shuffled():
    """Best-fit-decreasing opens bins longest first; taken in that order, batches would differ in kind."""
    chosen = plan(list(range(1, 65)) * 4, window=256)
    longest = [max(chosen.lengths[slot.document] for slot in pack) for pack in chosen.packs(0)]
    assert longest != sorted(longest, reverse=True)

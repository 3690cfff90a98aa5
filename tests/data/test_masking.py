from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import task_tokenizer

from mmpt.data.masking import hide, word_ids

MASK = 7
WORDS = np.arange(100, 200)


@given(st.lists(st.integers(10, 99), min_size=1, max_size=60), st.data(), st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_chosen_words_are_hidden_and_nothing_else(ids: list[int], data: st.DataObject, key: int):
    tokens = np.array(ids)
    places = sorted(data.draw(st.sets(st.integers(0, len(ids) - 1))))
    hidden, chosen = hide(tokens, places, key, MASK, WORDS)
    assert tokens.tolist() == ids, "what was given stays as it was"
    assert set(chosen.tolist()) <= set(places) and len(set(chosen.tolist())) == len(chosen)
    assert len(chosen) == (max(1, round(0.15 * len(places))) if places else 0)
    for place, (old, new) in enumerate(zip(ids, hidden.tolist(), strict=True)):
        assert new == old or (place in chosen and (new == MASK or new in WORDS))


def test_of_the_chosen_eight_in_ten_are_masked_one_is_any_word_and_one_stays():
    tokens, fates, places, words = np.arange(1000, 1100), Counter(), Counter(), Counter()
    for key in range(2000):
        hidden, chosen = hide(tokens, range(20, 80), key, MASK, WORDS)
        places.update(chosen.tolist())
        for place in chosen.tolist():
            new = int(hidden[place])
            fates["mask" if new == MASK else "stays" if new == tokens[place] else "word"] += 1
            words.update([new] if new in WORDS else [])
    total = 2000 * 9
    assert sum(fates.values()) == total
    for fate, share in (("mask", 0.8), ("word", 0.1), ("stays", 0.1)):
        assert fates[fate] / total == pytest.approx(share, abs=4 * (share * (1 - share) / total) ** 0.5)
    assert sum((times - 300) ** 2 / 300 for times in places.values()) < 110  # chi-square, 99.99 %, 59 degrees
    assert set(words) == set(WORDS.tolist())


def test_a_key_says_it_all():
    tokens = np.arange(100)
    one, other = (hide(tokens, range(100), key, MASK, WORDS) for key in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, hide(tokens, range(100), 1, MASK, WORDS), strict=True))
    assert not np.array_equal(one[1], other[1])


def test_a_word_is_no_special_token():
    tokenizer = task_tokenizer()
    words = set(word_ids(tokenizer).tolist())
    special = {tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.media, tokenizer.emb, tokenizer.mask, *tokenizer.sentinels}
    assert not words & special and words | special == set(range(len(tokenizer)))

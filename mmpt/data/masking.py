"""Masked language: which words of a row are hidden, and what stands in their place.

BERT's objective (arXiv 1810.04805, section 3.1): 15 % of the words are chosen; of these 80 % become <mask>, 10 % any
word, and 10 % stay. The label of a chosen word is the word, at its own position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mmpt.data.chance import draws, fractions, subset
from mmpt.data.plan import keyed_hash
from mmpt.data.tokens import Tokenizer

SHARE, MASKED, REPLACED = 0.15, 0.8, 0.1


def word_ids(tokenizer: Tokenizer) -> Int[np.ndarray, " words"]:
    """The tokens that texts are made of: all but the special ones."""
    return np.setdiff1d(np.arange(len(tokenizer)), [tokenizer.pad, *tokenizer.special])


def hide(
    tokens: Int[np.ndarray, " T"], places: Sequence[int], key: int, mask: int, words: Int[np.ndarray, " words"]
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " chosen"]]:
    """Tokens in which chosen `places` are hidden, and those places, in order: 15 % of them, but one at least.

    `words`: what a place may be replaced by. The same `key` chooses the same.
    """
    hidden = tokens.copy()
    if not len(places):
        return hidden, np.empty(0, dtype=np.int64)
    count = max(1, round(SHARE * len(places)))
    chosen = np.asarray(places)[subset(keyed_hash("chosen", key), len(places), count)]
    fate, number = fractions(draws(keyed_hash("fate", key), 2 * count)).reshape(2, count)
    anything = words[(number * len(words)).astype(np.int64)]
    hidden[chosen] = np.select([fate < MASKED, fate < MASKED + REPLACED], [np.full(count, mask), anything], tokens[chosen])
    return hidden, chosen

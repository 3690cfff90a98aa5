"""Span corruption: the words of a text to what is left of them, and what is to be said.

    words --counts--> how many are dropped, in how many spans          both follow from the length alone, so plans know them
    words, key --corrupt--> words and a sentinel for each span;  each sentinel and the words that it stands for

T5's objective (arXiv 1910.10683, section 3.1.4; `random_spans_noise_mask` of its code): 15 % of the words, in spans of 3 on
average. As there, a text begins with a word that stays and ends with a span.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mmpt.data.chance import subset
from mmpt.data.plan import keyed_hash

DENSITY, MEAN_LENGTH = 0.15, 3.0


def counts(words: Int[np.ndarray, "..."]) -> tuple[Int[np.ndarray, "..."], Int[np.ndarray, "..."]]:
    """Words that are dropped of texts of so many words, and the spans in which they stand: none of a text without a second."""
    words = np.asarray(words, dtype=np.int64)
    noise = np.maximum(np.rint(words * DENSITY).astype(np.int64), 1)
    spans = np.maximum(np.rint(noise / MEAN_LENGTH).astype(np.int64), 1)
    return np.where(words < 2, 0, noise), np.where(words < 2, 0, spans)


def added(words: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Tokens that a corrupted text has above its words, <bos> and <eos>: each sentinel twice, and the <eos> of the target."""
    _, spans = counts(words)
    return np.where(spans > 0, 2 * spans + 1, 0)


def corrupt(ids: Sequence[int], key: int, sentinels: Sequence[int]) -> tuple[list[int], list[int]]:
    """A text without its spans, and the spans: each is marked by the same sentinel in both."""
    noise, spans = (int(count) for count in counts(len(ids)))
    if not spans:
        return list(ids), []
    assert spans <= len(sentinels), f"{spans} spans, and {len(sentinels)} sentinels"
    dropped = _segmentation(noise, spans, keyed_hash("dropped", key))
    kept = _segmentation(len(ids) - noise, spans, keyed_hash("kept", key))
    left, target, start = [], [], 0
    for stay, drop, sentinel in zip(kept, dropped, sentinels, strict=False):
        left += [*ids[start : start + stay], sentinel]
        target += [sentinel, *ids[start + stay : start + stay + drop]]
        start += stay + drop
    return left, target


def _segmentation(total: int, count: int, key: int) -> list[int]:
    """`count` lengths of 1 or more that add up to `total`; every such list is equally likely."""
    edges = np.concatenate([[0], subset(key, total - 1, count - 1) + 1, [total]])
    return np.diff(edges).tolist()

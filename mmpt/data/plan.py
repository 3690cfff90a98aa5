"""Which documents make up which pack: a pure function of lengths and seed, so that resuming is exact.

    stream position --epoch, permute--> document;  `window` positions --best_fit_decreasing, permute--> packs

The stream runs through the epochs without a seam, and a window may span two of them. No files are opened, and
nothing depends on ranks or workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from jaxtyping import Int

from mmpt.data.packing import best_fit_decreasing

_ROUNDS = 8  # four are pseudorandom on large domains (Luby and Rackoff, 1988), but uneven on a handful of packs


def keyed_hash(*parts: int | str) -> int:
    """63 bits of `parts`, the same on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def permute(positions: Int[np.ndarray, " n"], size: int, key: int) -> Int[np.ndarray, " n"]:
    """Where a keyed permutation of range(size) takes `positions`: constant work and no table for each.

    A Feistel network over the next even power of two; what falls outside goes through it again until it falls inside
    (cycle walking: Black and Rogaway, CT-RSA 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [np.uint64(keyed_hash("round", key, number)) for number in range(_ROUNDS)]
    out = positions.astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        out[walking] = _feistel(out[walking], np.uint64(half), keys)
        walking = walking[out[walking] >= size]
    return out.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, keys: list[np.uint64]) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        mixed = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)  # the multipliers and shifts of splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << half) | right


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A document's place in a pack."""

    document: int  # number within the corpus
    epoch: int


class Plan:
    """The endless sequence of packs over documents of the given token `lengths`, none over `pack_tokens`."""

    def __init__(self, lengths: Int[np.ndarray, " documents"], *, seed: int, pack_tokens: int, window: int):
        assert len(lengths) and lengths.max() <= pack_tokens
        self.lengths, self.seed, self.pack_tokens, self.window = lengths, seed, pack_tokens, window
        self.packs = lru_cache(maxsize=2)(self._packs)

    def _packs(self, window: int) -> list[list[Slot]]:
        """The packs of a window: stream positions window * W up to (window + 1) * W."""
        epochs, documents = self.stream(np.arange(window * self.window, (window + 1) * self.window))
        packs = best_fit_decreasing(self.lengths[documents].tolist(), self.pack_tokens)
        order = permute(np.arange(len(packs)), len(packs), keyed_hash("packs", self.seed, window))
        return [[Slot(document=int(documents[i]), epoch=int(epochs[i])) for i in packs[number]] for number in order]

    def stream(self, positions: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Epoch and document of each position of the stream."""
        size = len(self.lengths)
        epochs, documents = positions // size, np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            documents[inside] = permute(positions[inside] % size, size, keyed_hash("documents", self.seed, int(epoch)))
        return epochs, documents

    def walk(self, window: int, pack: int) -> Iterator[tuple[list[Slot], tuple[int, int]]]:
        """Packs from number `pack` of `window` on, each with the cursor (window, pack) of its successor."""
        while True:
            packs = self.packs(window)
            assert pack < len(packs), f"window {window} has {len(packs)} packs, no number {pack}"
            after = (window, pack + 1) if pack + 1 < len(packs) else (window + 1, 0)
            yield packs[pack], after
            window, pack = after

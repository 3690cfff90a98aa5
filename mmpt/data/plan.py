"""Which documents make up which pack: a pure function of lengths and seed, so that resuming is exact.

    stream position --epoch, Order--> document;  `window` draws of the mixture --pieces--> slots
    slots of a window --best_fit_decreasing, permute--> packs, each with the cursor of its successor

A source's stream runs through the epochs without a seam, and a window may span two of them. No files are opened, and
nothing depends on ranks or workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from mmpt.data.mixture import Draws, Mixture, PlanSource, Slot
from mmpt.data.packing import best_fit_decreasing
from mmpt.types import PlanCursor, SourceCursor, UserError

VERSION = "1"
"""Of the order of documents and packs: a state of another version stands elsewhere."""

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
    keys = np.array([keyed_hash("round", key, number) for number in range(_ROUNDS)], dtype=np.uint64)
    # Of few values each round's function is tabulated: a window's packs are shuffled in less than half the time.
    table = _mixed(np.arange(1 << half, dtype=np.uint64), keys[:, None], half) if 1 << half <= len(positions) else None
    out = positions.astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        out[walking] = _feistel(out[walking], keys, half, table)
        walking = walking[out[walking] >= size]
    return out.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half: int, table: np.ndarray | None) -> np.ndarray:
    left, right = values >> np.uint64(half), values & np.uint64((1 << half) - 1)
    for number, key in enumerate(keys):
        left, right = right, left ^ (_mixed(right, key, half) if table is None else table[number][right])
    return (left << np.uint64(half)) | right


def _mixed(values: np.ndarray, key: np.ndarray, half: int) -> np.ndarray:
    """The lowest `half` bits of a hash: the multipliers and shifts of splitmix64."""
    mixed = (values ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) & np.uint64((1 << half) - 1)


class Order:
    """The documents of one source in the order of each epoch: constant memory, but for arrays of the number of shards.

    With `block` = 0 all documents are permuted at once. Otherwise the shards are permuted, then the documents within each
    `block` shards in a row, so that a reader needs only so many of them at a time.
    """

    def __init__(self, name: str, shard_sizes: Int[np.ndarray, " shards"], seed: int, block: int):
        self.name, self.seed, self.block = name, seed, block
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.size = int(self.sizes.sum())
        assert self.size > 0 and block >= 0
        self._layouts: dict[int, _Layout] = {}

    def __call__(self, positions: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Epoch and document of each position of the stream."""
        epochs, inside = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        documents = np.empty(len(inside), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            documents[chosen] = self._of_epoch(inside[chosen], epoch)
        return epochs, documents

    def _of_epoch(self, positions: Int[np.ndarray, " n"], epoch: int) -> Int[np.ndarray, " n"]:
        if not self.block:
            return permute(positions, self.size, keyed_hash("documents", self.seed, self.name, epoch))
        layout = self._layout(epoch)
        blocks = np.searchsorted(layout.block_stops, positions, side="right")
        moved = np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            start = int(layout.block_stops[block - 1]) if block else 0
            key = keyed_hash("block", self.seed, self.name, epoch, block)
            moved[chosen] = start + permute(positions[chosen] - start, int(layout.block_stops[block]) - start, key)
        ranks = np.searchsorted(layout.shard_stops, moved, side="right")
        shards = layout.shards[ranks]
        return self.starts[shards] + moved - (layout.shard_stops[ranks] - self.sizes[shards])

    def _layout(self, epoch: int) -> _Layout:
        if epoch not in self._layouts:
            self._layouts = dict([*self._layouts.items()][-1:])  # two are kept: at a seam both epochs are read
            self._layouts[epoch] = self._make_layout(epoch)
        return self._layouts[epoch]

    def _make_layout(self, epoch: int) -> _Layout:
        count = len(self.sizes)
        shards = permute(np.arange(count), count, keyed_hash("shards", self.seed, self.name, epoch))
        stops = np.cumsum(self.sizes[shards])
        last = np.minimum(np.arange(self.block, count + self.block, self.block), count) - 1
        return _Layout(shards=shards, shard_stops=stops, block_stops=stops[last])


class _Layout(NamedTuple):
    """How an epoch lays out the shards of a source."""

    shards: Int[np.ndarray, " shards"]  # in the epoch's order
    shard_stops: Int[np.ndarray, " shards"]  # documents up to the end of each, in that order
    block_stops: Int[np.ndarray, " blocks"]


class Plan:
    """The sequence of packs over a mixture of sources; it ends only where an exhausted source says so.

    pack_tokens, pack_media: what a pack holds at most; `window`: draws that are packed together. Raises UserError for
    weights of which none is above 0, and for a source without documents.
    """

    def __init__(
        self,
        sources: Sequence[PlanSource],
        *,
        seed: int,
        unit: Literal["tokens", "samples"],
        pack_tokens: int,
        pack_media: int | None,
        window: int,
    ):
        self.sources, self.seed, self.window = list(sources), seed, window
        self.pack_tokens, self.pack_media = pack_tokens, pack_media
        assert len(self._weights) == len(self.sources) and window > 0, "a name for each source, and a window"
        for source in self.sources:
            if not 0 <= source.weight < math.inf:
                raise UserError(f"source {source.name}: weight = {source.weight}; give a finite number, 0 or more")
            if source.size < 1:
                raise UserError(f"source {source.name}: it has no documents; take it out of the mixture")
        if not any(self._weights.values()):
            raise UserError("mixture: no source has a weight above 0; raise that of those to be drawn")
        self.mixture = Mixture(self.sources, unit)

    @property
    def _weights(self) -> dict[str, float]:
        return {source.name: source.weight for source in self.sources}

    def begin(self) -> PlanCursor:
        """Where the first pack stands."""
        return PlanCursor(window=0, pack=0, sources=self._under_own_weights({}))

    def walk(self, cursor: PlanCursor) -> Iterator[tuple[list[Slot], PlanCursor]]:
        """Packs from `cursor` on, each with the cursor of its successor.

        A window that has begun is finished under the weights and sources of its cursor, so that nothing is repeated or
        lost; the plan's own hold from the next. Raises UserError for a cursor with a source that the plan lacks, for a
        source that must not be exhausted, and for documents none of which has tokens.
        """
        if missing := sorted(cursor.sources.keys() - self._weights.keys()):
            raise UserError(f"source {missing[0]}: it was drawn before; give it weight 0 instead of taking it out")
        window, pack, sources, barren = cursor.window, cursor.pack, cursor.sources, 0
        while True:
            if not pack:
                sources = self._under_own_weights(sources)
            draws = self.mixture.draw(self.window, sources)
            if not draws.slots:
                return self.mixture.finish(sources)
            packs = self._packs(draws, window)
            if not 0 <= pack < max(len(packs), 1):
                raise UserError(
                    f"state: window {window} has {len(packs)} packs and no number {pack}; go on from another checkpoint"
                )
            following = PlanCursor(window=window + 1, pack=0, sources=draws.after)
            for number in range(pack, len(packs)):
                last = number + 1 == len(packs)
                yield packs[number], following if last else PlanCursor(window=window, pack=number + 1, sources=sources)
            barren = 0 if packs else self._barren(barren, draws)
            window, pack, sources = window + 1, 0, draws.after

    def _under_own_weights(self, sources: Mapping[str, SourceCursor]) -> Mapping[str, SourceCursor]:
        """The same positions under the plan's weights; where those are others, shares are counted anew."""
        if {name: cursor.weight for name, cursor in sources.items()} == self._weights:
            return sources
        at = {name: cursor.position for name, cursor in sources.items()}
        return {
            source.name: SourceCursor(position=at.get(source.name, 0), consumed=0, weight=source.weight)
            for source in self.sources
        }

    def _packs(self, draws: Draws, window: int) -> list[list[Slot]]:
        slots, media = self._fitting(draws)
        bins = best_fit_decreasing([slot.tokens for slot in slots], self.pack_tokens, media, self.pack_media)
        order = permute(np.arange(len(bins)), len(bins), keyed_hash("packs", self.seed, window))
        return [[slots[i] for i in bins[number]] for number in order.tolist()]

    def _fitting(self, draws: Draws) -> tuple[list[Slot], list[int]]:
        """Slots that each fit a pack, and their media: without empty documents, and pieces for those that go in pieces."""
        most = math.inf if self.pack_media is None else self.pack_media
        slots, media = [], []
        for slot, items in zip(draws.slots, draws.media, strict=True):
            if 0 < slot.tokens <= self.pack_tokens and items <= most and not slot.piece:
                slots.append(slot)
                media.append(items)
            elif slot.tokens:
                for piece, (tokens, part) in enumerate(self.sources[slot.source].pieces(slot.document, slot.epoch)):
                    slots.append(slot._replace(piece=piece, tokens=tokens))
                    media.append(part)
        return slots, media

    def _barren(self, before: int, draws: Draws) -> int:
        """Documents in a row that made no pack. Raises UserError where they must contain a whole epoch of a source."""
        barren = before + len(draws.slots)
        if barren >= 2 * sum(source.size for source in self.sources):  # twice: epochs that meet may end and begin empty
            empty = sorted({self.sources[slot.source].name for slot in draws.slots})
            raise UserError(
                f"source {', '.join(empty)}: the last {barren:,} documents drawn have no tokens; see `mmpt data validate`"
            )
        return barren

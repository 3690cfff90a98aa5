"""Which source of a mixture is drawn next: the one that lags furthest behind its share.

    cursors --largest deficit: weight * total - consumed--> a source --its next stream position--> slot;  cursors after

What was consumed is counted in tokens or in samples, as integers, so a cursor says it exactly. Nothing here knows of
packs, ranks or workers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int

from mmpt.types import SourceCursor, UserError

_log = logging.getLogger("mmpt.data")
_WINDOWS_AHEAD = 16  # fetched at once from a source: calls into numpy cost the same for one document as for hundreds

IN_PIECES = -1
_ENDLESS = 2**62  # documents, where max_epochs sets no limit


class Drawn(NamedTuple):
    """What stands at consecutive positions of a source's stream."""

    epochs: Int[np.ndarray, " n"]
    documents: Int[np.ndarray, " n"]  # numbers within the source
    tokens: Int[np.ndarray, " n"]  # 0 for a document that is left out
    media: Int[np.ndarray, " n"]
    in_pieces: Bool[np.ndarray, " n"] | None = None  # documents that go in pieces though no capacity asks for it; None: no such


class PlanSource(Protocol):
    """A source as the plan sees it: numbers alone."""

    name: str
    size: int  # documents of an epoch
    weight: float  # its share beside the others', >= 0
    max_epochs: float | None
    on_exhausted: Literal["renormalise", "stop", "fail"]

    def draw(self, positions: Int[np.ndarray, " n"]) -> Drawn:
        """What stands at these positions of the stream, which runs through the epochs without a seam."""

    def pieces(self, document: int, epoch: int) -> list[tuple[int, int]]:
        """(tokens, media) of each piece of a document that goes in pieces; every piece fits."""


class Slot(NamedTuple):
    """A document, or a piece of one, for a pack. A tuple: a run makes billions of them."""

    source: int  # number within the mixture
    document: int  # number within the source
    epoch: int
    piece: int  # 0 for a document that is whole; as drawn, IN_PIECES for one that is not to be
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Documents drawn in a row, and where the sources stand after them."""

    slots: list[Slot]  # whole documents, also those without tokens or over a capacity
    media: list[int]
    after: dict[str, SourceCursor]


class Mixture:
    """Draws from several sources in proportion to the weights that the cursors name.

    Over-consumption of a source stays below one document; with two sources under-consumption does, too.
    """

    def __init__(self, sources: Sequence[PlanSource], unit: Literal["tokens", "samples"]):
        self.unit = unit
        # By name: neither the order of a mixture's file nor that of a saved cursor decides a tie.
        numbered = sorted(enumerate(sources), key=lambda pair: pair[1].name)
        self._streams = [_Stream(number, source) for number, source in numbered]
        self._reported: set[str] = set()

    def draw(self, count: int, cursors: Mapping[str, SourceCursor]) -> Draws:
        """The next `count` documents; fewer only where exhausted sources end the mixture. Sources without a cursor rest."""
        drawn = [stream for stream in self._streams if stream.name in cursors and cursors[stream.name].weight > 0]
        lanes = [_Lane(stream, cursors[stream.name]) for stream in drawn]
        slots: list[Slot] = []
        media: list[int] = []
        while len(slots) < count and (lanes := self._open(lanes)):
            for lane in lanes:
                lane.stream.fetch(lane.position, count - len(slots), count * _WINDOWS_AHEAD)
            picks = self._picks(count - len(slots), lanes)
            taken = [lane.take(picks.count(number), self.unit) for number, lane in enumerate(lanes)]
            if len(lanes) == 1:
                slots += taken[0][0]
                media += taken[0][1]
            else:
                following = [zip(*columns, strict=True) for columns in taken]
                rows = [next(following[number]) for number in picks]
                slots += [slot for slot, _ in rows]
                media += [items for _, items in rows]
            cursors = {**cursors, **{lane.stream.name: lane.cursor for lane in lanes}}
        return Draws(slots=slots, media=media, after=dict(cursors))

    def finish(self, cursors: Mapping[str, SourceCursor]) -> None:
        """Called where the draws ended. Raises UserError if it was a source that must not be exhausted."""
        for stream in self._streams:
            cursor = cursors.get(stream.name)
            if cursor and cursor.weight > 0 and cursor.position >= stream.limit and stream.source.on_exhausted == "fail":
                raise UserError(
                    f"source {stream.name}: exhausted after max_epochs = {stream.source.max_epochs:g}, and on_exhausted is "
                    "'fail'; give it weight 0 to go on with the others"
                )

    def _open(self, lanes: list[_Lane]) -> list[_Lane]:
        """Those that have documents left; none where an exhausted source ends the mixture."""
        ended = False
        for lane in lanes:
            if lane.position >= lane.stream.limit:
                source = lane.stream.source
                ended |= source.on_exhausted != "renormalise"
                if source.name not in self._reported:
                    self._reported.add(source.name)
                    _log.warning("source %s: exhausted after %g epochs: %s", source.name, source.max_epochs, source.on_exhausted)
        return [] if ended else [lane for lane in lanes if lane.position < lane.stream.limit]

    def _picks(self, count: int, lanes: list[_Lane]) -> list[int]:
        """Which lane each draw takes: `count` of them, or until a lane is empty."""
        left = [lane.stream.limit - lane.position for lane in lanes]
        if len(lanes) == 1:
            return [0] * min(count, left[0])
        whole = math.fsum(lane.weight for lane in lanes)
        weights = [lane.weight / whole for lane in lanes]
        consumed = [lane.consumed for lane in lanes]
        total = sum(consumed)
        lengths = [iter(lane.tokens()) if self.unit == "tokens" else repeat(1) for lane in lanes]
        picks: list[int] = []
        while len(picks) < count:
            chosen, largest = 0, weights[0] * total - consumed[0]
            for number in range(1, len(weights)):
                deficit = weights[number] * total - consumed[number]
                if deficit > largest:
                    chosen, largest = number, deficit
            picks.append(chosen)
            length = next(lengths[chosen])
            consumed[chosen] += length
            total += length
            left[chosen] -= 1
            if not left[chosen]:
                break
        return picks


class _Stream:
    """A source, and a stretch of its stream that was fetched ahead: as lists, which Python reads faster than arrays."""

    def __init__(self, number: int, source: PlanSource):
        self.number, self.source, self.name = number, source, source.name
        epochs = math.inf if source.max_epochs is None else source.max_epochs
        self.limit = math.floor(min(epochs * source.size + 1e-9, _ENDLESS))  # 0.29 of 100 is 28.999...
        self.first = 0
        self.slots: list[Slot] = []
        self.tokens: list[int] = []
        self.media: list[int] = []

    def fetch(self, position: int, count: int, ahead: int) -> None:
        """Have `count` positions from `position` on at hand; if they are not, fetch `ahead`."""
        if self.first <= position and position + count <= self.first + len(self.slots):
            return
        drawn = self.source.draw(np.arange(position, position + ahead))
        self.first, self.tokens, self.media = position, drawn.tokens.tolist(), drawn.media.tolist()
        pieces = repeat(0) if drawn.in_pieces is None else (IN_PIECES * drawn.in_pieces.astype(np.int64)).tolist()
        fields = zip(repeat(self.number), drawn.documents.tolist(), drawn.epochs.tolist(), pieces, self.tokens, strict=False)
        self.slots = list(map(partial(tuple.__new__, Slot), fields))  # what Slot._make does, at a third of its time


class _Lane:
    """A source while a window is drawn."""

    def __init__(self, stream: _Stream, cursor: SourceCursor):
        self.stream, self.weight = stream, cursor.weight
        self.position, self.consumed = cursor.position, cursor.consumed

    @property
    def cursor(self) -> SourceCursor:
        return SourceCursor(position=self.position, consumed=self.consumed, weight=self.weight)

    def tokens(self) -> list[int]:
        """Token counts of the documents at hand, from the next one on."""
        return self.stream.tokens[self.position - self.stream.first :]

    def take(self, count: int, unit: str) -> tuple[list[Slot], list[int]]:
        """The next `count` documents and their media."""
        start = self.position - self.stream.first
        rows = slice(start, start + count)
        self.position += count
        self.consumed += sum(self.stream.tokens[rows]) if unit == "tokens" else count
        return self.stream.slots[rows], self.stream.media[rows]

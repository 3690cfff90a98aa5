"""Which keys every token of packed documents sees, in closed form: memory grows with documents and media, not with tokens.

A document is a row of stretches. In a causal stretch a token sees the keys up to its own; in a full one all of its tokens see
the keys up to one bound: the stretch's end for a medium, the document's for the mask `bidirectional`. Tokens have the numbers
that they have when the documents stand end to end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

Mask = Literal["causal", "bidirectional", "media"]


class Piece(NamedTuple):
    """Tokens `start` up to `stop`, of one document."""

    document: int
    start: int
    stop: int


class Stretch(NamedTuple):
    """Tokens `start` up to `stop` of a document that begins at `first`: they see its keys below `bound`, if None up to theirs."""

    start: int
    stop: int
    first: int
    bound: int | None
    pairs: int  # of a query and a key it sees, of all tokens below `start`


class Visible:
    """The mask of documents of `lengths`; `spans`, for `media`, are start and stop within each of them, in order, disjoint."""

    def __init__(self, lengths: Sequence[int], spans: Sequence[Sequence[tuple[int, int]]] | None, mask: Mask) -> None:
        self.starts: list[int] = [0]  # of each document, and the end of the last
        self.stretches: list[Stretch] = []
        pairs = 0
        for document, length in enumerate(lengths):
            first = self.starts[-1]
            inner = spans[document] if mask == "media" and spans is not None else ()
            if mask == "bidirectional":
                inner = [(0, length)]
            for start, stop, full in _rows(inner, length):
                stretch = Stretch(first + start, first + stop, first, first + stop if full else None, pairs)
                self.stretches.append(stretch)
                pairs += _pairs(stretch, stretch.stop)
            self.starts.append(first + length)
        self._works: dict[Piece, int] = {}  # what was asked: the search asks for the same pieces again and again
        self._tops: dict[Piece, int] = {}
        self._starts = [stretch.start for stretch in self.stretches]

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    def stretch(self, token: int) -> int:
        """Number of the stretch of a token."""
        return bisect_right(self._starts, token) - 1

    def bound(self, token: int) -> int:
        """The first key of its document that a token does not see."""
        bound = self.stretches[self.stretch(token)].bound
        return token + 1 if bound is None else bound

    def pairs(self, token: int) -> int:
        """Pairs of a query and a key that it sees, of all queries below `token`; tokens below 0 see nothing."""
        if token <= 0:
            return 0
        stretch = self.stretches[self.stretch(token - 1)]
        return stretch.pairs + _pairs(stretch, token)

    def pairs_below(self, tokens: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The same of many."""
        starts, firsts, bounds, pairs = self._columns
        number = np.maximum(np.searchsorted(starts, tokens - 1, side="right") - 1, 0)
        before, upto = (starts - firsts)[number], tokens - firsts[number]
        causal = (upto * (upto + 1) - before * (before + 1)) // 2
        full = (upto - before) * (bounds - firsts)[number]
        return pairs[number] + np.where(bounds[number] < 0, causal, full)

    @cached_property
    def _columns(self) -> Int[np.ndarray, "4 stretches"]:
        """Start, first token of the document, bound (-1 if causal) and pairs of all stretches."""
        rows = [(start, first, -1 if bound is None else bound, pairs) for start, _, first, bound, pairs in self.stretches]
        return np.array(rows, dtype=np.int64).reshape(-1, 4).T

    def work(self, piece: Piece) -> int:
        """Pairs of all queries of a piece."""
        found = self._works.get(piece)
        if found is None:
            found = self._works[piece] = self.pairs(piece.stop) - self.pairs(piece.start)
        return found

    def top(self, piece: Piece) -> int:
        """How many keys of its document the last token of a piece sees."""
        found = self._tops.get(piece)
        if found is None:
            found = self._tops[piece] = self.bound(piece.stop - 1) - self.starts[piece.document]
        return found


def _rows(spans: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int, bool]]:
    """The stretches of a document: its spans, full, and what lies between them, causal. None is empty."""
    rows, end = [], 0
    for start, stop in spans:
        rows += [(end, start, False), (start, stop, True)]
        end = stop
    return [(start, stop, full) for start, stop, full in [*rows, (end, length, False)] if start < stop]


def _pairs(stretch: Stretch, stop: int) -> int:
    """Pairs of the queries from a stretch's start up to `stop` within it."""
    if stretch.bound is not None:
        return (stop - stretch.start) * (stretch.bound - stretch.first)
    before, upto = stretch.start - stretch.first, stop - stretch.first
    return (upto * (upto + 1) - before * (before + 1)) // 2

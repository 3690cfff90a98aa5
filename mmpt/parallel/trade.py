"""Two ranks of a ring share what they hold anew: fewer keys of others, fewer pieces, no more work than the mean.

pieces of both --_Ways--> which rank has which piece whole --cuts--> where one piece is cut, so that tokens and work come out
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from mmpt.parallel.visible import Piece, Visible

FREE = 8  # pieces that are shared anew, the longest; the others stay where they are
WAYS = 32  # to share those that are looked at, the cheapest
CUTS = 8  # that are worked out, the cheapest
SHORT = 128  # tokens: kernels want longer pieces
CALL, SCRAP = 64, 1024  # keys that one piece fewer is worth, and one short piece fewer
KEY = 512  # pairs that a key is worth: about what is computed while it travels between two nodes
NEVER = np.iinfo(np.int64).max  # a price


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What every rank is to have."""

    visible: Visible
    share: int  # tokens
    mean: float  # pairs
    most: float  # pairs

    def price(self, pieces: list[Piece]) -> int:
        """Keys that a rank with these pieces, in order, needs, its own among them; and in keys what pieces and work cost."""
        tops = {piece.document: self.visible.top(piece) for piece in pieces}  # the last of a document decides
        shorts = sum(piece.stop - piece.start < SHORT for piece in pieces)
        work = max(self.work(pieces) - self.mean, 0)
        return sum(tops.values()) + CALL * len(pieces) + SCRAP * shorts + round(work / KEY)

    def work(self, pieces: Iterable[Piece]) -> int:
        return sum(map(self.visible.work, pieces))


class _Cut(NamedTuple):
    """A way to share, and the piece that gives what one side lacks."""

    price: int  # at the least
    way: int
    item: int
    tailed: bool  # its tail as well, or instead of its head


def trade(terms: Terms, one: list[Piece], other: list[Piece]) -> tuple[list[Piece], list[Piece]] | None:
    """What the two hold after the best trade that was found, or None if none helps.

    One with too much work pays any price to share it.
    """
    if not one + other:
        return None
    works = terms.work(one), terms.work(other)
    most = max(terms.most, sum(works) / 2 * 1.001)
    price = terms.price(one) + terms.price(other) if max(works) <= most else NEVER
    ways = _Ways(terms, one, other, most)
    found = None
    for cut in ways.cuts():
        if cut.price >= price:
            break
        receiver, giver = ways.sides(cut)
        now = terms.price(receiver) + terms.price(giver)
        if now < price and max(terms.work(receiver), terms.work(giver)) <= most:
            price, found = now, (receiver, giver)
    return found


class _Ways:
    """Ways to share the pieces of two ranks whole: the receiver has some, the giver the rest, and perhaps too many tokens.

    Arrays are of pieces (rows) and ways (columns).
    """

    def __init__(self, terms: Terms, one: list[Piece], other: list[Piece], most: float) -> None:
        self.visible = terms.visible
        self.items = sorted(joined(one + other), key=lambda piece: piece.start - piece.stop)
        sizes = np.array([piece.stop - piece.start for piece in self.items])
        works = np.array([self.visible.work(piece) for piece in self.items])  # whole numbers: every machine finds the same plan
        self.tops = np.array([self.visible.top(piece) for piece in self.items])
        sides = self._ways(one)
        lacks = terms.share - sizes @ sides
        missing = lacks - np.clip(lacks, 0, 2 * terms.share - sizes.sum())  # padding makes up for the others
        receives, missing = np.where(missing < 0, 1 - sides, sides), np.abs(missing)
        has = works @ receives
        possible = (has <= most) & (works.sum() - has - missing * self.tops.max() <= most)
        rows: dict[int, list[int]] = {}
        for number, piece in enumerate(self.items):
            rows.setdefault(piece.document, []).append(number)
        self.several = [numbers for numbers in rows.values() if len(numbers) > 1]
        firsts = [numbers[0] for numbers in rows.values()]
        whole = (self._seen(receives) + self._seen(1 - receives))[firsts].sum(axis=0) + CALL * len(self.items)
        best = np.argsort(np.where(possible, whole + missing, NEVER), kind="stable")[:WAYS]
        best = best[possible[best]]
        self.receives, self.missing, self.has, self.whole = receives[:, best], missing[best], has[best], whole[best]
        self.least, self.most = works.sum() - most, most

    def _ways(self, one: list[Piece]) -> Int[np.ndarray, "items ways"]:
        """1 for the pieces of one side, 0 for the other's: all ways for the longest pieces, the others as they are."""
        starts = {piece.start for piece in one}
        stay = [int(piece.start in starts) for piece in self.items[FREE:]]
        free = _bits(min(len(self.items), FREE))
        if not stay:
            free = free[:, : max(free.shape[1] // 2, 1)]  # the rest are these with the sides exchanged
        return np.vstack([free, np.repeat(np.array(stay, dtype=np.int64)[:, None], free.shape[1], axis=1)])

    def _seen(self, sides: Int[np.ndarray, "items ways"]) -> Int[np.ndarray, "items ways"]:
        """How many keys of each piece's document the side needs that is 1."""
        seen = self.tops[:, None] * sides
        for numbers in self.several:
            seen[numbers] = seen[numbers].max(axis=0)
        return seen

    def cuts(self) -> list[_Cut]:
        """Ways and pieces to cut that bring out tokens and work, likely cheap ones first."""
        starts, stops = (np.array(ends)[:, None] for ends in zip(*(piece[1:] for piece in self.items), strict=True))
        firsts = np.array([self.visible.starts[piece.document] for piece in self.items])[:, None]
        seen, pairs, missing = self._seen(self.receives), self.visible.pairs_below, self.missing
        fits = (self.receives == 0) & (stops - starts > missing)
        heads = self.has + pairs(np.minimum(starts + missing, stops)) - pairs(starts)
        tails = self.has + pairs(stops) - pairs(np.maximum(stops - missing, starts))
        headed = fits & (heads >= self.least) & (heads <= self.most)
        tailed = fits & (missing > 0) & (heads <= self.most) & (tails >= self.least)
        head_price = self.whole + np.maximum(starts + missing - firsts - seen, 0)
        tail_price = self.whole + np.maximum(self.tops[:, None] - seen, 0) - missing
        prices = np.stack([np.where(headed, head_price, NEVER), np.where(tailed, tail_price, NEVER)])
        order = np.argsort(prices, axis=None, kind="stable")[:CUTS]
        found = zip(*np.unravel_index(order, prices.shape), strict=True)
        cuts = [_Cut(int(prices[kind, item, way]), int(way), int(item), bool(kind)) for kind, item, way in found]
        return [cut for cut in cuts if cut.price < NEVER]

    def sides(self, cut: _Cut) -> tuple[list[Piece], list[Piece]]:
        """What receiver and giver hold: of the piece that is cut the receiver gets as much of the tail as work allows."""
        document, start, stop = self.items[cut.item]
        missing = int(self.missing[cut.way])
        tail = 0
        if cut.tailed:
            pairs = self.visible.pairs
            room = self.most - self.has[cut.way] + pairs(start) - pairs(stop)
            tail = largest(lambda tail: pairs(start + missing - tail) - pairs(stop - tail) <= room, missing)
        ends = Piece(document, start, start + missing - tail), Piece(document, stop - tail, stop)
        receives = self.receives[:, cut.way].tolist()
        receiver = [piece for piece, side in zip(self.items, receives, strict=True) if side]
        giver = [piece for number, piece in enumerate(self.items) if not receives[number] and number != cut.item]
        return joined([*receiver, *ends]), joined([*giver, Piece(document, start + missing - tail, stop - tail)])


@lru_cache
def _bits(rows: int) -> Int[np.ndarray, "rows ways"]:
    """All ways to fill a column with 0 and 1."""
    return np.arange(1 << rows) >> np.arange(rows)[:, None] & 1


def largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest from 0 up to `limit` that holds, where all below it hold too; 0 if none does."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """In order, with those that adjoin made one and empty ones left out."""
    found: list[Piece] = []
    for piece in sorted(pieces):
        if piece.start == piece.stop:
            continue
        if found and found[-1].document == piece.document and found[-1].stop == piece.start:
            piece = Piece(piece.document, found.pop().start, piece.stop)
        found.append(piece)
    return found

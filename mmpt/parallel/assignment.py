"""The search for who holds what: equally many tokens, about equally many pairs of query and key, few keys of others.

mask, padding --deal--> pieces of each rank --trade, two ranks at a time--> pieces of each rank, fewer keys

A rank that holds a late piece of a document needs all keys before it, however few its tokens are. So what a rank needs is, over
its documents, what the last of its tokens there sees: whole documents cost no more than their tokens, heads little, scraps of
tails much.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, combinations, pairwise

from mmpt.parallel.trade import Terms, joined, largest, trade
from mmpt.parallel.visible import Piece, Visible

SLACK = 0.005  # of the mean work: how far above it a trade may leave a rank
TRADES = 24  # that are tried: the time is bounded, and no clock decides
WORTH = 32  # a trade that saves fewer keys than a rank's tokens over this is not tried
PADDING = -1  # the document of padding, whose tokens lie below those of the documents and see nothing


def assign(visible: Visible, padding: int, ranks: int) -> tuple[tuple[Piece, ...], ...]:
    """Pieces of each rank, in order and not adjoining; padding fills every rank up to the same number of tokens."""
    share = (visible.tokens + padding) // ranks
    mean = visible.pairs(visible.tokens) / ranks
    terms = Terms(visible=visible, share=share, mean=mean, most=mean * (1 + SLACK))
    held = [_Held(terms, pieces) for pieces in deal(visible, padding, ranks, share)]
    tried: set[tuple[_Held, _Held]] = set()
    for _ in range(TRADES):
        fresh = [pair for pair in combinations(range(ranks), 2) if (held[pair[0]], held[pair[1]]) not in tried]
        one, other = max(fresh, key=lambda pair: held[pair[0]].gain(held[pair[1]]), default=(0, 0))
        if one == other or held[one].gain(held[other]) <= share // WORTH:
            break
        tried.add((held[one], held[other]))
        better = trade(terms, held[one].pieces, held[other].pieces)
        if better is not None:
            held[one], held[other] = (_Held(terms, pieces) for pieces in better)
    return tuple(tuple(own.pieces) for own in held)


def deal(visible: Visible, padding: int, ranks: int, share: int) -> list[list[Piece]]:
    """To rank after rank `share` tokens: the heaviest that are left and the lightest, so many of each that the work is even.

    For a single document that is zigzag.
    """
    filler = Piece(PADDING, -padding, 0)
    rest = [Piece(number, start, stop) for number, (start, stop) in enumerate(pairwise(visible.starts))]
    work = visible.pairs(visible.tokens)
    held = []
    for rank in range(ranks):
        rest = [piece for piece in rest if piece.start < piece.stop and piece.document != PADDING]
        rest.sort(key=lambda piece: (visible.top(piece), piece))
        pieces, (filler, *rest) = _take(visible, [filler, *rest], share, work / (ranks - rank))
        work -= sum(map(visible.work, pieces))
        held.append(joined(piece for piece in pieces if piece.document != PADDING))
    return held


def _take(visible: Visible, line: list[Piece], room: int, goal: float) -> tuple[list[Piece], list[Piece]]:
    """`room` tokens of a line of pieces, lightest first, with about `goal` pairs, and the line with what is left of each piece.

    They come from the back of the line, there from the end of the last piece, and from its front, there from the beginning.
    """
    tokens = list(accumulate((piece.stop - piece.start for piece in line), initial=0))
    works = list(accumulate(map(visible.work, line), initial=0))
    number = len(line) - 1  # of the piece from whose end tokens come; those behind it are taken

    def work(tail: int) -> int:
        """Of the last `tail` tokens of that piece, and of the first of the line that fill the room."""
        fronts = room - tail
        whole = min(bisect_right(tokens, fronts) - 1, number)
        start, stop = line[whole].start, line[number].stop
        part = visible.pairs(start + fronts - tokens[whole]) - visible.pairs(start)
        return visible.pairs(stop) - visible.pairs(stop - tail) + works[whole] + part

    taken, left = [], list(line)
    while (length := line[number].stop - line[number].start) <= room and work(length) <= goal and number:
        taken.append(line[number])
        left[number] = Piece(line[number].document, line[number].start, line[number].start)
        room -= length
        goal -= visible.work(line[number])
        number -= 1
    tail = largest(lambda tail: work(tail) <= goal, min(room, length)) if number else 0
    document, _, stop = line[number]
    taken.append(Piece(document, stop - tail, stop))
    left[number] = Piece(document, left[number].start, stop - tail)
    room -= tail
    for front, (document, start, stop) in enumerate(left):
        cut = min(stop, start + room)
        taken.append(Piece(document, start, cut))
        left[front] = Piece(document, cut, stop)
        room -= cut - start
    return taken, left


class _Held:
    """What a rank holds, and what it could save by a trade."""

    def __init__(self, terms: Terms, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.work = terms.work(pieces)
        self.most = terms.most
        self.tops = {piece.document: terms.visible.top(piece) for piece in pieces}

    def gain(self, other: _Held) -> int:
        """Keys that a trade of two could save at most: those of documents that both hold, seen by the one that sees fewer.

        More than any number of keys where one has too much work and the other may take it.
        """
        least, most = sorted((self.work, other.work))
        if most > self.most > least:
            return most
        return sum(min(top, other.tops[document]) for document, top in self.tops.items() if document in other.tops)

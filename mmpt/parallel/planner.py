"""Which tokens of a batch each rank of a ring holds, and what it computes with whose keys: pure, for the loader's workers.

lengths, spans --Visible--> mask --assign--> pieces of each rank = SequencePlan --ring_plan--> slices of one rank, hop by hop

Tokens have numbers: those of the documents end to end, then padding. A token sees the keys of its document up to a bound, which
is its own place (mask causal), the end of its medium's span if it has one (media), or the end of the document (bidirectional).
So what one rank's queries see of another's keys are a few rectangles, and no mask of tokens by tokens is ever built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from mmpt.parallel.assignment import assign
from mmpt.parallel.visible import Mask, Piece, Visible
from mmpt.types import RingPlan, Slice


class Held(NamedTuple):
    """Tokens `start` up to `stop` of a document, the first of which is row `row` of a rank's."""

    start: int
    stop: int
    row: int


class Step(NamedTuple):
    """Rows `start` up to `stop` of a staircase: they see the first `seen` keys."""

    start: int
    stop: int
    seen: int


@dataclass(frozen=True, kw_only=True)
class SequencePlan:
    """How the tokens of a batch are shared by R ranks: equally many each, about equally many pairs, few keys of others."""

    visible: Visible
    pieces: tuple[tuple[Piece, ...], ...]  # of each rank, in order of document and place, not adjoining
    padding: tuple[int, ...]  # tokens of padding of each rank

    @property
    def ranks(self) -> int:
        return len(self.pieces)

    @property
    def share(self) -> int:
        """Tokens of a rank."""
        return (self.visible.tokens + sum(self.padding)) // self.ranks

    @cached_property
    def order(self) -> Int[np.ndarray, " T"]:
        """Numbers of the tokens by rank, equally many each; within a rank by document and place, padding last."""
        ends = accumulate(self.padding, initial=self.visible.tokens)
        parts = []
        for pieces, end, padding in zip(self.pieces, ends, self.padding, strict=False):
            parts += [np.arange(piece.start, piece.stop) for piece in pieces]
            parts.append(np.arange(end, end + padding))
        return np.concatenate(parts, dtype=np.int64)

    @cached_property
    def work(self) -> Int[np.ndarray, " ranks"]:
        """Pairs of a query and a key that each rank computes."""
        return np.array([sum(map(self.visible.work, own)) for own in self.pieces], dtype=np.int64)

    @cached_property
    def keys(self) -> Int[np.ndarray, " ranks"]:
        """Keys that each rank receives from others."""
        lasts = [{piece.document: piece for piece in own}.values() for own in self.pieces]
        seen = [sum(map(self.visible.top, last)) for last in lasts]
        own = [sum(piece.stop - piece.start for piece in own) for own in self.pieces]
        return np.array(seen, dtype=np.int64) - np.array(own, dtype=np.int64)

    @property
    def imbalance(self) -> float:
        """The most work of a rank over the mean: 1 is perfect."""
        return float(self.work.max() / self.work.mean()) if self.work.any() else 1.0

    @property
    def remote(self) -> float:
        """Keys received over those that gathering all would bring: kappa in the formula of when communication hides."""
        everyone = (self.ranks - 1) * self.ranks * self.share
        return float(self.keys.sum() / everyone) if everyone else 0.0

    @cached_property
    def held(self) -> tuple[dict[int, list[Held]], ...]:
        """What each rank holds of every document of which it holds anything."""
        ranks: tuple[dict[int, list[Held]], ...] = tuple({} for _ in self.pieces)
        for own, pieces in zip(ranks, self.pieces, strict=True):
            row = 0
            for document, start, stop in pieces:
                own.setdefault(document, []).append(Held(start, stop, row))
                row += stop - start
        return ranks


def plan_sequence(
    lengths: Sequence[int], spans: Sequence[Sequence[tuple[int, int]]] | None, padding: int, ranks: int, *, mask: Mask
) -> SequencePlan:
    """Share documents of `lengths` tokens, end to end, and then `padding` tokens that attend to nothing, among `ranks`.

    `spans` are of each document: its media, as (start, stop) within it, in order and disjoint; the mask `media` alone reads them.
    Equal arguments give equal plans. Raises AssertionError unless the ranks can have equally many tokens.
    """
    tokens = sum(lengths) + padding
    assert tokens % ranks == 0, f"{tokens} tokens cannot be shared equally by {ranks} ranks"
    visible = Visible(lengths, spans, mask)
    pieces = assign(visible, padding, ranks)
    filler = tuple(tokens // ranks - sum(piece.stop - piece.start for piece in own) for own in pieces)
    return SequencePlan(visible=visible, pieces=pieces, padding=filler)


def ring_plan(plan: SequencePlan, rank: int) -> RingPlan:
    """What `rank` does in ring attention over the plan's ranks: its slices, and the keys that it sends and receives."""
    slices, receive_sizes = ring_slices(plan, rank)
    sent = [[np.arange(0)]] + [_rows_for(plan, (rank + hop) % plan.ranks, rank) for hop in range(1, plan.ranks)]
    return RingPlan(
        slices=slices,
        send=torch.from_numpy(np.concatenate([rows for hop in sent for rows in hop], dtype=np.int64)),
        send_sizes=tuple(sum(map(len, hop)) for hop in sent),
        receive_sizes=receive_sizes,
    )


def ring_slices(plan: SequencePlan, rank: int) -> tuple[tuple[tuple[Slice, ...], ...], tuple[int, ...]]:
    """What a rank computes at every hop, and how many keys come: `slices` and `receive_sizes` of its ring plan."""
    foreign = [_foreign_slices(plan, rank, (rank - hop) % plan.ranks) for hop in range(1, plan.ranks)]
    slices = [_own_slices(plan, rank), *(slices for slices, _ in foreign)]
    return tuple(map(tuple, slices)), (plan.share, *(received for _, received in foreign))


def _own_slices(plan: SequencePlan, rank: int) -> list[Slice]:
    """What a rank's queries see of its own keys.

    Rows of a full stretch see the keys up to its bound. Causal ones, though tokens of other ranks may lie between them, are a
    square on the diagonal and see all keys before it: the same that the stretch before sees, so that both are one rectangle.
    """
    slices: list[Slice] = []
    for held in plan.held[rank].values():
        first = held[0].row
        steps: list[Step] = []
        squares: list[Step] = []
        after_causal = False
        for start, stop, bound in _stretches(plan.visible, held):
            if bound is not None:
                _add(steps, Step(start, stop, first + _below(held, bound)))
            else:
                square = squares.pop() if after_causal else Step(start, start, start)
                squares.append(Step(square.start, stop, square.start))
                _add(steps, Step(start, stop, square.start))
            after_causal = bound is None
        slices += [Slice(start, stop, first, end, False) for start, stop, end in steps if end > first]
        slices += [Slice(start, stop, start, stop, True) for start, stop, _ in squares]
    return slices


def _foreign_slices(plan: SequencePlan, rank: int, owner: int) -> tuple[list[Slice], int]:
    """What a rank's queries see of the keys that the owner sends, and how many keys those are."""
    slices: list[Slice] = []
    received = 0
    for document, held in plan.held[rank].items():
        theirs = plan.held[owner].get(document, ())
        steps: list[Step] = []
        for start, stop, bound in _bounds(plan.visible, held):
            _add(steps, Step(start, stop, _below(theirs, bound)))
        slices += [Slice(start, stop, received, received + seen, False) for start, stop, seen in steps if seen]
        received += steps[-1].seen
    return slices, received


def _rows_for(plan: SequencePlan, rank: int, owner: int) -> list[Int[np.ndarray, " n"]]:
    """The rows of the owner's keys that a rank's queries see, document by document."""
    rows = []
    for document, held in plan.held[rank].items():
        mine = plan.held[owner].get(document)
        if mine:
            seen = _below(mine, plan.visible.bound(held[-1].stop - 1))
            rows.append(np.arange(mine[0].row, mine[0].row + seen))
    return rows


def _add(steps: list[Step], step: Step) -> None:
    """To the rows before, if those see the same keys."""
    if steps and steps[-1].seen == step.seen:
        step = Step(steps.pop().start, step.stop, step.seen)
    steps.append(step)


def _below(held: Sequence[Held], bound: int) -> int:
    """How many of the tokens held are below a bound."""
    return sum(max(min(stop, bound) - start, 0) for start, stop, _ in held)


def _stretches(visible: Visible, held: list[Held]) -> Iterator[tuple[int, int, int | None]]:
    """The rows of what is held, stretch by stretch, and their bound: None if causal."""
    for start, stop, row in held:
        for number in range(visible.stretch(start), visible.stretch(stop - 1) + 1):
            stretch = visible.stretches[number]
            low, high = max(start, stretch.start), min(stop, stretch.stop)
            yield row + low - start, row + high - start, stretch.bound


def _bounds(visible: Visible, held: list[Held]) -> Iterator[tuple[int, int, int]]:
    """The rows of what is held, by the keys of other ranks that they see: those up to a bound.

    Within a piece these are the keys before it; only a full stretch that goes on behind the piece sees further ones.
    """
    for start, stop, row in held:
        last = visible.stretches[visible.stretch(stop - 1)]
        cut = max(start, last.start) if last.bound is not None and last.bound > stop else stop
        if cut > start:
            yield row, row + cut - start, start
        if cut < stop:
            yield row + cut - start, row + stop - start, last.bound

"""Documents that are longer than a segment may be: cut between parts, and within a text only where it alone is too long.

costs of the parts --split--> pieces, each of which fits a segment --piece_cost--> what it takes in a pack
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mmpt.data.form import Form
from mmpt.types import TEXT


class Costs(NamedTuple):
    """What plans know of parts: arrays for those of a whole source, lists for those of one document."""

    kind: Any  # TEXT, IMAGE, AUDIO or VIDEO
    predict: Any  # of texts: whether their words are asked for
    tokens: Any  # words of a text, slots of a medium in a row
    rows: Any  # patches or log-mel frames of a medium; one without any is left out


@dataclass(frozen=True)
class Run:
    """What a piece holds of part `part`: a medium whole, of a text the words from `start` up to `stop`."""

    part: int
    start: int
    stop: int


def split(form: Form, costs: Costs, max_rows: int | None) -> list[list[Run]]:
    """A document in pieces of at most `form.longest` tokens and `max_rows` rows. Every medium must fit one of its own."""
    is_pair = form.is_pair(costs.rows)
    room = form.room(is_pair)
    pieces: list[list[Run]] = [[]]
    space, media_space = room, max_rows
    for part, (kind, predict, length, height) in enumerate(zip(*costs, strict=True)):
        if kind != TEXT and not height:
            continue
        most, open_most = form.widest(is_pair, predict) if kind == TEXT else (length, length)
        cost = form.run_tokens(is_pair, predict, length) if kind == TEXT else length
        is_over = cost > space or length > most or (media_space is not None and height > media_space)
        if pieces[-1] and is_over:
            pieces.append([])
            space, media_space = room, max_rows
        start = 0
        while length - start > most:  # a text: at least one word is kept for the last piece
            taken = min(open_most, length - start - 1)
            pieces[-1].append(Run(part, start, start + taken))
            pieces.append([])
            start += taken
            cost = form.run_tokens(is_pair, predict, length - start)
        pieces[-1].append(Run(part, start, length))
        space -= cost
        if media_space is not None:
            media_space -= height
    return pieces


def piece_cost(form: Form, costs: Costs, piece: Sequence[Run]) -> tuple[int, int]:
    """Tokens and media rows of a piece."""
    is_pair = form.is_pair(costs.rows)
    tokens = form.longest - form.room(is_pair)
    for run in piece:
        if costs.kind[run.part] == TEXT:
            ends = run.stop == costs.tokens[run.part]
            tokens += form.run_tokens(is_pair, costs.predict[run.part], run.stop - run.start, ends)
        else:
            tokens += costs.tokens[run.part]
    return tokens, sum(costs.rows[run.part] for run in piece)

"""Documents to token segments, and the arithmetic of their lengths.

    parts, their token counts --tokenize--> segments of a document      lengths: `document_lengths`, for all documents at once
                              --split, tokenize_piece--> pieces of one that is longer than a pack

A document's first segment is its interleaved row. Every further segment encodes one contrasted side that the row would
show the other, on its own. All segments of a document lie in one pack, one behind the other. A document that is split has
no contrasted sides: its pieces are read for their next tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from jaxtyping import Bool, Int

from mmpt.data.tokens import Tokenizer
from mmpt.types import (
    AUDIO,
    IGNORE,
    IMAGE,
    TEXT,
    VIDEO,
    Audio,
    EmbeddingToken,
    Image,
    MediaSpan,
    Part,
    Text,
    TokenizedDocument,
    Video,
)

MODALITY = {Text: TEXT, Image: IMAGE, Audio: AUDIO, Video: VIDEO}


def document_lengths(
    is_text: Bool[np.ndarray, " parts"],
    tokens: Int[np.ndarray, " parts"],
    first_part: Int[np.ndarray, " documents_plus_1"],
    reverse: bool = False,
) -> Int[np.ndarray, " documents"]:
    """Tokens of all segments of every document, as `tokenize` makes them; 0 for a document without parts.

    `tokens` of a text are those of its words, of a medium its slots: 0 leaves it out. `reverse`: parts stand last to first.
    """
    kept = is_text | (tokens > 0)
    texts, media = _sums(is_text * (tokens + 2), first_part), _sums(tokens * ~is_text, first_part)
    first = _last(kept, first_part) if reverse else _first(kept, first_part)
    leads = np.append(~is_text, False)[first]  # a medium stands first, and is embedded in the row
    first_text, first_medium = (_first(chosen, first_part) for chosen in (is_text, kept & ~is_text))
    both = (first_text < len(tokens)) & (first_medium < len(tokens))
    padded = np.append(tokens, 0)
    sides = padded[first_text] + 2 + np.where(leads, 0, padded[first_medium] + 1)
    return texts + media + leads + np.where(both, sides, 0)


def _sums(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Of `values` between neighboring edges."""
    return np.diff(np.concatenate([[0], np.cumsum(values)])[edges])


def _first(chosen: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Position of the first chosen one between neighboring edges; len(chosen) where there is none."""
    positions = np.append(np.flatnonzero(chosen), len(chosen))
    found = positions[np.searchsorted(positions, edges[:-1]).clip(max=len(positions) - 1)]
    return np.where(found < edges[1:], found, len(chosen))


def _last(chosen: np.ndarray, edges: np.ndarray) -> np.ndarray:
    positions = np.append(-1, np.flatnonzero(chosen))
    found = positions[np.searchsorted(positions, edges[1:]) - 1]
    return np.where(found >= edges[:-1], found, len(chosen))


def tokenize(parts: Sequence[Part], slots: Sequence[int], tokenizer: Tokenizer, reverse: bool = False) -> list[TokenizedDocument]:
    """The segments of a document: its interleaved row, then the contrasted sides that the row cannot hold without a leak.

    The row embeds a medium that stands first, right behind its slots: causal, so it sees nothing else. A document with
    media and texts gets a segment of its own for the first text and, unless it stands first, for the first medium.
    Labels are the next token within texts to predict, never on media slots, `<emb>` or `<eos>`.
    `slots`: tokens of each medium, 0 for one that is left out; texts have any number. Items are numbered by modality, in the
    order of `parts`, whatever the order of the row.
    """
    items = item_numbers(parts, slots)
    kept = [i for i, part in enumerate(parts) if isinstance(part, Text) or slots[i]]
    texts = [i for i in kept if isinstance(parts[i], Text)]
    media = [i for i in kept if not isinstance(parts[i], Text)]
    row, sides = Segment(tokenizer), []
    order = kept[::-1] if reverse else kept
    for place, i in enumerate(order):
        part = parts[i]
        if isinstance(part, Text):
            ids = tokenizer.encode(part.text)
            row.text(ids, part.predict)
            if media and i == texts[0]:
                sides.append(Segment(tokenizer).embedded_text(ids, part))
        elif place == 0:
            row.embedded_medium(part, slots[i], items[i])
        else:
            row.medium(part, slots[i], items[i])
            if i == media[0] and isinstance(parts[order[0]], Text):
                sides.append(Segment(tokenizer).embedded_medium(part, slots[i], items[i]))
    return [segment.tokenized() for segment in (row, *sides)]


def item_numbers(parts: Sequence[Part], slots: Sequence[int]) -> list[int]:
    """Number of each medium among those of its modality that are kept; -1 for the other parts."""
    seen = dict.fromkeys((IMAGE, AUDIO, VIDEO), 0)
    numbers = []
    for part, length in zip(parts, slots, strict=True):
        modality = MODALITY[type(part)]
        numbers.append(seen[modality] if modality != TEXT and length else -1)
        if modality != TEXT and length:
            seen[modality] += 1
    return numbers


@dataclass(frozen=True)
class Run:
    """What a piece holds of part `part`: a medium whole, of a text the tokens from `start` up to `stop`."""

    part: int
    start: int
    stop: int


def split(
    is_text: Sequence[bool], tokens: Sequence[int], rows: Sequence[int], max_tokens: int, max_rows: int | None
) -> list[list[Run]]:
    """A document in pieces that fit a pack: cut between parts, and within a text only where it alone is longer than a pack.

    `tokens` and `rows` as a Budget gives them, those of a text being its words. Every medium must fit a pack of its own.
    """
    pieces: list[list[Run]] = [[]]
    space, media_space = max_tokens, max_rows
    for part, (text, length, height) in enumerate(zip(is_text, tokens, rows, strict=True)):
        if not text and not length:
            continue
        cost = length + 2 if text else length
        if pieces[-1] and (cost > space or (media_space is not None and height > media_space)):
            pieces.append([])
            space, media_space = max_tokens, max_rows
        start = 0
        while cost > max_tokens:  # a text: <bos> and as many words as fit, at least one word being kept for the last piece
            taken = min(max_tokens - 1, length - start - 1)
            pieces[-1].append(Run(part, start, start + taken))
            pieces.append([])
            start += taken
            cost = length - start + 2
        pieces[-1].append(Run(part, start, length))
        space -= cost
        if media_space is not None:
            media_space -= height
    return pieces


def piece_cost(piece: Sequence[Run], is_text: Sequence[bool], tokens: Sequence[int], rows: Sequence[int]) -> tuple[int, int]:
    """Tokens and media rows of a piece."""
    texts = sum(run.stop - run.start + 1 + (run.stop == tokens[run.part]) for run in piece if is_text[run.part])
    media = [run.part for run in piece if not is_text[run.part]]
    return texts + sum(tokens[part] for part in media), sum(rows[part] for part in media)


def tokenize_piece(
    parts: Sequence[Part], slots: Sequence[int], piece: Sequence[Run], ids: Mapping[int, list[int]], tokenizer: Tokenizer
) -> list[TokenizedDocument]:
    """The one segment of a piece; `ids`: tokens of its texts, by part. Its items are numbered from 0 within the piece."""
    shown = {run.part for run in piece}
    items = item_numbers(parts, [length if part in shown else 0 for part, length in enumerate(slots)])
    row = Segment(tokenizer)
    for run in piece:
        part = parts[run.part]
        if isinstance(part, Text):
            words = ids[run.part]
            row.text(words[run.start : run.stop], part.predict, ends=run.stop == len(words))
        else:
            row.medium(part, slots[run.part], items[run.part])
    return [row.tokenized()]


class Segment:
    """A segment in the making."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self.media: list[MediaSpan] = []
        self.embeddings: list[EmbeddingToken] = []

    def text(self, ids: list[int], predict: bool, ends: bool = True) -> None:
        """A text, closed by <eos> where it `ends` here."""
        said = [*ids, self.tokenizer.eos] if ends else ids
        self.tokens += [self.tokenizer.bos, *said]
        self.labels += [*said, IGNORE] if predict else [IGNORE] * (len(said) + 1)

    def medium(self, part: Part, length: int, item: int) -> None:
        self.media.append(MediaSpan(start=len(self.tokens), length=length, modality=MODALITY[type(part)], item=item))
        self._silent([self.tokenizer.media] * length)

    def embedded_text(self, ids: list[int], part: Text) -> Segment:
        self._silent([self.tokenizer.bos, *ids])
        return self._embedding(TEXT, content_hash(part.text.encode()))

    def embedded_medium(self, part: Part, length: int, item: int) -> Segment:
        self.medium(part, length, item)
        stretch = f"{part.clip}" if isinstance(part, Video) else f"{part.start}" if isinstance(part, Audio) else ""
        return self._embedding(MODALITY[type(part)], content_hash(part.data, stretch.encode()))

    def _embedding(self, modality: int, content: int) -> Segment:
        self.embeddings.append(EmbeddingToken(position=len(self.tokens), modality=modality, content=content))
        self._silent([self.tokenizer.emb])
        return self

    def _silent(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.labels += [IGNORE] * len(tokens)

    def tokenized(self) -> TokenizedDocument:
        return TokenizedDocument(
            tokens=tuple(self.tokens), labels=tuple(self.labels), media=tuple(self.media), embeddings=tuple(self.embeddings)
        )


def content_hash(*contents: bytes | memoryview) -> int:
    """63 bits, so that it fits int64 and is never negative."""
    digest = blake2b(digest_size=8)
    for content in contents:
        digest.update(content)
    return int.from_bytes(digest.digest(), "little") >> 1

"""Documents to token segments, and the arithmetic of their lengths.

    parts, their costs --Segmenter.document--> segments of a document    lengths: `document_lengths`, for all documents at once
                       --split, Segmenter.piece--> a piece of one that is longer than a segment may be: see `pieces`

A document's first segment is its interleaved row, in which its task is set. Every further segment encodes one contrasted side
that the row would show another, on its own. All segments of a document lie in one pack, one behind the other. A document that
is split has no contrasted sides: its pieces are read for their task alone.

Without fusion a document is one segment, its first text, and media stand beside it, not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from mmpt.data.form import Form
from mmpt.data.masking import hide, word_ids
from mmpt.data.pieces import Costs, Run
from mmpt.data.plan import keyed_hash
from mmpt.data.sentences import middle
from mmpt.data.spans import corrupt
from mmpt.data.tokens import Tokenizer
from mmpt.types import (
    AUDIO,
    IGNORE,
    IMAGE,
    MASKED,
    NOTHING,
    SPAN,
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


class Lengths(NamedTuple):
    """Of documents, in tokens; 0 for one that has nothing to show."""

    total: Int[np.ndarray, " documents"]  # all segments
    row: Int[np.ndarray, " documents"]  # the longest of them


def document_lengths(
    form: Form, costs: Costs, first_part: Int[np.ndarray, " documents_plus_1"], reverse: bool = False
) -> Lengths:
    """Of every document, as `Segmenter.document` makes it. `reverse`: parts stand last to first."""
    is_text = costs.kind == TEXT
    kept = is_text | (costs.rows > 0)
    chosen = {modality: kept & (costs.kind == modality) for modality in (TEXT, IMAGE, AUDIO, VIDEO)}
    firsts = {modality: _first(each, first_part, reverse) for modality, each in chosen.items() if each.any()}
    exists = {modality: first < len(is_text) for modality, first in firsts.items()}
    tokens, kinds = np.append(costs.tokens, 0), np.append(costs.kind, TEXT)  # those of no part are none
    has_text = exists.get(TEXT, np.zeros(len(first_part) - 1, dtype=bool))
    has_media = sum((found for modality, found in exists.items() if modality != TEXT), np.zeros_like(has_text))
    if not form.fusion:
        words = tokens[firsts[TEXT]] if TEXT in firsts else 0
        row = np.where(has_text, np.minimum(words + 2, form.longest), has_media)
        return Lengths(row, row)
    row = _sums(is_text * form.text_tokens(costs.tokens, costs.predict) + ~is_text * costs.tokens, first_part)
    if form.pairs:
        row = np.where(has_text & ~has_media, _sums(is_text * costs.tokens, first_part) + 3, row)
    if not form.contrasts:
        return Lengths(row, row)
    first = _first(kept, first_part, reverse)
    leads = kinds[first] != TEXT  # a medium stands first, and is embedded in the row
    if not form.is_causal:
        leads &= _sums(kept, first_part) == 1
    row = row + leads
    total = row.copy()
    several = sum(found.astype(np.int64) for found in exists.values()) > 1
    for modality, found in exists.items():
        aside = several & found & ~(leads & (firsts[modality] == first))
        total += aside * (tokens[firsts[modality]] + (2 if modality == TEXT else 1))
    return Lengths(total, row)


def _sums(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Of `values` between neighboring edges."""
    return np.diff(np.concatenate([[0], np.cumsum(values)])[edges])


def _first(chosen: np.ndarray, edges: np.ndarray, reverse: bool) -> np.ndarray:
    """Position of the first chosen one between neighboring edges, or the last; len(chosen) where there is none."""
    found = np.flatnonzero(chosen)
    if reverse:
        positions = np.append(-1, found)[np.searchsorted(found, edges[1:])]
        return np.where(positions >= edges[:-1], positions, len(chosen))
    positions = np.append(found, len(chosen))[np.searchsorted(found, edges[:-1])]
    return np.where(positions < edges[1:], positions, len(chosen))


def item_numbers(parts: Sequence[Part], shown: Sequence[int]) -> list[int]:
    """Number of each medium among those of its modality that are `shown`; NOTHING for the other parts."""
    seen = dict.fromkeys((IMAGE, AUDIO, VIDEO), 0)
    numbers = []
    for part, is_shown in zip(parts, shown, strict=True):
        modality = MODALITY[type(part)]
        numbers.append(seen[modality] if modality != TEXT and is_shown else NOTHING)
        if numbers[-1] != NOTHING:
            seen[modality] += 1
    return numbers


@dataclass(frozen=True)
class Segmenter:
    """Makes segments. `costs` are those of a document's parts; a `key` decides all chance."""

    form: Form
    tokenizer: Tokenizer

    @cached_property
    def _words(self) -> Int[np.ndarray, " words"]:
        return word_ids(self.tokenizer)

    def document(self, parts: Sequence[Part], costs: Costs, key: int = 0, reverse: bool = False) -> list[TokenizedDocument]:
        """The segments of a document: its row, then the contrasted sides that the row cannot hold without a leak.

        Contrasted is the first part of each modality, where there are several and the model has levels: in a segment of its own,
        closed by <emb>. A medium that stands first is embedded in the row instead, right behind its slots, if nothing there
        sees what follows.
        Items are numbered by modality, in the order of `parts`, whatever the order of the row.
        """
        items = item_numbers(parts, costs.rows)
        order = [i for i, part in enumerate(parts) if isinstance(part, Text) or costs.rows[i]]
        if reverse:
            order.reverse()
        firsts = {MODALITY[type(parts[i])]: i for i in reversed(order)}
        if not self.form.fusion:
            return [self._towers(parts, items, firsts)]
        ids = {i: self.tokenizer.encode(parts[i].text) for i in order if isinstance(parts[i], Text)}
        if order and self.form.is_pair(costs.rows):
            return [self._pair([(ids[i], parts[i].predict) for i in order], key)]
        begins = bool(order) and order[0] not in ids and (self.form.is_causal or len(order) == 1)
        lead = order[0] if begins and self.form.contrasts else None
        row, sides = _Segment(self.tokenizer, self.form), []
        for i in order:
            part = parts[i]
            if i in ids:
                self._say(row, ids[i], part.predict, (key, i))
            else:
                row.medium(part, costs.tokens[i], items[i])
            if i == lead:
                row.embed(part, items[i], row.media[-1].start)
            elif self.form.contrasts and len(firsts) > 1 and i == firsts[MODALITY[type(part)]]:
                sides.append(self._side(part, ids.get(i), costs.tokens[i], items[i]))
        return [self._finished(row, key), *sides]

    def piece(
        self, parts: Sequence[Part], costs: Costs, runs: Sequence[Run], ids: Mapping[int, list[int]], key: int = 0
    ) -> list[TokenizedDocument]:
        """The one segment of a piece; `ids`: words of its texts, by part. Its items are numbered from 0 within the piece.

        The task is set for the piece by itself: its own words are hidden, and it is cut in two.
        """
        said = {run.part: ids[run.part][run.start : run.stop] for run in runs if run.part in ids}
        if self.form.is_pair(costs.rows):
            return [self._pair([(said[run.part], parts[run.part].predict) for run in runs], key)]
        shown = {run.part for run in runs}
        items = item_numbers(parts, [rows if part in shown else 0 for part, rows in enumerate(costs.rows)])
        row = _Segment(self.tokenizer, self.form)
        for run in runs:
            part = parts[run.part]
            if isinstance(part, Text):
                ends = run.stop == len(ids[run.part])
                self._say(row, said[run.part], part.predict, (key, run.part), ends)
            else:
                row.medium(part, costs.tokens[run.part], items[run.part])
        return [self._finished(row, key)]

    def embedded_text(self, text: Text) -> TokenizedDocument:
        """`<bos> words <emb>`, as a contrasted text is: a prompt. Words beyond the longest segment are left out."""
        return self._side(text, self.tokenizer.encode(text.text)[: self.form.longest - 2], 0, NOTHING)

    def _side(self, part: Part, ids: list[int] | None, slots: int, item: int) -> TokenizedDocument:
        segment = _Segment(self.tokenizer, self.form)
        if ids is None:
            segment.medium(part, slots, item)
        else:
            segment.given([self.tokenizer.bos, *ids])
        return segment.embed(part, item, 0 if ids is None else 1).tokenized()

    def _towers(self, parts: Sequence[Part], items: Sequence[int], firsts: Mapping[int, int]) -> TokenizedDocument:
        """The first text, embedded, and beside it the first medium of each modality; one token of padding if there is no text."""
        segment = _Segment(self.tokenizer, self.form)
        if TEXT in firsts:
            text = parts[firsts[TEXT]]
            segment.given([self.tokenizer.bos, *self.tokenizer.encode(text.text)[: self.form.longest - 2]])
            segment.embed(text, NOTHING, 1)
        elif firsts:
            segment.given([self.tokenizer.pad])
        for modality in sorted(firsts.keys() - {TEXT}):
            segment.embed_beside(parts[firsts[modality]], items[firsts[modality]])
        return segment.tokenized()

    def _say(self, row: _Segment, ids: list[int], predict: bool, key: tuple[int, int], ends: bool = True) -> None:
        """A text of a row, closed by <eos> where it `ends` here, with what the task asks of it if it is to `predict`.

        `key`: of the row, and the number of the text's part.
        """
        bos, close = self.tokenizer.bos, [self.tokenizer.eos] if ends else []
        if not predict:
            row.given([bos, *ids, *close])
        elif self.form.task == SPAN:
            left, target = corrupt(ids, keyed_hash("text", *key), self.tokenizer.sentinels)
            row.given([bos, *left, self.tokenizer.eos])
            row.told([*target, self.tokenizer.eos] if target else [])
        elif self.form.task == MASKED:
            row.words += range(len(row.tokens) + 1, len(row.tokens) + 1 + len(ids))
            row.given([bos, *ids, *close])
        elif self.form.is_causal:
            row.given([bos])
            row.told([*ids, *close])
        else:  # every token sees the next: there is nothing to ask
            row.given([bos, *ids, *close])

    def _pair(self, texts: Sequence[tuple[list[int], bool]], key: int) -> TokenizedDocument:
        """All texts in two halves, of which the second follows the first; no pair where there is less than a word for each."""
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        ids = [word for words, _ in texts for word in words]
        ends = set(accumulate(len(words) for words, _ in texts))
        cut = middle(ids, self.tokenizer.decode, ends) if len(ids) > 1 else len(ids)
        row = _Segment(self.tokenizer, self.form)
        row.given([bos, *ids[:cut], eos, *ids[cut:], eos])
        predict = (predict for words, predict in texts for _ in words)
        row.words = [word + (1 if word < cut else 2) for word, asked in enumerate(predict) if asked]
        if len(ids) > 1:
            row.second = cut + 2
        return self._finished(row, key)

    def _finished(self, row: _Segment, key: int) -> TokenizedDocument:
        """With words hidden, if that is the task. `key`: of the document, or the piece."""
        if self.form.task == MASKED:
            tokens = np.array(row.tokens, dtype=np.int64)
            hidden, chosen = hide(tokens, row.words, key, self.tokenizer.mask, self._words)
            row.tokens = hidden.tolist()
            for place in chosen.tolist():
                row.labels[place] = int(tokens[place])
        return row.tokenized()


class _Segment:
    """A segment in the making."""

    def __init__(self, tokenizer: Tokenizer, form: Form) -> None:
        self.tokenizer, self.form = tokenizer, form
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self.media: list[MediaSpan] = []
        self.embeddings: list[EmbeddingToken] = []
        self.words: list[int] = []  # places of those that may be hidden
        self.second: int | None = None

    def given(self, tokens: Sequence[int]) -> None:
        """Tokens that nothing asks for."""
        self.tokens += tokens
        self.labels += [IGNORE] * len(tokens)

    def told(self, tokens: Sequence[int]) -> None:
        """Tokens each of which is asked for where the one before it stands."""
        if tokens:
            self.tokens += tokens
            self.labels[-1:] = [*tokens, IGNORE]

    def medium(self, part: Part, length: int, item: int) -> None:
        self.media.append(MediaSpan(start=len(self.tokens), length=length, modality=MODALITY[type(part)], item=item))
        self.given([self.tokenizer.media] * length)

    def embed(self, part: Part, item: int, start: int) -> _Segment:
        """Close a part whose own tokens begin at `start` with <emb>."""
        self.given([self.tokenizer.emb])
        stop = len(self.tokens)
        self._embedding(part, item, start if self.form.mean else stop - 1, stop)
        return self

    def embed_beside(self, part: Part, item: int) -> None:
        """A medium that has no tokens."""
        self._embedding(part, item, 0, 0)

    def _embedding(self, part: Part, item: int, start: int, stop: int) -> None:
        modality, content = MODALITY[type(part)], content_of(part)
        self.embeddings.append(EmbeddingToken(start=start, stop=stop, modality=modality, item=item, content=content))

    def tokenized(self) -> TokenizedDocument:
        return TokenizedDocument(
            tokens=tuple(self.tokens),
            labels=tuple(self.labels),
            media=tuple(self.media),
            embeddings=tuple(self.embeddings),
            task=self.form.task,
            second=self.second,
            next_sentence=IGNORE if self.second is None else 0,
        )


def content_of(part: Part) -> int:
    """A hash of what a part shows: 63 bits, so that it fits int64 and is never negative."""
    if isinstance(part, Text):
        return content_hash(part.text.encode())
    stretch = f"{part.clip}" if isinstance(part, Video) else f"{part.start}" if isinstance(part, Audio) else ""
    return content_hash(part.data, stretch.encode())


def content_hash(*contents: bytes | memoryview) -> int:
    digest = blake2b(digest_size=8)
    for content in contents:
        digest.update(content)
    return int.from_bytes(digest.digest(), "little") >> 1

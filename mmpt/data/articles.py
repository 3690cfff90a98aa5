"""Documents as a page shows them: every part as the model gets it, and the tokens of every segment.

Piece --Corpus.document--> parts --decoded as for training--> Shown
      --Source.read, of every piece of the document--> segments --> Row of Chips
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mmpt.config import AugmentConfig
from mmpt.data.decode import pixels, sound
from mmpt.data.faults import BadMedia
from mmpt.data.inline import Allowance, legible, mel_png, mp3, mp4, png
from mmpt.data.media.audio import HOP, SAMPLE_RATE, decode_audio
from mmpt.data.media.images import augment
from mmpt.data.mixture import Slot
from mmpt.data.plan import keyed_hash
from mmpt.data.segments import MODALITY
from mmpt.data.source import Reading, Source
from mmpt.data.tokens import Tokenizer
from mmpt.types import AUDIO, IGNORE, IMAGE, MASKED, TEXT, VIDEO, Audio, Image, Part, Text, TokenizedDocument, Video

NAMES = {TEXT: "text", IMAGE: "picture", AUDIO: "sound", VIDEO: "video"}
PARTS, PIECES, META = 100, 12, 12  # of a document that are shown
TOKENS = 2_000  # of a segment that are shown
CHARACTERS, WORDS = 4_000, 500  # of a text; of a fault or a line of meta
SECONDS = 30.0  # of a sound
LONGEST = 8  # tokens of one character
SMALL = 160  # CSS pixels: pictures of half of that or less are magnified
_CHIP_BYTES = 50  # of the page, beside the text


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a pack holds of a document."""

    number: int  # of the document on the page
    source: str
    key: str
    slot: Slot
    rows: int  # patches and log-mel frames


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A picture, or one frame of a clip."""

    uri: str  # empty where the page is full
    width: int  # CSS pixels
    height: int
    is_magnified: bool
    label: str = ""


@dataclass(kw_only=True)
class Shown:
    """A part of a document; what its kind lacks is empty."""

    name: str
    kind: str
    note: str
    text: str = ""
    predicted: bool = False
    frames: Sequence[Frame] = ()
    player: str = ""  # data URI
    fault: BadMedia | None = None


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One token, or several that make one character or one medium."""

    kind: str  # "predicted", "given", "special", "emb", or that of a medium
    text: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """A segment of a document."""

    name: str
    tokens: int
    predicted: int
    chips: Sequence[Chip]
    left_out: int  # tokens


@dataclass(kw_only=True)
class Article:
    """A document."""

    piece: Piece  # in which it first appears
    shard: str
    meta: Sequence[tuple[str, str]] = ()
    parts: Sequence[Shown] = ()
    more_parts: int = 0
    rows: Sequence[Row] = ()
    more_pieces: int = 0
    is_reversed: bool = False
    fault: BadMedia | None = None


def pieces_of(source: Source, slot: Slot) -> list[Slot]:
    """The slots of all pieces of a slot's document: of one that is whole, the slot itself."""
    lengths = source.reversed_lengths if _is_reversed(source, slot) else source.lengths
    if not source.is_split(slot.document, int(lengths[slot.document])):
        return [slot]
    costs = source.pieces(slot.document, slot.epoch)
    return [slot._replace(piece=number, tokens=tokens) for number, (tokens, _) in enumerate(costs)]


def _is_reversed(source: Source, slot: Slot) -> bool:
    return bool(source.is_reversed(np.array([slot.epoch]), np.array([slot.document]))[0])


class ArticleWriter:
    """Writes about documents as long as the page has `room`. What cannot be read is a fault on the page, never an error."""

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, augmentation: AugmentConfig, room: Allowance) -> None:
        self.sources, self.tokenizer, self.augmentation, self.room = sources, tokenizer, augmentation, room

    def articles(self, packs: Sequence[Sequence[Piece]], documents: int) -> Iterator[Article]:
        """About the first `documents` documents of the packs, in the order of their numbers."""
        first: dict[int, Piece] = {}
        for piece in (piece for pack in packs for piece in pack):
            first.setdefault(piece.number, piece)
        for number in sorted(first)[:documents]:
            if self.room.is_full:
                return
            yield self._article(first[number])

    def _article(self, piece: Piece) -> Article:
        source, slot = self.sources[piece.slot.source], piece.slot
        corpus = source.corpus
        article = Article(piece=piece, shard=corpus.names[corpus.shard_of(slot.document)])
        try:
            document = corpus.document(slot.document)
            names = _part_names(document.parts)
            article.meta = list(self._meta(document.meta))
            article.parts = list(self._parts(source, slot, document.parts, names))
            article.more_parts = len(names) - len(article.parts)
            pieces = pieces_of(source, slot)
            article.more_pieces = max(len(pieces) - PIECES, 0)
            article.is_reversed = len(pieces) == 1 and _is_reversed(source, slot)
            article.rows = [row for each in pieces[:PIECES] for row in self._rows(source.read(each), each, len(pieces), names)]
        except BadMedia as error:
            article.fault = self._legible(error)
        return article

    def _legible(self, error: BadMedia) -> BadMedia:
        return BadMedia(error.reason, self.room.text(str(error), WORDS))

    def _meta(self, meta: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        said = [(name, value) for name, value in meta.items() if value not in ("", None, [], {})]
        for name, value in said[:META]:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield self.room.text(name, WORDS), self.room.text(text, WORDS)

    def _parts(self, source: Source, slot: Slot, parts: Sequence[Part], names: Sequence[str]) -> Iterator[Shown]:
        """The first parts of a document, as the model gets them in the slot's epoch; fewer where the page is full."""
        first = int(source.corpus.first_part[slot.document])
        document_seed = source.seed_of(source.corpus.key(slot.document), slot.epoch)
        for number, part in enumerate(parts[:PARTS]):
            if self.room.is_full:
                return
            tokens, rows = int(source.tokens[first + number]), int(source.rows[first + number])
            count, unit = (rows, "row") if rows and not tokens else (tokens, "token")  # rows: media beside the text, as CLIP's
            note = f"{count:,} {unit}{'' if count == 1 else 's'}"
            shown = Shown(name=names[number], kind=NAMES[MODALITY[type(part)]], note=note)
            try:
                if isinstance(part, Text):
                    shown.text, shown.predicted = self.room.text(part.text, CHARACTERS), part.predict
                elif isinstance(part, Audio):
                    self._show_sound(shown, source, part)
                elif rows:
                    self._show_frames(shown, source, part, keyed_hash(document_seed, number))
                else:
                    shown.note = f"{part.width} × {part.height}, shorter than image.min_side: left out"
            except BadMedia as error:
                shown.fault = self._legible(error)
            yield shown

    def _show_frames(self, shown: Shown, source: Source, part: Image | Video, seed: int) -> None:
        height, width = source.budget.frame(part)
        size = f"{part.width} × {part.height}"
        if isinstance(part, Image):
            shown.note = f"{size} → {width} × {height}, {shown.note}"
        else:
            taken = f"seconds {part.clip[0]:g} to {part.clip[1]:g} → {len(source.budget.clip(part))} frames"
            shown.note = f"{size}, {taken} of {width} × {height}, {shown.note}"
        found = pixels(part, source.budget, seed, self.augmentation)
        frames = augment(found.frames, torch.full((len(found.times),), seed), self.augmentation)
        labels = [f"{time:.2f} s" for time in found.times] if isinstance(part, Video) else [""]
        shown.frames = [self._frame(frame, label) for frame, label in zip(frames, labels, strict=True)]
        if isinstance(part, Video) and len(set(found.times)) > 1:
            clip = mp4(frames, found.times, part.clip[1])
            shown.player = self.room.uri("video/mp4", clip) if clip else ""

    def _frame(self, pixels: UInt8[Tensor, "3 H W"], label: str) -> Frame:
        height, width = pixels.shape[1:]
        times = max(SMALL // max(height, width), 1)
        uri = "" if self.room.is_full else self.room.uri("image/png", png(pixels))
        return Frame(uri=uri, width=width * times, height=height * times, is_magnified=times > 1, label=label)

    def _show_sound(self, shown: Shown, source: Source, part: Audio) -> None:
        frames, seconds = source.budget.sound(part), part.samples / part.sample_rate
        heard = min(seconds, frames * HOP / SAMPLE_RATE)
        begin = f", from second {part.start:g}" if part.start else ""
        cut = f"; the first {SECONDS:g} s are shown" if heard > SECONDS else ""
        bins = source.budget.model.audio.mel_bins
        taken = f"{seconds:.2f} s at {part.sample_rate:,} Hz{begin} → {frames:,} × {bins} log-mel"
        shown.note = f"{taken}, {shown.note}{cut}"
        mel = sound(part, source.budget).values[: round(SECONDS * SAMPLE_RATE / HOP)]
        waveform = decode_audio(part.data, start=part.start, seconds=min(heard, SECONDS))
        uri = self.room.uri("image/png", mel_png(mel))
        shown.frames = [Frame(uri=uri, width=len(mel), height=bins, is_magnified=False)]
        shown.player = self.room.uri("audio/mpeg", mp3(waveform))

    def _rows(self, reading: Reading, slot: Slot, pieces: int, names: Sequence[str]) -> Iterator[Row]:
        """The segments of a piece. `names`: of the document's parts."""
        items = _item_names(reading, names)
        for number, segment in enumerate(reading.segments):
            name = "row" if pieces == 1 else f"piece {slot.piece + 1} of {pieces}"
            if number:
                name = f"{_embedded(segment, items)}, contrasted"
            chips = [*self._chips(segment, items), *_beside(segment, items)]
            self.room.left -= sum(_CHIP_BYTES + len(chip.text.encode()) for chip in chips)
            yield Row(
                name=name,
                tokens=len(segment.tokens),
                predicted=sum(label != IGNORE for label in segment.labels),
                chips=chips,
                left_out=len(segment.tokens) - sum(chip.count for chip in chips),
            )

    def _chips(self, segment: TokenizedDocument, items: Mapping[tuple[int, int], str]) -> Iterator[Chip]:
        """The first tokens of a segment; the slots of a medium stand together."""
        predicted = _predicted(segment)
        spans = {span.start: span for span in segment.media}
        embedding = {embedding.stop - 1 for embedding in segment.embeddings if embedding.stop > embedding.start}
        position = 0
        while position < min(len(segment.tokens), TOKENS):
            token = segment.tokens[position]
            kind = "predicted" if position in predicted else "given"
            if span := spans.get(position):
                chip = Chip(kind=NAMES[span.modality], text=items[span.modality, span.item], count=span.length)
            elif segment.task == MASKED and position in predicted:
                wanted = legible(self.tokenizer.decode([segment.labels[position]]))
                chip = Chip(kind=kind, text=f"{self._character([token])[0]} → {wanted}", count=1)
            elif position in embedding or token in self.tokenizer.special:
                kind = "emb" if position in embedding else kind.replace("given", "special")
                chip = Chip(kind=kind, text=self.tokenizer.special.get(token, ""), count=1)
            else:
                text, count = self._character(segment.tokens[position : position + LONGEST])
                chip = Chip(kind=kind, text=text, count=count)
            yield chip
            position += chip.count

    def _character(self, tokens: Sequence[int]) -> tuple[str, int]:
        """The text of the first token, or of as many as it takes: a token may hold only some of a character's bytes."""
        special = self.tokenizer.special
        if tokens[0] in special:
            return special[tokens[0]], 1
        for count in range(1, len(tokens) + 1):
            if tokens[count - 1] in special:
                break
            text = self.tokenizer.decode(tokens[:count])
            if "\ufffd" not in text:
                return legible(text), count
        return legible(self.tokenizer.decode(tokens[:1])), 1


def _part_names(parts: Sequence[Part]) -> list[str]:
    """Each part's kind and its number among its kind, from 1."""
    seen: Counter[str] = Counter()
    names = []
    for part in parts:
        kind = NAMES[MODALITY[type(part)]]
        seen[kind] += 1
        names.append(f"{kind} {seen[kind]}")
    return names


def _item_names(reading: Reading, names: Sequence[str]) -> dict[tuple[int, int], str]:
    """Names of the media that segments show, by modality and item."""
    seen: Counter[int] = Counter()
    items = {}
    for number, part in reading.media:
        modality = MODALITY[type(part)]
        items[modality, seen[modality]] = names[number]
        seen[modality] += 1
    return items


def _embedded(segment: TokenizedDocument, items: Mapping[tuple[int, int], str]) -> str:
    """What a segment holds that stands for itself."""
    return items[segment.media[0].modality, segment.media[0].item] if segment.media else "text 1"


def _predicted(segment: TokenizedDocument) -> set[int]:
    """Positions whose token is asked for: where it is hidden, or else at the position before it."""
    shift = 0 if segment.task == MASKED else 1
    return {position + shift for position, label in enumerate(segment.labels) if label != IGNORE}


def _beside(segment: TokenizedDocument, items: Mapping[tuple[int, int], str]) -> Iterator[Chip]:
    """The media that are embedded, but stand in no row."""
    for embedding in segment.embeddings:
        if embedding.start == embedding.stop:
            yield Chip(kind=NAMES[embedding.modality], text=items[embedding.modality, embedding.item], count=0)

"""Made-up documents of every mixture of modalities, in packs of which some are empty: what the verified steps are taken on.

    Taste: what a pack may hold --draw--> texts, pictures, sounds, clips --Segmenter--> PackEntry --collate--> PackedBatch

Segments and tensors are made by what makes those of a run; only the texts and media are drawn instead of read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from mmpt.config import RunConfig
from mmpt.data.collate import Item, PackEntry, collate, row_widths, token_grid
from mmpt.data.form import Form
from mmpt.data.pieces import Costs
from mmpt.data.segments import MODALITY, Segmenter
from mmpt.data.tokens import Tokenizer
from mmpt.types import (
    AUDIO,
    IGNORE,
    IMAGE,
    MASKED,
    NEXT_TOKEN,
    SPAN,
    TEXT,
    VIDEO,
    Audio,
    DocumentRef,
    Image,
    LoaderState,
    LoadReport,
    PackedBatch,
    Part,
    PlanCursor,
    Text,
    TokenizedDocument,
    Video,
)

VOCABULARY = 317  # odd: no number of ranks shares its rows evenly
SENTINELS = 32
SAID = "the a red green blue disc box bar stands above below beside and then is it no yes"
WORDS = SAID.split()
STATE = LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0)
REPORT = LoadReport(milliseconds={}, tokens={}, faults=())
FEW, MANY = 5, 12  # parts of a document, short or long
MOST_DOCUMENTS = 8
MEDIA = (IMAGE, AUDIO, VIDEO)


@dataclass(frozen=True, kw_only=True)
class Taste:
    """What the documents of a pack may be."""

    modalities: tuple[int, ...] = (TEXT, *MEDIA)  # of their parts, as far as the model reads them
    documents: int = MOST_DOCUMENTS  # at most, as far as the pack holds them
    long: float = 0.0  # part of the pack that the first fills, as far as it can: a ring then has it on more than one rank
    predict: float = 0.8  # chance that a text is asked for
    faulty: float = 0.0  # chance that a medium does not decode, or a whole document does not read


TASTES = (
    Taste(long=1.0, predict=1.0),
    Taste(modalities=(TEXT, IMAGE)),
    Taste(documents=0),
    Taste(modalities=(TEXT,)),
    Taste(long=0.6, modalities=(TEXT, AUDIO, VIDEO)),
    Taste(predict=0.0),
    Taste(documents=1),
    Taste(faulty=0.3),
)
"""Of the packs of the wall. Shared by two ranks or by eight, some have no picture, no sound, no pair, no label, nothing."""


def random_tastes(packs: int, chance: np.random.Generator) -> list[Taste]:
    """Of packs that hold anything: each modality is there or not, most packs are part empty, some wholly."""
    tastes = []
    for _ in range(packs):
        modalities = tuple(m for m in (TEXT, *MEDIA) if chance.random() < 0.5) or (TEXT,)
        documents = int(chance.integers(0, MOST_DOCUMENTS))
        predict, faulty = chance.choice([0.0, 0.5, 1.0]), chance.choice([0.0, 0.0, 0.3])
        kinds = {"modalities": modalities, "documents": documents, "long": float(chance.choice([0.0, 0.6, 1.0]))}
        tastes.append(Taste(**kinds, predict=float(predict), faulty=float(faulty)))
    return tastes


@cache
def tokenizer() -> Tokenizer:
    """With the tokens of all tasks."""
    return Tokenizer.train([SAID], VOCABULARY, mask=True, sentinels=SENTINELS)


def draw(config: RunConfig, tastes: Sequence[Taste], seed: int) -> list[list[PackEntry]]:
    """The packs of a step: one for each taste. The same seed draws the same."""
    chance = np.random.default_rng(seed)
    return [_Drawer(config, taste, chance).pack(number) for number, taste in enumerate(tastes)]


def batch_of(config: RunConfig, packs: Sequence[Sequence[PackEntry]]) -> PackedBatch:
    """As a loader's worker makes it."""
    sizes = {"pack_tokens": config.data.pack_tokens, "pad": tokenizer().pad}
    return collate(packs, model=config.model, **sizes, state=STATE, report=REPORT)


class _Drawer:
    """Draws the documents of one pack."""

    def __init__(self, config: RunConfig, taste: Taste, chance: np.random.Generator) -> None:
        self.config, self.model, self.taste, self.chance = config, config.model, taste, chance
        present = {TEXT: True, IMAGE: self.model.image, AUDIO: self.model.audio, VIDEO: self.model.video}
        self.modalities = [modality for modality in taste.modalities if present[modality]]

    def pack(self, number: int) -> list[PackEntry]:
        entries: list[PackEntry] = []
        room = self.config.data.pack_tokens
        for document in range(self.taste.documents if self.modalities else 0):
            entry = self._entry(number, document, 0 if document else round(self.taste.long * room))
            if 0 < entry.tokens <= room:
                entries.append(replace(entry, ref=replace(entry.ref, position=self.config.data.pack_tokens - room)))
                room -= entry.tokens
        return entries

    def _entry(self, pack: int, number: int, fill: int) -> PackEntry:
        """A short document; or of some that are longer the one with the longest segment, if it takes `fill` tokens at most."""
        tasks = (MASKED,) if self.model.transformer.mask == "bidirectional" else (NEXT_TOKEN, NEXT_TOKEN, MASKED, SPAN)
        task = tasks[0] if fill else int(self.chance.choice(tasks))
        parts, items, segments = self._document(task, FEW, FEW)
        for words in range(FEW, fill // 2, 4):
            longer = self._document(task, MANY, words)
            if _tokens(longer[2]) <= fill and _longest(longer[2]) > _longest(segments):
                parts, items, segments = longer
        by_modality = {modality: [] for modality in MEDIA}
        for part, item in zip(parts, items, strict=True):
            if item is not None:
                by_modality[MODALITY[type(part)]].append(None if self.chance.random() < self.taste.faulty else item)
        ref = DocumentRef(source="ab"[number % 2], key=f"{pack}.{number}", epoch=0, piece=0, pack=pack, position=0, seed=0)
        if self.chance.random() < self.taste.faulty / 2:
            return PackEntry(ref=ref, tokens=_tokens(segments), segments=(), items={})
        return PackEntry(ref=ref, tokens=_tokens(segments), segments=segments, items=by_modality)

    def _document(self, task: int, count: int, words: int) -> tuple[list[Part], list[Item | None], list[TokenizedDocument]]:
        """Of up to `count` parts, and texts of up to `words` words; parts that are media have an item."""
        chosen = self.chance.choice(self.modalities, size=int(self.chance.integers(1, count + 1))).tolist()
        if not self.model.fusion:  # only the first medium of a modality is read then
            chosen = [kind for i, kind in enumerate(chosen) if kind == TEXT or kind not in chosen[:i]]
        parts = [self._part(modality, words) for modality in chosen]
        items = [None if modality == TEXT else self._item(modality) for modality in chosen]
        return parts, items, self._segments(task, parts, items)

    def _segments(self, task: int, parts: Sequence[Part], items: Sequence[Item | None]) -> list[TokenizedDocument]:
        form = Form.of(self.model, self.config.data.pack_tokens, task, SENTINELS)
        segments = Segmenter(form, tokenizer()).document(parts, self._costs(parts, items), int(self.chance.integers(2**62)))
        follows = int(self.chance.integers(2))
        return [replace(s, next_sentence=follows) if s.next_sentence != IGNORE else s for s in segments]

    def _costs(self, parts: Sequence[Part], items: Sequence[Item | None]) -> Costs:
        kinds = [MODALITY[type(part)] for part in parts]
        rows = [0 if item is None else len(item.values) for item in items]
        tokens = [
            len(tokenizer().encode(part.text)) if item is None else math.prod(token_grid(self.model, kind, item.grid))
            for part, item, kind in zip(parts, items, kinds, strict=True)
        ]
        if not self.model.fusion:
            tokens = [count if kind == TEXT else 0 for count, kind in zip(tokens, kinds, strict=True)]
        return Costs(kinds, [isinstance(part, Text) and part.predict for part in parts], tokens, rows)

    def _part(self, modality: int, words: int) -> Part:
        """Of few different contents, so that some documents show the same."""
        if modality == TEXT:
            text = " ".join(self.chance.choice(WORDS, size=int(self.chance.integers(1, words + 1))))
            return Text(text=text, predict=bool(self.chance.random() < self.taste.predict))
        data = bytes([int(self.chance.integers(24))])
        if modality == IMAGE:
            return Image(data=data, crc32=0, width=1, height=1)
        if modality == AUDIO:
            return Audio(data=data, crc32=0, sample_rate=1, samples=1)
        return Video(data=data, crc32=0, width=1, height=1, clip=(0, 1))

    def _item(self, modality: int) -> Item:
        """A medium as an encoder reads it, of any size that it may have."""
        grid = self._grid(modality)
        width, dtype = row_widths(self.model)[modality]
        shape = math.prod(grid), width
        if dtype == torch.uint8:
            values = torch.from_numpy(self.chance.integers(0, 256, shape, dtype=np.uint8))
        else:
            values = torch.from_numpy(self.chance.standard_normal(shape, dtype=np.float32))
        return Item(values=values, grid=grid, times=[0.25 * step for step in range(grid[0])])

    def _grid(self, modality: int) -> tuple[int, int, int]:
        if modality == AUDIO:
            return self.model.audio.frames_per_token * int(self.chance.integers(1, 5)), 1, 1
        image = self.model.image
        side = (self.model.frame_size if modality == VIDEO else image.size) // image.patch // image.merge
        native = image.resize == "native"
        height, width = (int(self.chance.integers(1, side + 1)) if native else side for _ in range(2))
        return int(self.chance.integers(1, 4)) if modality == VIDEO else 1, height * image.merge, width * image.merge


def _tokens(segments: Sequence[TokenizedDocument]) -> int:
    return sum(len(segment.tokens) for segment in segments)


def _longest(segments: Sequence[TokenizedDocument]) -> int:
    return max(len(segment.tokens) for segment in segments)

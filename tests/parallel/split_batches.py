"""Batches of made-up documents of all four modalities, for what splits them and what computes on the parts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from mmpt.config import ModelConfig
from mmpt.data.collate import MEDIA, Item, PackEntry, collate, row_widths
from mmpt.types import (
    AUDIO,
    IGNORE,
    IMAGE,
    NEXT_TOKEN,
    NOTHING,
    TEXT,
    VIDEO,
    DocumentRef,
    EmbeddingToken,
    LoaderState,
    LoadReport,
    MediaSpan,
    PackedBatch,
    PlanCursor,
    TokenizedDocument,
)

BLOCKS = {"dim": 16, "layers": 1, "n_heads": 2, "ffn_dim": 24}
MODEL = ModelConfig.model_validate(
    {
        "vocabulary": 48,
        "embedding_dim": 8,
        "levels": ("backbone", "tower"),
        "image": {**BLOCKS, "size": 16, "patch": 2, "merge": 2},
        "audio": {**BLOCKS, "frames_per_token": 4},
        "video": {"merge_frames": 2},
        "transformer": {**BLOCKS, "layers": 2, "n_heads": 4, "mask": "media"},
    }
)
STATE = LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0)
REPORT = LoadReport(milliseconds={}, tokens={}, faults=())

Part = tuple[int, int]
"""Modality, and tokens; a clip takes twice as many."""


@dataclass(frozen=True)
class Made:
    """A document: a segment of all parts, and if it is contrasted, one more for the first part of each modality."""

    parts: tuple[Part, ...]
    contrasted: bool = False
    predicted: bool = True  # whether its tokens have labels
    task: int = NEXT_TOKEN
    second: int | None = None  # of two texts, where the second begins
    next_sentence: int = IGNORE
    lost: bool = False  # it could not be read: padding

    @property
    def tokens(self) -> int:
        row = sum(map(tokens_of, self.parts))
        return row + sum(tokens_of(part) + 1 for part in self.sides)

    @property
    def sides(self) -> list[Part]:
        firsts: dict[int, Part] = {}
        for part in self.parts:
            firsts.setdefault(part[0], part)
        return list(firsts.values()) if self.contrasted and len(firsts) > 1 else []


made_documents = st.builds(
    Made,
    parts=st.lists(st.tuples(st.sampled_from([TEXT, *MEDIA]), st.integers(1, 7)), min_size=1, max_size=5).map(tuple),
    contrasted=st.booleans(),
    predicted=st.booleans(),
    lost=st.sampled_from([False, False, False, True]),
)
made_packs = st.lists(st.lists(made_documents, max_size=4), min_size=1, max_size=3)


def tokens_of(part: Part) -> int:
    modality, size = part
    return 2 * size if modality == VIDEO else size


def made_batch(
    packs: Sequence[Sequence[Made]],
    model: ModelConfig = MODEL,
    *,
    numbers: Sequence[int] | None = None,
    multiple: int = 8,
    mean: bool = False,
) -> PackedBatch:
    """Those packs that have these `numbers`, by default all, each as long as the longest, a multiple of `multiple`.

    `mean`: an embedding is that of all tokens of its segment.
    """
    longest = max(sum(made.tokens for made in pack) for pack in packs)
    pack_tokens = max(-(-longest // multiple), 1) * multiple
    draws = {number: random.Random(number) for number in (range(len(packs)) if numbers is None else numbers)}
    entries = [[_entry(made, model, mean, draw) for made in packs[number]] for number, draw in draws.items()]
    return collate(entries, model=model, pack_tokens=pack_tokens, pad=0, state=STATE, report=REPORT)


def _entry(made: Made, model: ModelConfig, mean: bool, draw: random.Random) -> PackEntry:
    numbers: dict[int, list[int]] = {modality: [] for modality in MEDIA}  # of each modality, the parts
    for number, (modality, _) in enumerate(made.parts):
        if modality != TEXT:
            numbers[modality].append(number)
    items = {m: [None if made.lost else _item(model, made.parts[i], draw) for i in found] for m, found in numbers.items()}
    row = _segment(made.parts, draw, made)
    sides = [_segment((part,), draw, made, mean=mean, side=True) for part in made.sides]
    segments = () if made.lost else (row, *sides)
    ref = DocumentRef(source="made", key="", epoch=0, piece=0, pack=0, position=0, seed=0)
    return PackEntry(ref=ref, tokens=made.tokens, segments=segments, items=items)


def _segment(parts: Sequence[Part], draw: random.Random, made: Made, mean: bool = False, side: bool = False) -> TokenizedDocument:
    """Parts one behind the other; a side of a contrast has no labels, and ends with the token of its embedding."""
    length = sum(map(tokens_of, parts)) + side
    tokens = [draw.randrange(1, 48) for _ in range(length)]
    labels = [IGNORE] * length
    media, start, seen = [], 0, dict.fromkeys(MEDIA, 0)
    for part in parts:
        stop = start + tokens_of(part)
        if part[0] == TEXT and made.predicted and not side:
            labels[start:stop] = [draw.randrange(1, 48) for _ in range(start, stop)]
        if part[0] != TEXT:
            media.append(MediaSpan(start=start, length=stop - start, modality=part[0], item=seen[part[0]]))
            seen[part[0]] += 1
        start = stop
    item = NOTHING if parts[0][0] == TEXT else 0
    first = 0 if mean else length - 1
    embedding = EmbeddingToken(start=first, stop=length, modality=parts[0][0], item=item, content=draw.randrange(1 << 40))
    kinds = {} if side else {"task": made.task, "second": made.second, "next_sentence": made.next_sentence}
    return TokenizedDocument(
        tokens=tuple(tokens), labels=tuple(labels), media=tuple(media), embeddings=(embedding,) if side else (), **kinds
    )


def _item(model: ModelConfig, part: Part, draw: random.Random) -> Item:
    """Two rows of patches for a row of tokens, four frames of a sound for one; a clip has three frames, which make two steps."""
    modality, size = part
    width, dtype = row_widths(model)[modality]
    grid = {IMAGE: (1, 2, 2 * size), AUDIO: (4 * size, 1, 1), VIDEO: (3, 2, 2 * size)}[modality]
    generator = torch.Generator().manual_seed(draw.randrange(1 << 40))
    shape = (grid[0] * grid[1] * grid[2], width)
    values = torch.randn(shape, generator=generator) if modality == AUDIO else torch.randint(256, shape, generator=generator)
    return Item(values=values.to(dtype), grid=grid, times=[draw.random() for _ in range(grid[0])])


def without_fusion(batch: PackedBatch) -> PackedBatch:
    """The same with media beside the tokens, not among them."""
    nothing = torch.full_like(batch.tokens, NOTHING)
    shown = batch.media_index >= 0
    pool = torch.where(shown, NOTHING, batch.pool_index)
    return replace(batch, media_index=nothing, span_ids=nothing, pool_index=pool)

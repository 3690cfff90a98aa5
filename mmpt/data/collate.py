"""Packs of segments and their decoded media to the tensors of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmpt.config import ModelConfig
from mmpt.data.positions import Grid, positions
from mmpt.types import (
    AUDIO,
    IGNORE,
    IMAGE,
    KINDS,
    NOTHING,
    TEXT,
    VIDEO,
    DocumentRef,
    EmbeddingSlots,
    LoaderState,
    LoadReport,
    MediaBatch,
    PackedBatch,
    Segments,
    TokenizedDocument,
)

MEDIA = (IMAGE, AUDIO, VIDEO)
"""The order in which the features of the modalities stand end to end, which `media_index` counts through."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A medium as an encoder reads it; see MediaBatch."""

    values: Tensor  # (rows, values)
    grid: tuple[int, int, int]  # rows along time, height, width
    times: Sequence[float]  # seconds into the file, one for each step along time


@dataclass(frozen=True, kw_only=True)
class PackEntry:
    """A document, or a piece of one, as a pack holds it."""

    ref: DocumentRef
    tokens: int  # that it takes in the pack
    segments: Sequence[TokenizedDocument]  # none where it could not be read: it is padding then
    items: Mapping[int, Sequence[Item | None]]  # by modality; None for one that could not be decoded


def row_widths(model: ModelConfig) -> dict[int, tuple[int, torch.dtype]]:
    """Values of a row of each modality, and their type; none where the model has no encoder."""
    patch = 3 * model.image.patch**2 if model.image else 0
    bins = model.audio.mel_bins if model.audio else 0
    return {IMAGE: (patch, torch.uint8), AUDIO: (bins, torch.float32), VIDEO: (patch if model.video else 0, torch.uint8)}


def collate(
    packs: Sequence[Sequence[PackEntry]],
    *,
    model: ModelConfig,
    pack_tokens: int,
    pad: int,
    state: LoaderState,
    report: LoadReport,
) -> PackedBatch:
    """The packs end to end, each padded to `pack_tokens`, as `model` reads them.

    The slots of a medium that could not be decoded have no features, and its embedding is left out: what remains are tokens
    without loss, as many as were planned.
    """
    rows = _Rows(len(packs) * pack_tokens, pad, model)
    for number, pack in enumerate(packs):
        total = sum(entry.tokens for entry in pack)
        assert total <= pack_tokens, f"a pack holds {total} tokens, more than {pack_tokens}"
        rows.position, rows.pack = number * pack_tokens, number
        for entry in pack:
            rows.add(entry)
    entries = [entry for pack in packs for entry in pack]
    media = {modality: _media_batch(entries, modality, *width) for modality, width in row_widths(model).items()}
    return PackedBatch(
        **{name: torch.from_numpy(values) for name, values in rows.finished().items()},
        images=media[IMAGE],
        audios=media[AUDIO],
        videos=media[VIDEO],
        slots=EmbeddingSlots(**_columns(rows.slots, "modality", "item", "pair", "content")),
        segments=Segments(**_columns(rows.segments, "document", "task", "next_sentence", "pack", "first")),
        packs=len(packs),
        kinds=torch.tensor([_kind(shown) for shown in rows.shown], dtype=torch.int64),
        provenance=tuple(entry.ref for entry in entries),
        state=state,
        report=report,
    )


def _columns(rows: Sequence[tuple[int, ...]], *names: str) -> dict[str, Tensor]:
    columns = torch.tensor(rows, dtype=torch.int64).reshape(-1, len(names)).T.contiguous()
    return dict(zip(names, columns, strict=True))


def _media_batch(entries: Sequence[PackEntry], modality: int, width: int, dtype: torch.dtype) -> MediaBatch:
    items = [item for entry in entries for item in entry.items.get(modality, ()) if item is not None]
    values = [torch.empty(0, width, dtype=dtype), *(item.values for item in items)]
    lengths = torch.tensor([0, *(len(item.values) for item in items)])
    return MediaBatch(
        values=torch.cat(values),
        cu_seqlens=lengths.cumsum(0),
        grid=torch.tensor([item.grid for item in items], dtype=torch.int64).reshape(-1, 3),
        times=torch.tensor([time for item in items for time in item.times], dtype=torch.float32),
    )


@dataclass(frozen=True)
class _Shown:
    """A decoded item within its batch."""

    item: int  # number among the batch's items of its modality
    feature: int  # number of its first feature among those
    grid: Grid  # of its features


class _Rows:
    """The per-token arrays of a batch in the making, and what they point at."""

    def __init__(self, length: int, pad: int, model: ModelConfig) -> None:
        fills = {"tokens": pad, "labels": IGNORE, "token_types": 0, "document_ids": NOTHING}
        fills |= {"media_index": NOTHING, "pool_index": NOTHING, "span_ids": NOTHING}
        self.arrays = {name: np.full(length, fill, dtype=np.int64) for name, fill in fills.items()}
        self.axes = 3 if model.transformer.rope_sections else 1
        self.arrays["position_ids"] = np.zeros((self.axes, length), dtype=np.int64)
        self.model = model
        self.position = 0
        self.documents = 0
        self.spans: dict[int, list[tuple[slice, _Shown]]] = {modality: [] for modality in MEDIA}
        self.items, self.features = dict.fromkeys(MEDIA, 0), dict.fromkeys(MEDIA, 0)
        self.slots: list[tuple[int, int, int, int]] = []  # modality, item, pair, content
        self.segments: list[tuple[int, int, int, int, int]] = []  # document, task, next_sentence, pack, first
        self.shown: list[set[int]] = []  # modalities of the media of each document
        self.pack = 0  # number of the pack that is being filled

    def add(self, entry: PackEntry) -> None:
        end = self.position + entry.tokens
        shown = self._shown(entry)
        self.shown.append(set())
        for segment in entry.segments:
            self._add_segment(segment, shown)
        assert not entry.segments or self.position == end, f"{entry.ref.key} has other than {entry.tokens} tokens"
        self.position = end
        self.documents += 1

    def _shown(self, entry: PackEntry) -> dict[tuple[int, int], _Shown]:
        """The decoded items of a document, by modality and number within it."""
        shown = {}
        for modality, items in entry.items.items():
            for number, item in enumerate(items):
                if item is not None:
                    grid = token_grid(self.model, modality, item.grid)
                    shown[modality, number] = _Shown(self.items[modality], self.features[modality], grid)
                    self.items[modality] += 1
                    self.features[modality] += math.prod(grid)
        return shown

    def _add_segment(self, segment: TokenizedDocument, shown: Mapping[tuple[int, int], _Shown]) -> None:
        start, length = self.position, len(segment.tokens)
        here = slice(start, start + length)
        self.arrays["tokens"][here] = segment.tokens
        self.arrays["labels"][here] = segment.labels
        self.arrays["document_ids"][here] = len(self.segments)
        if segment.second is not None:
            self.arrays["token_types"][start + segment.second : start + length] = 1
        grids = {}
        for span in segment.media:
            if found := shown.get((span.modality, span.item)):
                assert math.prod(found.grid) == span.length, f"{span.length} slots for a medium of {found.grid} tokens"
                grids[span.start] = found.grid
                slots = slice(start + span.start, start + span.start + span.length)
                self.spans[span.modality].append((slots, found))
                self.shown[-1].add(span.modality)
        self.arrays["position_ids"][:, here] = positions(length, self.axes, grids)
        for embedding in segment.embeddings:
            found = shown.get((embedding.modality, embedding.item))
            if embedding.modality == TEXT or found:
                self.arrays["pool_index"][start + embedding.start : start + embedding.stop] = len(self.slots)
                item = found.item if found else NOTHING
                self.slots.append((embedding.modality, item, self.documents, embedding.content))
                self.shown[-1] |= {embedding.modality} - {TEXT}
        self.segments.append((self.documents, segment.task, segment.next_sentence, self.pack, start))
        self.position += length

    def finished(self) -> dict[str, np.ndarray]:
        """The arrays, now that it is known how many features stand before those of each modality."""
        base = items = 0
        for modality in MEDIA:
            for slots, shown in self.spans[modality]:
                first = base + shown.feature
                self.arrays["media_index"][slots] = np.arange(first, first + slots.stop - slots.start)
                self.arrays["span_ids"][slots] = items + shown.item
            base, items = base + self.features[modality], items + self.items[modality]
        return self.arrays


def _kind(shown: set[int]) -> int:
    """The number in KINDS of a document that shows media of these modalities."""
    return KINDS.index("mixed") if len(shown) > 1 else next(iter(shown), TEXT)


def token_grid(model: ModelConfig, modality: int, rows: tuple[int, int, int]) -> Grid:
    """Tokens of an item along time, height and width, of its rows along these."""
    time, height, width = rows
    if modality == AUDIO:
        return time // model.audio.frames_per_token, 1, 1
    steps = -(-time // model.video.merge_frames) if modality == VIDEO else time
    return steps, height // model.image.merge, width // model.image.merge

"""Packs of segments and their decoded media to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmpt.types import (
    AUDIO,
    IGNORE,
    IMAGE,
    NOTHING,
    TEXT,
    VIDEO,
    DocumentRef,
    EmbeddingSlots,
    LoaderState,
    LoadReport,
    MediaBatch,
    PackedBatch,
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


def collate(
    packs: Sequence[Sequence[PackEntry]],
    *,
    widths: Mapping[int, tuple[int, torch.dtype]],
    pack_tokens: int,
    pad: int,
    state: LoaderState,
    report: LoadReport,
) -> PackedBatch:
    """The packs end to end, each padded to `pack_tokens`. `widths`: values of a row of each modality, and their type.

    The slots of a medium that could not be decoded have no features, and its embedding is left out: what remains are tokens
    without loss, as many as were planned.
    """
    rows = _Rows(len(packs) * pack_tokens, pad)
    for number, pack in enumerate(packs):
        total = sum(entry.tokens for entry in pack)
        assert total <= pack_tokens, f"a pack holds {total} tokens, more than {pack_tokens}"
        rows.position = number * pack_tokens
        for entry in pack:
            rows.add(entry)
    entries = [entry for pack in packs for entry in pack]
    slots = torch.tensor(rows.slots, dtype=torch.int64).reshape(-1, 3).T.contiguous()
    media = {modality: _media_batch(entries, modality, *widths[modality]) for modality in MEDIA}
    return PackedBatch(
        **{name: torch.from_numpy(values) for name, values in rows.finished().items()},
        images=media[IMAGE],
        audios=media[AUDIO],
        videos=media[VIDEO],
        slots=EmbeddingSlots(modality=slots[0], pair=slots[1], content=slots[2]),
        provenance=tuple(entry.ref for entry in entries),
        state=state,
        report=report,
    )


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


class _Rows:
    """The per-token arrays of a batch in the making, and what they point at."""

    def __init__(self, length: int, pad: int) -> None:
        fills = {"tokens": pad, "labels": IGNORE, "position_ids": 0, "document_ids": NOTHING}
        fills |= {"media_index": NOTHING, "pool_index": NOTHING}
        self.arrays = {name: np.full(length, fill, dtype=np.int64) for name, fill in fills.items()}
        self.position = 0
        self.segments = 0
        self.documents = 0
        self.spans: dict[int, list[tuple[slice, int]]] = {modality: [] for modality in MEDIA}  # slots, first feature
        self.features = dict.fromkeys(MEDIA, 0)
        self.slots: list[tuple[int, int, int]] = []  # modality, pair, content

    def add(self, entry: PackEntry) -> None:
        end = self.position + entry.tokens
        first = self._first_features(entry)
        for segment in entry.segments:
            self._add_segment(segment, first)
        assert not entry.segments or self.position == end, f"{entry.ref.key} has other than {entry.tokens} tokens"
        self.position = end
        self.documents += 1

    def _first_features(self, entry: PackEntry) -> dict[int, list[int | None]]:
        """Where the features of each item begin within those of its modality."""
        lengths = {(span.modality, span.item): span.length for segment in entry.segments for span in segment.media}
        first: dict[int, list[int | None]] = {}
        for modality, items in entry.items.items():
            first[modality] = []
            for number, item in enumerate(items):
                first[modality].append(None if item is None else self.features[modality])
                if item is not None:
                    self.features[modality] += lengths[modality, number]
        return first

    def _add_segment(self, segment: TokenizedDocument, first: Mapping[int, Sequence[int | None]]) -> None:
        start, length = self.position, len(segment.tokens)
        here = slice(start, start + length)
        self.arrays["tokens"][here] = segment.tokens
        self.arrays["labels"][here] = segment.labels
        self.arrays["position_ids"][here] = np.arange(length)
        self.arrays["document_ids"][here] = self.segments
        for span in segment.media:
            feature = first[span.modality][span.item]
            if feature is not None:
                slots = slice(start + span.start, start + span.start + span.length)
                self.spans[span.modality].append((slots, feature))
        for embedding in segment.embeddings:
            if embedding.modality == TEXT or first[embedding.modality][segment.media[0].item] is not None:
                self.arrays["pool_index"][start + embedding.position] = len(self.slots)
                self.slots.append((embedding.modality, self.documents, embedding.content))
        self.position += length
        self.segments += 1

    def finished(self) -> dict[str, np.ndarray]:
        """The arrays, now that it is known how many features stand before those of each modality."""
        base = 0
        for modality in MEDIA:
            for slots, feature in self.spans[modality]:
                self.arrays["media_index"][slots] = np.arange(base + feature, base + feature + slots.stop - slots.start)
            base += self.features[modality]
        return self.arrays

"""A worker's work: the packs of a request, read, decoded and collated.

Request --Source.read, decode--> PackEntry of every slot --collate--> PackedBatch
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from mmpt.config import AugmentConfig, RunConfig
from mmpt.data.collate import Item, PackEntry, collate
from mmpt.data.decode import Pixels, finish_pictures, pixels, sound
from mmpt.data.faults import BadMedia
from mmpt.data.mixture import Slot
from mmpt.data.plan import keyed_hash
from mmpt.data.segments import MODALITY
from mmpt.data.source import Reading, Source
from mmpt.types import AUDIO, IMAGE, NOTHING, VIDEO, Audio, DocumentRef, Fault, LoaderState, LoadReport, PackedBatch

CLOCK = {IMAGE: "image", AUDIO: "audio", VIDEO: "video"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A batch to be made."""

    packs: Sequence[Sequence[Slot]]
    first_pack: int  # number of the first of them within the run
    state: LoaderState  # after the batch


@dataclass
class _Batch:
    """A batch in the making."""

    packs: list[list[PackEntry]] = field(default_factory=list)
    pictures: list[tuple[dict, int, int, Pixels]] = field(default_factory=list)  # where its Item will stand, and it
    faults: list[Fault] = field(default_factory=list)
    tokens: Counter = field(default_factory=Counter)
    clock: Counter = field(default_factory=Counter)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.clock[name] += 1000 * (time.perf_counter() - began)


class Reader:
    """Makes the batch of a request. What is wrong with a document is in the batch's report."""

    def __init__(
        self,
        sources: Sequence[Source],
        config: RunConfig,
        augmentation: AugmentConfig,
        finish: Callable[[PackedBatch], PackedBatch] | None = None,
    ) -> None:
        self.sources, self.config, self.augmentation, self.finish = sources, config, augmentation, finish
        self.tokenizer = sources[0].tokenizer
        patch = 3 * config.model.image.patch**2
        self.widths = {
            IMAGE: (patch, torch.uint8),
            AUDIO: (config.model.audio.mel_bins, torch.float32),
            VIDEO: (patch, torch.uint8),
        }

    def __call__(self, request: Request) -> PackedBatch:
        """Raises UserError where the disk or the network keeps failing, or a shard was cut."""
        batch = self._read(request)
        return self.finish(batch) if self.finish else batch

    def _read(self, request: Request) -> PackedBatch:
        batch = _Batch()
        for number, slots in enumerate(request.packs, start=request.first_pack):
            position, entries = 0, []
            for slot in slots:
                entries.append(self._entry(batch, slot, number, position))
                position += slot.tokens
            batch.packs.append(entries)
        with batch.timed("image"):
            items = finish_pictures([found for *_, found in batch.pictures], self.config.model.image.patch, self.augmentation)
        for (into, modality, place, _), item in zip(batch.pictures, items, strict=True):
            into[modality][place] = item
        return collate(
            batch.packs,
            widths=self.widths,
            pack_tokens=self.config.data.pack_tokens,
            pad=self.tokenizer.pad,
            state=request.state,
            report=LoadReport(milliseconds=dict(batch.clock), tokens=dict(batch.tokens), faults=tuple(batch.faults)),
        )

    def _entry(self, batch: _Batch, slot: Slot, pack: int, position: int) -> PackEntry:
        source = self.sources[slot.source]
        batch.tokens[source.name] += slot.tokens
        key = source.corpus.key(slot.document)
        seed = source.seed_of(key, slot.epoch)
        ref = DocumentRef(
            source=source.name, key=key, epoch=slot.epoch, piece=slot.piece, pack=pack, position=position, seed=seed
        )
        try:
            with batch.timed("read"):
                reading = source.read(slot)
        except BadMedia as error:
            batch.faults.append(_fault(source, slot, key, NOTHING, error))
            return PackEntry(ref=ref, tokens=slot.tokens, segments=(), items={})
        return PackEntry(ref=ref, tokens=slot.tokens, segments=reading.segments, items=self._items(batch, source, slot, reading))

    def _items(self, batch: _Batch, source: Source, slot: Slot, reading: Reading) -> dict[int, list[Item | None]]:
        """The decoded media by modality; a place stays None for a picture that `finish_pictures` fills, or a fault."""
        items: dict[int, list[Item | None]] = {IMAGE: [], AUDIO: [], VIDEO: []}
        for number, part in reading.media:
            modality = MODALITY[type(part)]
            items[modality].append(None)
            try:
                with batch.timed(CLOCK[modality]):
                    if isinstance(part, Audio):
                        items[modality][-1] = sound(part, source.budget)
                    else:
                        found = pixels(part, source.budget, keyed_hash(reading.seed, number))
                        batch.pictures.append((items, modality, len(items[modality]) - 1, found))
            except BadMedia as error:
                batch.faults.append(_fault(source, slot, reading.key, number, error))
        return items


def _fault(source: Source, slot: Slot, key: str, part: int, error: BadMedia) -> Fault:
    shard = source.corpus.names[source.corpus.shard_of(slot.document)]
    return Fault(
        source=source.name,
        shard=shard,
        key=key,
        epoch=slot.epoch,
        piece=slot.piece,
        part=part,
        reason=error.reason,
        detail=str(error),
    )

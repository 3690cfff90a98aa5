"""A worker's work: the packs of a request, read, decoded and collated.

Request --Source.read, decode--> PackEntry of every slot --exchange of second texts, collate--> PackedBatch
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from mmpt.config import AugmentConfig, RunConfig
from mmpt.data.collate import Item, PackEntry, collate
from mmpt.data.decode import Pixels, finish_pictures, pixels, sound
from mmpt.data.faults import BadMedia
from mmpt.data.mixture import Slot
from mmpt.data.plan import keyed_hash
from mmpt.data.segments import MODALITY
from mmpt.data.sentences import exchange
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

    def __call__(self, request: Request) -> PackedBatch:
        """Raises UserError where the disk or the network keeps failing, or a shard was cut."""
        batch = self._read(request)
        return self.finish(batch) if self.finish else batch

    def _read(self, request: Request) -> PackedBatch:
        batch = _Batch()
        for number, slots in enumerate(request.packs, start=request.first_pack):
            batch.packs.append(self._pack(batch, slots, number))
        image = self.config.model.image
        with batch.timed("image"):
            items = finish_pictures([found for *_, found in batch.pictures], image.patch if image else 0, self.augmentation)
        for (into, modality, place, _), item in zip(batch.pictures, items, strict=True):
            into[modality][place] = item
        return collate(
            batch.packs,
            model=self.config.model,
            pack_tokens=self.config.data.pack_tokens,
            pad=self.tokenizer.pad,
            state=request.state,
            report=LoadReport(milliseconds=dict(batch.clock), tokens=dict(batch.tokens), faults=tuple(batch.faults)),
        )

    def _pack(self, batch: _Batch, slots: Sequence[Slot], number: int) -> list[PackEntry]:
        entries, position = [], 0
        for slot in slots:
            entries.append(self._entry(batch, slot, number, position))
            position += slot.tokens
        return self._exchanged(entries) if any(source.form.pairs for source in self.sources) else entries

    def _exchanged(self, entries: Sequence[PackEntry]) -> list[PackEntry]:
        """The documents of a pack, of which some have the second text of another: see `sentences`."""
        pairs = [i for i, entry in enumerate(entries) if entry.segments and entry.segments[0].second is not None]
        rows, refs = [entries[i].segments[0] for i in pairs], [entries[i].ref for i in pairs]
        # Not the reference's seed alone: all pieces of a document have it.
        seeds = [keyed_hash(ref.seed, ref.piece) for ref in refs]
        owners = [(ref.source, ref.key) for ref in refs]
        changed = dict(zip(pairs, exchange(rows, seeds, owners, self.sources[0].form.longest), strict=True))
        placed, position = [], 0
        for i, entry in enumerate(entries):
            if i in changed:
                entry = replace(entry, segments=(changed[i],), tokens=len(changed[i].tokens))
            placed.append(replace(entry, ref=replace(entry.ref, position=position)))
            position += entry.tokens
        return placed

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
                        found = pixels(part, source.budget, keyed_hash(reading.seed, number), self.augmentation)
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

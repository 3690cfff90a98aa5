from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpt.data.collate import MEDIA, Item, PackEntry, collate
from mmpt.data.segments import tokenize
from mmpt.data.tokens import Tokenizer
from mmpt.types import (
    AUDIO,
    IGNORE,
    IMAGE,
    NOTHING,
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
    Video,
)

STATE = LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0)
REPORT = LoadReport(milliseconds={}, tokens={}, faults=())
WIDTHS = {IMAGE: (12, torch.uint8), AUDIO: (5, torch.float32), VIDEO: (12, torch.uint8)}
MAKE = {
    TEXT: Text(text="ab"),
    IMAGE: Image(data=b"x", crc32=0, width=1, height=1),
    AUDIO: Audio(data=b"x", crc32=0, sample_rate=1, samples=1),
    VIDEO: Video(data=b"x", crc32=0, width=1, height=1, clip=(0, 1)),
}
PARTS = st.lists(st.tuples(st.sampled_from([TEXT, *MEDIA]), st.integers(1, 4), st.booleans()), min_size=1, max_size=6)
"""Modality, slots, and whether the medium is faulty."""

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def item(modality: int, slots: int, mark: int) -> Item:
    """Two frames of two rows for each slot, all of them the number `mark`."""
    width, dtype = WIDTHS[modality]
    return Item(values=torch.full((4 * slots, width), mark, dtype=dtype), grid=(2, 2, slots), times=(0.0, float(mark)))


def entry(key: str, parts: list[tuple[int, int, bool]], tokenizer: Tokenizer, first_mark: int = 0) -> PackEntry:
    made: list[Part] = [MAKE[modality] for modality, _, _ in parts]
    segments = tokenize(made, [slots for _, slots, _ in parts], tokenizer)
    items: dict[int, list[Item | None]] = {modality: [] for modality in MEDIA}
    for mark, (modality, slots, faulty) in enumerate(parts, start=first_mark):
        if modality != TEXT:
            items[modality].append(None if faulty else item(modality, slots, mark))
    ref = DocumentRef(source="s", key=key, epoch=0, piece=0, pack=0, position=0, seed=0)
    return PackEntry(ref=ref, tokens=sum(len(segment.tokens) for segment in segments), segments=segments, items=items)


def collated(packs: Sequence[Sequence[PackEntry]], pack_tokens: int = 256) -> PackedBatch:
    return collate(packs, widths=WIDTHS, pack_tokens=pack_tokens, pad=0, state=STATE, report=REPORT)


@relaxed
@given(packs=st.lists(st.lists(PARTS, min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_batch_holds_its_documents_and_padding(tokenizer: Tokenizer, packs: list[list[list]]):
    entries = [[entry(f"{p}.{d}", parts, tokenizer) for d, parts in enumerate(pack)] for p, pack in enumerate(packs)]
    width = 1024
    batch = collated(entries, width)
    assert [ref.key for ref in batch.provenance] == [one.ref.key for pack in entries for one in pack]
    segment_number = 0
    for p, pack in enumerate(entries):
        position = p * width
        for one in pack:
            for segment in one.segments:
                rows = slice(position, position + len(segment.tokens))
                assert batch.tokens[rows].tolist() == list(segment.tokens)
                assert batch.labels[rows].tolist() == list(segment.labels)
                assert batch.position_ids[rows].tolist() == list(range(len(segment.tokens)))
                assert set(batch.document_ids[rows].tolist()) <= {segment_number}
                segment_number += 1
                position += len(segment.tokens)
        padding = slice(position, (p + 1) * width)
        assert set(batch.tokens[padding].tolist()) == {0} and set(batch.labels[padding].tolist()) == {IGNORE}
        assert set(batch.position_ids[padding].tolist()) == {0}
        for name in ("document_ids", "media_index", "pool_index"):
            assert set(getattr(batch, name)[padding].tolist()) == {NOTHING}


@relaxed
@given(packs=st.lists(st.lists(PARTS, min_size=1, max_size=3), min_size=1, max_size=2))
def test_every_slot_shows_its_own_medium(tokenizer: Tokenizer, packs: list[list[list]]):
    marks, entries = 1, []
    for pack in packs:
        entries.append([])
        for parts in pack:
            entries[-1].append(entry(str(marks), parts, tokenizer, marks))
            marks += len(parts)
    batch = collated(entries)
    media = (batch.images, batch.audios, batch.videos)
    features = torch.cat([each.values[::4, 0].float() for each in media])  # a feature stands for four rows
    position, number = 0, 0
    for p, pack in enumerate(entries):
        position = p * 256
        for one in pack:
            for segment in one.segments:
                for span in segment.media:
                    shown = batch.media_index[position + span.start : position + span.start + span.length]
                    wanted = one.items[span.modality][span.item]
                    if wanted is None:
                        assert set(shown.tolist()) == {NOTHING}
                    else:
                        assert set(features[shown].tolist()) == {float(wanted.values[0, 0])}
                for embedding in segment.embeddings:
                    slot = int(batch.pool_index[position + embedding.position])
                    faulty = embedding.modality != TEXT and one.items[embedding.modality][segment.media[0].item] is None
                    assert (slot == NOTHING) == faulty
                    if slot != NOTHING:
                        found = batch.slots.modality[slot], batch.slots.content[slot], batch.slots.pair[slot]
                        assert found == (embedding.modality, embedding.content, number)
                position += len(segment.tokens)
            number += 1


def test_media_of_a_batch(tokenizer: Tokenizer):
    parts = [(IMAGE, 1, False), (VIDEO, 2, False), (IMAGE, 3, False), (AUDIO, 1, True)]
    batch = collated([[entry("a", parts, tokenizer)]])
    assert batch.images.cu_seqlens.tolist() == [0, 4, 16] and batch.images.grid.tolist() == [[2, 2, 1], [2, 2, 3]]
    assert batch.images.times.tolist() == [0.0, 0.0, 0.0, 2.0] and batch.images.values.dtype == torch.uint8
    assert batch.videos.cu_seqlens.tolist() == [0, 8]
    assert batch.audios.values.shape == (0, 5) and batch.audios.values.dtype == torch.float32


def test_a_batch_without_media_is_valid(tokenizer: Tokenizer):
    batch = collated([[entry("a", [(TEXT, 1, False)], tokenizer)]])
    assert batch.images.values.shape == (0, 12) and batch.images.grid.shape == (0, 3)
    assert batch.images.cu_seqlens.tolist() == [0] and batch.images.times.shape == (0,)
    assert batch.slots.pair.shape == batch.slots.content.shape == (0,) and batch.slots.pair.dtype == torch.int64
    assert (batch.media_index == NOTHING).all() and (batch.pool_index == NOTHING).all()


def test_a_document_that_could_not_be_read_is_padding_of_its_length(tokenizer: Tokenizer):
    one, other = entry("a", [(TEXT, 1, False)], tokenizer), entry("b", [(TEXT, 1, False)], tokenizer)
    gone = PackEntry(ref=one.ref, tokens=one.tokens, segments=(), items={})
    batch, whole = collated([[gone, other]]), collated([[one, other]])
    assert (batch.document_ids[: one.tokens] == NOTHING).all() and (batch.labels[: one.tokens] == IGNORE).all()
    rest = slice(one.tokens, None)
    assert torch.equal(batch.tokens[rest], whole.tokens[rest]) and torch.equal(batch.labels[rest], whole.labels[rest])
    assert batch.documents == 2


def test_an_overfull_pack_is_refused(tokenizer: Tokenizer):
    with pytest.raises(AssertionError, match="more than 4"):
        collated([[entry("a", [(TEXT, 1, False)] * 3, tokenizer)]], pack_tokens=4)

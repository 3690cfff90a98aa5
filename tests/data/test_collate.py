from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import costs_of, task_tokenizer

from mmpt.config import ModelConfig
from mmpt.data.collate import MEDIA, Item, PackEntry, collate, row_widths
from mmpt.data.form import Form
from mmpt.data.segments import Segmenter
from mmpt.types import (
    AUDIO,
    IGNORE,
    IMAGE,
    KINDS,
    MASKED,
    MODALITIES,
    NEXT_TOKEN,
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
    TokenizedDocument,
    Video,
)

STATE = LoaderState(fingerprint={}, cursor=PlanCursor(window=0, pack=0, sources={}), packs_consumed=0)
REPORT = LoadReport(milliseconds={}, tokens={}, faults=())
SMALL = {"dim": 16, "n_heads": 2}
MODEL = ModelConfig.model_validate(
    {
        "image": {**SMALL, "size": 8, "patch": 2, "merge": 2},
        "audio": {**SMALL, "frames_per_token": 4},
        "video": {"merge_frames": 2},
        "transformer": SMALL,
    }
)
THREE_AXES = MODEL.model_copy(update={"transformer": MODEL.transformer.model_copy(update={"rope_sections": (2, 1, 1)})})
MAKE = {
    TEXT: Text(text="ab"),
    IMAGE: Image(data=b"x", crc32=0, width=1, height=1),
    AUDIO: Audio(data=b"x", crc32=0, sample_rate=1, samples=1),
    VIDEO: Video(data=b"x", crc32=0, width=1, height=1, clip=(0, 1)),
}
PARTS = st.lists(st.tuples(st.sampled_from([TEXT, *MEDIA]), st.integers(1, 4), st.booleans()), min_size=1, max_size=6)
"""Modality, slots, and whether the medium is faulty."""
FORMS = st.builds(Form, longest=st.just(512), fusion=st.booleans(), mean=st.booleans(), is_causal=st.booleans())

PLAIN = Form(longest=512)

relaxed = settings(deadline=None)


def item(modality: int, slots: int, mark: int) -> Item:
    """Two rows of patches for a row of tokens, four frames of a sound for one; a clip has three frames, which make two steps."""
    width, dtype = row_widths(MODEL)[modality]
    grid = {IMAGE: (1, 2, 2 * slots), AUDIO: (4 * slots, 1, 1), VIDEO: (3, 2, 2 * slots)}[modality]
    times = tuple(float(mark) for _ in range(grid[0]))
    return Item(values=torch.full((grid[0] * grid[1] * grid[2], width), mark, dtype=dtype), grid=grid, times=times)


def slots_of(modality: int, slots: int) -> int:
    return 2 * slots if modality == VIDEO else slots


def entry(key: str, parts: list[tuple[int, int, bool]], form: Form = PLAIN, first_mark: int = 0) -> PackEntry:
    made: list[Part] = [MAKE[modality] for modality, _, _ in parts]
    slots = [0 if modality == TEXT else slots_of(modality, slots) for modality, slots, _ in parts]
    segments = Segmenter(form, task_tokenizer()).document(made, costs_of(made, slots, task_tokenizer(), form.fusion))
    items: dict[int, list[Item | None]] = {modality: [] for modality in MEDIA}
    for mark, (modality, slots, faulty) in enumerate(parts, start=first_mark):
        if modality != TEXT:
            items[modality].append(None if faulty else item(modality, slots, mark))
    ref = DocumentRef(source="s", key=key, epoch=0, piece=0, pack=0, position=0, seed=0)
    return PackEntry(ref=ref, tokens=sum(len(segment.tokens) for segment in segments), segments=segments, items=items)


def modalities_of(segment: TokenizedDocument, one: PackEntry) -> Iterator[int]:
    """Of the media that a segment shows or contrasts."""
    for span in segment.media:
        if one.items[span.modality][span.item] is not None:
            yield span.modality
    for embedding in segment.embeddings:
        if embedding.modality != TEXT and one.items[embedding.modality][embedding.item] is not None:
            yield embedding.modality


def collated(packs: Sequence[Sequence[PackEntry]], pack_tokens: int = 256, model: ModelConfig = MODEL) -> PackedBatch:
    return collate(packs, model=model, pack_tokens=pack_tokens, pad=0, state=STATE, report=REPORT)


@relaxed
@given(packs=st.lists(st.lists(PARTS, min_size=1, max_size=3), min_size=1, max_size=3), form=FORMS)
def test_a_batch_holds_its_documents_and_padding(packs: list[list[list]], form: Form):
    entries = [[entry(f"{p}.{d}", parts, form) for d, parts in enumerate(pack)] for p, pack in enumerate(packs)]
    width = 1024
    batch = collated(entries, width)
    assert [ref.key for ref in batch.provenance] == [one.ref.key for pack in entries for one in pack]
    assert batch.packs == len(packs) and batch.position_ids.shape == (1, len(batch.tokens))
    segment_number = 0
    for p, pack in enumerate(entries):
        position = p * width
        for one in pack:
            for segment in one.segments:
                rows = slice(position, position + len(segment.tokens))
                assert batch.tokens[rows].tolist() == list(segment.tokens)
                assert batch.labels[rows].tolist() == list(segment.labels)
                assert batch.position_ids[0, rows].tolist() == list(range(len(segment.tokens)))
                assert set(batch.document_ids[rows].tolist()) <= {segment_number}
                segment_number += 1
                position += len(segment.tokens)
        padding = slice(position, (p + 1) * width)
        assert set(batch.tokens[padding].tolist()) == {0} and set(batch.labels[padding].tolist()) == {IGNORE}
        assert set(batch.position_ids[:, padding].flatten().tolist()) == {0} == set(batch.token_types.tolist())
        for name in ("document_ids", "media_index", "pool_index", "span_ids"):
            assert set(getattr(batch, name)[padding].tolist()) == {NOTHING}
    owners = [number for number, one in enumerate(one for pack in entries for one in pack) for _ in one.segments]
    assert batch.segments.document.tolist() == owners
    assert [int((batch.document_ids == n).int().argmax()) for n in range(segment_number)] == batch.segments.first.tolist()
    assert (batch.segments.first // width).tolist() == batch.segments.pack.tolist()
    shown = [{m for segment in one.segments for m in modalities_of(segment, one)} for pack in entries for one in pack]
    kinds = ["mixed" if len(found) > 1 else MODALITIES[next(iter(found), TEXT)] for found in shown]
    assert [KINDS[kind] for kind in batch.kinds.tolist()] == kinds
    assert set(batch.segments.task.tolist()) == {NEXT_TOKEN} and set(batch.segments.next_sentence.tolist()) == {IGNORE}


@relaxed
@given(packs=st.lists(st.lists(PARTS, min_size=1, max_size=3), min_size=1, max_size=2), form=FORMS)
def test_every_slot_shows_its_own_medium(packs: list[list[list]], form: Form):
    marks, entries = 1, []
    for pack in packs:
        entries.append([])
        for parts in pack:
            entries[-1].append(entry(str(marks), parts, form, marks))
            marks += len(parts)
    batch = collated(entries)
    features = torch.cat([marks_of(batch, modality) for modality in MEDIA])
    items = [float(media.values[start, 0]) for media in batch.media.values() for start in media.cu_seqlens[:-1].tolist()]
    number, expected_slots = 0, []
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
                        numbers = batch.span_ids[position + span.start : position + span.start + span.length]
                        assert len(set(numbers.tolist())) == 1 and items[int(numbers[0])] == float(wanted.values[0, 0])
                for embedding in segment.embeddings:
                    wanted = None if embedding.modality == TEXT else one.items[embedding.modality][embedding.item]
                    pooled = batch.pool_index[position + embedding.start : position + embedding.stop]
                    if embedding.modality != TEXT and wanted is None:
                        assert set(pooled.tolist()) <= {NOTHING}
                        continue
                    slot = len(expected_slots)
                    expected_slots.append((embedding.modality, embedding.content, number))
                    assert set(pooled.tolist()) == ({slot} if embedding.start < embedding.stop else set())
                    assert shown_item(batch, slot) == (None if wanted is None else float(wanted.values[0, 0]))
                position += len(segment.tokens)
            number += 1
    columns = batch.slots.modality.tolist(), batch.slots.content.tolist(), batch.slots.pair.tolist()
    assert list(zip(*columns, strict=True)) == expected_slots


def marks_of(batch: PackedBatch, modality: int) -> torch.Tensor:
    """The mark of every feature of a modality, which all rows of its item have."""
    media, marks = batch.media[modality], []
    for item, (time, height, width) in enumerate(media.grid.tolist()):
        of_step = {IMAGE: time, AUDIO: time // 4, VIDEO: -(-time // 2)}[modality]
        count = of_step if modality == AUDIO else of_step * (height // 2) * (width // 2)
        marks.append(media.values[media.cu_seqlens[item], :1].float().expand(count))
    return torch.cat([torch.zeros(0), *marks])


def shown_item(batch: PackedBatch, slot: int) -> float | None:
    """The mark of the item that a slot stands for."""
    modality, number = int(batch.slots.modality[slot]), int(batch.slots.item[slot])
    if modality == TEXT:
        assert number == NOTHING
        return None
    media = batch.media[modality]
    return float(media.values[media.cu_seqlens[number], 0])


def test_items_are_numbered_among_those_that_were_decoded():
    one = entry("a", [(IMAGE, 1, True), (TEXT, 1, False), (AUDIO, 1, False)])
    other = entry("b", [(TEXT, 1, False), (IMAGE, 1, False), (AUDIO, 1, False)])
    batch = collated([[one], [other]])
    found = list(zip(batch.slots.pair.tolist(), batch.slots.modality.tolist(), batch.slots.item.tolist(), strict=True))
    assert found == [(0, TEXT, NOTHING), (0, AUDIO, 0), (1, TEXT, NOTHING), (1, IMAGE, 0), (1, AUDIO, 1)]


def test_media_of_a_batch():
    parts = [(IMAGE, 1, False), (VIDEO, 2, False), (IMAGE, 3, False), (AUDIO, 1, True)]
    batch = collated([[entry("a", parts)]])
    assert batch.images.cu_seqlens.tolist() == [0, 4, 16] and batch.images.grid.tolist() == [[1, 2, 2], [1, 2, 6]]
    assert batch.images.times.tolist() == [0.0, 2.0] and batch.images.values.dtype == torch.uint8
    assert batch.videos.cu_seqlens.tolist() == [0, 24] and batch.videos.times.tolist() == [1.0] * 3
    assert batch.audios.values.shape == (0, 80) and batch.audios.values.dtype == torch.float32


def test_a_batch_without_media_is_valid():
    batch = collated([[entry("a", [(TEXT, 1, False)])]])
    assert batch.images.values.shape == (0, 12) and batch.images.grid.shape == (0, 3)
    assert batch.images.cu_seqlens.tolist() == [0] and batch.images.times.shape == (0,)
    assert batch.slots.pair.shape == batch.slots.item.shape == (0,) and batch.slots.pair.dtype == torch.int64
    assert (batch.media_index == NOTHING).all() and (batch.pool_index == NOTHING).all()


def test_a_model_of_texts_alone_reads_rows_of_nothing():
    batch = collated([[entry("a", [(TEXT, 1, False)])]], model=ModelConfig())
    assert [media.values.shape for media in batch.media.values()] == [(0, 0)] * 3


def test_places_on_three_axes():
    """A word, <bos> before it, a clip of two steps of one row of two tokens, then <eos> and the rest behind it."""
    batch = collated([[entry("a", [(VIDEO, 2, False), (TEXT, 1, False)])]], model=THREE_AXES)
    words = len(task_tokenizer().encode("ab"))
    row, text = 4 + 1 + words + 2, words + 2
    behind = list(range(2, 2 + row - 4))
    assert batch.position_ids[:, :row].tolist() == [[0, 0, 1, 1, *behind], [0, 0, 0, 0, *behind], [0, 1, 0, 1, *behind]]
    assert batch.position_ids[:, row : row + text].tolist() == [list(range(text))] * 3
    faulty = collated([[entry("a", [(VIDEO, 2, True), (TEXT, 1, False)])]], model=THREE_AXES)
    assert faulty.position_ids[:, :row].tolist() == [list(range(row))] * 3


def test_the_second_text_has_a_type_of_its_own():
    form = Form(longest=512, task=MASKED, pairs=True)
    one = entry("a", [(TEXT, 1, False)] * 2, form)
    (segment,) = one.segments
    batch = collated([[replace(one, segments=(replace(segment, next_sentence=1),)), entry("b", [(TEXT, 1, False)], form)]])
    assert batch.token_types.tolist()[: one.tokens] == [0] * segment.second + [1] * (one.tokens - segment.second)
    assert batch.segments.next_sentence.tolist()[0] == 1 and batch.segments.task.tolist() == [MASKED] * 2


def test_a_document_that_could_not_be_read_is_padding_of_its_length():
    one, other = entry("a", [(TEXT, 1, False)]), entry("b", [(TEXT, 1, False)])
    gone = PackEntry(ref=one.ref, tokens=one.tokens, segments=(), items={})
    batch, whole = collated([[gone, other]]), collated([[one, other]])
    assert (batch.document_ids[: one.tokens] == NOTHING).all() and (batch.labels[: one.tokens] == IGNORE).all()
    rest = slice(one.tokens, None)
    assert torch.equal(batch.tokens[rest], whole.tokens[rest]) and torch.equal(batch.labels[rest], whole.labels[rest])
    assert batch.documents == 2 and batch.segments.document.tolist() == [1]


def test_an_overfull_pack_is_refused():
    with pytest.raises(AssertionError, match="more than 4"):
        collated([[entry("a", [(TEXT, 1, False)] * 3)]], pack_tokens=4)


def test_a_medium_of_another_size_than_its_slots_is_refused():
    one = entry("a", [(IMAGE, 3, False)])
    with pytest.raises(AssertionError, match="3 slots for a medium of"):
        collated([[replace(one, items={**one.items, IMAGE: [item(IMAGE, 2, 0)]})]])

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpt.data.packing import PackEntry, best_fit_decreasing, collate, content_hash, document_length, next_fit, tokenize
from mmpt.data.tokens import Tokenizer
from mmpt.types import (
    IGNORE,
    IMAGE,
    NOTHING,
    TEXT,
    Document,
    DocumentRef,
    Image,
    LoaderState,
    PackedBatch,
    Part,
    Text,
    TokenizedDocument,
)

STATE = LoaderState(fingerprint="", window=0, pack=0, packs_consumed=0)
SLOTS = 4  # tokens of a picture

texts = st.builds(lambda text, predict: Text(text=text, predict=predict), st.text(max_size=12), st.booleans())
images = st.builds(lambda data: Image(data=data, width=1, height=1), st.binary(min_size=1, max_size=3))
documents = st.lists(texts | images, min_size=1, max_size=6).map(lambda parts: document(*parts))
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def document(*parts: Part) -> Document:
    return Document(key="k", source="s", parts=parts, meta={})


def image(data: bytes) -> Image:
    return Image(data=data, width=1, height=1)


def entry(key: str, segments: Sequence[TokenizedDocument]) -> PackEntry:
    return PackEntry(ref=DocumentRef(source="s", key=key, epoch=0, pack=0), segments=segments)


def collated(packs: list[list[PackEntry]], items: int, pack_tokens: int = 256) -> PackedBatch:
    patches = torch.arange(items * SLOTS * 4).to(torch.uint8)[:, None].expand(-1, 12).contiguous()
    return collate(packs, patches, grid=(4, 4), merge=2, pack_tokens=pack_tokens, pad=0, state=STATE)


def test_a_picture_and_its_name(tokenizer: Tokenizer):
    name = tokenizer.encode("red disc")
    row, text = tokenize(document(image(b"x"), Text(text="red disc")), tokenizer, SLOTS)
    assert row.tokens == (*[tokenizer.image] * SLOTS, tokenizer.emb, tokenizer.bos, *name, tokenizer.eos)
    assert row.labels == (*[IGNORE] * (SLOTS + 1), *name, tokenizer.eos, IGNORE)
    assert [(span.start, span.length, span.item) for span in row.media] == [(0, SLOTS, 0)]
    assert [(e.position, e.modality, e.content) for e in row.embeddings] == [(SLOTS, IMAGE, content_hash(b"x"))]
    assert text.tokens == (tokenizer.bos, *name, tokenizer.emb) and set(text.labels) == {IGNORE} and not text.media
    assert [(e.position, e.modality, e.content) for e in text.embeddings] == [(len(name) + 1, TEXT, content_hash(b"red disc"))]


def test_a_picture_behind_a_text_gets_a_segment_of_its_own(tokenizer: Tokenizer):
    row, text, alone = tokenize(document(Text(text="a"), image(b"x"), image(b"y")), tokenizer, SLOTS)
    assert not row.embeddings and [span.item for span in row.media] == [0, 1]
    assert alone.tokens == (*[tokenizer.image] * SLOTS, tokenizer.emb)
    assert [span.item for span in alone.media] == [0] and alone.embeddings[0].modality == IMAGE
    assert text.embeddings[0].modality == TEXT


def test_one_kind_alone_is_one_segment(tokenizer: Tokenizer):
    (text,) = tokenize(document(Text(text="a"), Text(text="b")), tokenizer, SLOTS)
    assert not text.embeddings
    (picture,) = tokenize(document(image(b"x"), image(b"y")), tokenizer, SLOTS)
    assert [embedding.position for embedding in picture.embeddings] == [SLOTS]


@relaxed
@given(document=documents)
def test_the_length_is_known_without_pictures(tokenizer: Tokenizer, document: Document):
    parts = [len(tokenizer.encode(part.text)) if isinstance(part, Text) else None for part in document.parts]
    segments = tokenize(document, tokenizer, SLOTS)
    assert document_length(parts, SLOTS) == sum(len(segment.tokens) for segment in segments)


@relaxed
@given(document=documents)
def test_labels_are_the_next_token_of_texts_to_predict(tokenizer: Tokenizer, document: Document):
    row, *sides = tokenize(document, tokenizer, SLOTS)
    expected: list[int] = []
    for part in document.parts:
        if isinstance(part, Text) and part.predict:
            expected += [*tokenizer.encode(part.text), tokenizer.eos]
    assert [label for label in row.labels if label != IGNORE] == expected
    for position, label in enumerate(row.labels):
        if label != IGNORE:
            assert label == row.tokens[position + 1]
            assert row.tokens[position] not in (tokenizer.image, tokenizer.emb, tokenizer.eos)
    assert all(set(side.labels) == {IGNORE} for side in sides)


@relaxed
@given(document=documents)
def test_no_embedding_sees_the_other_side(tokenizer: Tokenizer, document: Document):
    """Attention is causal and within a segment, so what an `<emb>` sees stands before it in its segment."""
    seen = []
    for segment in tokenize(document, tokenizer, SLOTS):
        assert segment.tokens.count(tokenizer.emb) == len(segment.embeddings)
        for embedding in segment.embeddings:
            assert segment.tokens[embedding.position] == tokenizer.emb
            before = set(segment.tokens[: embedding.position])
            if embedding.modality == IMAGE:
                assert before == {tokenizer.image} and segment.media[0].length == embedding.position
            else:
                assert tokenizer.image not in before
            seen.append(embedding.modality)
    kinds = {type(part) for part in document.parts}
    if kinds == {Text, Image}:
        assert sorted(seen) == [TEXT, IMAGE]
    else:
        assert seen == [IMAGE] * (kinds == {Image})


def test_best_fit_decreasing_worked_by_hand():
    assert best_fit_decreasing([5, 7, 3, 5, 2, 8], 10) == [[5, 4], [1, 2], [0, 3]]
    assert best_fit_decreasing([4, 4, 4], 10) == [[0, 1], [2]]
    assert best_fit_decreasing([], 10) == []


@given(st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_decreasing_against_the_plain_search(lengths: list[int]):
    bins: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        spaces = [50 - sum(lengths[i] for i in members) for members in bins]
        fitting = [number for number, space in enumerate(spaces) if space >= lengths[position]]
        if fitting:
            bins[min(fitting, key=lambda number: spaces[number])].append(position)
        else:
            bins.append([position])
    assert best_fit_decreasing(lengths, 50) == bins


@given(st.lists(st.integers(1, 50), max_size=60))
def test_next_fit_keeps_the_order(lengths: list[int]):
    bins = next_fit(lengths, 50)
    assert [position for members in bins for position in members] == list(range(len(lengths)))
    totals = [sum(lengths[position] for position in members) for members in bins]
    assert all(total <= 50 for total in totals)
    assert all(total + lengths[after[0]] > 50 for total, after in zip(totals, bins[1:], strict=False))


@relaxed
@given(packs=st.lists(st.lists(documents, min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_batch_holds_its_documents_and_padding(tokenizer: Tokenizer, packs: list[list[Document]]):
    entries = [[entry(f"{p}.{d}", tokenize(doc, tokenizer, SLOTS)) for d, doc in enumerate(pack)] for p, pack in enumerate(packs)]
    items = sum(isinstance(part, Image) for pack in packs for document in pack for part in document.parts)
    width = 1024
    batch = collated(entries, items, width)
    assert [ref.key for ref in batch.provenance] == [one.ref.key for pack in entries for one in pack]
    segment_number = slot = document_number = first_item = 0
    for p, pack in enumerate(entries):
        position = p * width
        for one in pack:
            for segment in one.segments:
                rows = slice(position, position + len(segment.tokens))
                assert batch.tokens[rows].tolist() == list(segment.tokens)
                assert batch.labels[rows].tolist() == list(segment.labels)
                assert batch.position_ids[rows].tolist() == list(range(len(segment.tokens)))
                assert set(batch.document_ids[rows].tolist()) <= {segment_number}
                media = [first_item * SLOTS + span.item * SLOTS + i for span in segment.media for i in range(SLOTS)]
                shown = batch.media_index[rows]
                assert shown[shown != NOTHING].tolist() == media
                assert torch.equal(shown != NOTHING, batch.tokens[rows] == tokenizer.image)
                pooled = batch.pool_index[rows]
                assert torch.equal(pooled != NOTHING, batch.tokens[rows] == tokenizer.emb)
                for embedding in segment.embeddings:
                    assert pooled[embedding.position] == slot
                    assert batch.slots.modality[slot] == embedding.modality
                    assert batch.slots.content[slot] == embedding.content
                    assert batch.slots.pair[slot] == document_number
                    slot += 1
                segment_number += 1
                position += len(segment.tokens)
            first_item += len({span.item for segment in one.segments for span in segment.media})
            document_number += 1
        padding = slice(position, (p + 1) * width)
        assert set(batch.tokens[padding].tolist()) == {tokenizer.pad}
        assert set(batch.labels[padding].tolist()) == {IGNORE}
        assert set(batch.position_ids[padding].tolist()) == {0}
        for name in ("document_ids", "media_index", "pool_index"):
            assert set(getattr(batch, name)[padding].tolist()) == {NOTHING}
    assert first_item == items and slot == len(batch.slots.pair)


def test_media_of_a_batch(tokenizer: Tokenizer):
    entries = [entry("a", tokenize(document(image(b"x"), image(b"y")), tokenizer, SLOTS))]
    batch = collated([entries], items=2)
    assert batch.images.cu_seqlens.tolist() == [0, 16, 32]
    assert batch.images.grid.tolist() == [[1, 4, 4]] * 2
    assert batch.images.patches.dtype == torch.uint8 and batch.tokens.dtype == torch.int64


def test_a_batch_without_pictures_is_valid(tokenizer: Tokenizer):
    batch = collated([[entry("a", tokenize(document(Text(text="a")), tokenizer, SLOTS))]], items=0)
    assert batch.images.patches.shape == (0, 12) and batch.images.grid.shape == (0, 3)
    assert batch.images.cu_seqlens.tolist() == [0]
    assert batch.slots.pair.shape == batch.slots.content.shape == (0,) and batch.slots.pair.dtype == torch.int64
    assert (batch.media_index == NOTHING).all() and (batch.pool_index == NOTHING).all()


def test_equal_content_has_equal_hashes_that_fit_int64():
    hashes = {content_hash(bytes([number])) for number in range(256)}
    assert len(hashes) == 256 and min(hashes) >= 0 and max(hashes) < 2**63
    assert content_hash(b"a") == content_hash(b"a")


def test_an_overfull_pack_is_refused(tokenizer: Tokenizer):
    with pytest.raises(AssertionError, match="more than 4"):
        collated([[entry("a", tokenize(document(Text(text="much too long")), tokenizer, SLOTS))]], items=0, pack_tokens=4)

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpt.data.segments import Run, content_hash, document_lengths, piece_cost, split, tokenize, tokenize_piece
from mmpt.data.tokens import Tokenizer
from mmpt.types import AUDIO, IGNORE, IMAGE, TEXT, VIDEO, Audio, Image, Part, Text, Video

KINDS = {Image: IMAGE, Audio: AUDIO, Video: VIDEO}
SLOTS = 4  # tokens of a picture in the examples worked by hand

texts = st.builds(lambda text, predict: Text(text=text, predict=predict), st.text(max_size=12), st.booleans())
images = st.builds(lambda data: Image(data=data, crc32=0, width=1, height=1), st.binary(min_size=1, max_size=3))
sounds = st.builds(lambda data: Audio(data=data, crc32=0, sample_rate=1, samples=1), st.binary(min_size=1, max_size=3))
clips = st.builds(lambda data: Video(data=data, crc32=0, width=1, height=1, clip=(0, 1)), st.binary(min_size=1, max_size=3))
parts_of_documents = st.lists(st.tuples(texts | images | sounds | clips, st.integers(0, 5)), min_size=1, max_size=6)
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def image(data: bytes) -> Image:
    return Image(data=data, crc32=0, width=1, height=1)


def tokens_of(parts: list[tuple[Part, int]], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    is_text = np.array([isinstance(part, Text) for part, _ in parts])
    tokens = [len(tokenizer.encode(part.text)) if isinstance(part, Text) else slots for part, slots in parts]
    return is_text, np.array(tokens, dtype=np.int64)


def test_a_picture_and_its_name(tokenizer: Tokenizer):
    name = tokenizer.encode("red disc")
    row, text = tokenize([image(b"x"), Text(text="red disc")], [SLOTS, 0], tokenizer)
    assert row.tokens == (*[tokenizer.media] * SLOTS, tokenizer.emb, tokenizer.bos, *name, tokenizer.eos)
    assert row.labels == (*[IGNORE] * (SLOTS + 1), *name, tokenizer.eos, IGNORE)
    assert [(span.start, span.length, span.modality, span.item) for span in row.media] == [(0, SLOTS, IMAGE, 0)]
    assert [(e.position, e.modality, e.content) for e in row.embeddings] == [(SLOTS, IMAGE, content_hash(b"x", b""))]
    assert text.tokens == (tokenizer.bos, *name, tokenizer.emb) and set(text.labels) == {IGNORE} and not text.media
    assert [(e.position, e.modality, e.content) for e in text.embeddings] == [(len(name) + 1, TEXT, content_hash(b"red disc"))]


def test_a_medium_behind_a_text_gets_a_segment_of_its_own(tokenizer: Tokenizer):
    sound = Audio(data=b"y", crc32=0, sample_rate=1, samples=1)
    row, text, alone = tokenize([Text(text="a"), image(b"x"), sound], [0, SLOTS, 3], tokenizer)
    assert not row.embeddings and [(span.modality, span.item) for span in row.media] == [(IMAGE, 0), (AUDIO, 0)]
    assert alone.tokens == (*[tokenizer.media] * SLOTS, tokenizer.emb)
    assert [span.item for span in alone.media] == [0] and alone.embeddings[0].modality == IMAGE
    assert text.embeddings[0].modality == TEXT


def test_one_kind_alone_is_one_segment(tokenizer: Tokenizer):
    (text,) = tokenize([Text(text="a"), Text(text="b")], [0, 0], tokenizer)
    assert not text.embeddings
    (picture,) = tokenize([image(b"x"), image(b"y")], [SLOTS, SLOTS], tokenizer)
    assert [embedding.position for embedding in picture.embeddings] == [SLOTS]


def test_a_pair_the_other_way_round(tokenizer: Tokenizer):
    parts, slots = [image(b"x"), Text(text="a")], [SLOTS, 0]
    turned = tokenize(parts[::-1], slots[::-1], tokenizer)
    assert tokenize(parts, slots, tokenizer, reverse=True) == turned and len(turned) == 3


def test_a_medium_without_slots_is_left_out(tokenizer: Tokenizer):
    (row,) = tokenize([image(b"x"), Text(text="a")], [0, 0], tokenizer)
    assert row == tokenize([Text(text="a")], [0], tokenizer)[0]


@relaxed
@given(documents=st.lists(parts_of_documents | st.just([]), min_size=1, max_size=5), reverse=st.booleans())
def test_the_lengths_are_known_without_media(tokenizer: Tokenizer, documents: list, reverse: bool):
    every = [tokens_of(parts, tokenizer) for parts in documents]
    is_text, tokens = (np.concatenate(columns) for columns in zip(*every, strict=True))
    edges = np.cumsum([0, *map(len, documents)])
    lengths = document_lengths(is_text.astype(bool), tokens.astype(np.int64), edges, reverse)
    for parts, length in zip(documents, lengths, strict=True):
        made = tokenize([part for part, _ in parts], [slots for _, slots in parts], tokenizer, reverse) if parts else []
        assert length == sum(len(segment.tokens) for segment in made)


@relaxed
@given(parts=parts_of_documents)
def test_labels_are_the_next_token_of_texts_to_predict(tokenizer: Tokenizer, parts: list):
    row, *sides = tokenize([part for part, _ in parts], [slots for _, slots in parts], tokenizer)
    expected: list[int] = []
    for part, _ in parts:
        if isinstance(part, Text) and part.predict:
            expected += [*tokenizer.encode(part.text), tokenizer.eos]
    assert [label for label in row.labels if label != IGNORE] == expected
    for position, label in enumerate(row.labels):
        if label != IGNORE:
            assert label == row.tokens[position + 1]
            assert row.tokens[position] not in (tokenizer.media, tokenizer.emb, tokenizer.eos)
    assert all(set(side.labels) == {IGNORE} for side in sides)


@relaxed
@given(parts=parts_of_documents)
def test_no_embedding_sees_the_other_side(tokenizer: Tokenizer, parts: list):
    """Attention is causal and within a segment, so what an `<emb>` sees stands before it in its segment."""
    seen = []
    for segment in tokenize([part for part, _ in parts], [slots for _, slots in parts], tokenizer):
        assert segment.tokens.count(tokenizer.emb) == len(segment.embeddings)
        for embedding in segment.embeddings:
            assert segment.tokens[embedding.position] == tokenizer.emb
            before = set(segment.tokens[: embedding.position])
            if embedding.modality == TEXT:
                assert tokenizer.media not in before
            else:
                assert before == {tokenizer.media} and segment.media[0].length == embedding.position
                assert segment.media[0].modality == embedding.modality
            seen.append(embedding.modality == TEXT)
    kept = {isinstance(part, Text) for part, slots in parts if isinstance(part, Text) or slots}
    if kept == {True, False}:
        assert sorted(seen) == [False, True]
    else:
        first = next(iter([part for part, slots in parts if isinstance(part, Text) or slots]), None)
        assert seen == ([False] if first and not isinstance(first, Text) else [])


def test_a_long_document_is_cut_between_its_parts():
    is_text, tokens, rows = [True, False, True, False], [3, 4, 2, 4], [0, 16, 0, 16]
    assert split(is_text, tokens, rows, 10, None) == [[Run(0, 0, 3), Run(1, 0, 4)], [Run(2, 0, 2), Run(3, 0, 4)]]
    assert split(is_text, tokens, rows, 100, 20) == [[Run(0, 0, 3), Run(1, 0, 4), Run(2, 0, 2)], [Run(3, 0, 4)]]


def test_a_text_longer_than_a_pack_is_cut_within():
    assert split([True, True], [10, 1], [0, 0], 5, None) == [[Run(0, 0, 4)], [Run(0, 4, 8)], [Run(0, 8, 10)], [Run(1, 0, 1)]]
    assert split([True], [4], [0], 5, None) == [[Run(0, 0, 3)], [Run(0, 3, 4)]]


@relaxed
@given(parts=parts_of_documents, most=st.integers(5, 12), most_rows=st.none() | st.integers(5, 9))
def test_pieces_hold_every_token_once_and_fit(tokenizer: Tokenizer, parts: list, most: int, most_rows: int | None):
    is_text, tokens = (column.tolist() for column in tokens_of(parts, tokenizer))
    rows = [0 if text else length for text, length in zip(is_text, tokens, strict=True)]
    pieces = split(is_text, tokens, rows, most, most_rows)
    expected = {i: tokenizer.encode(part.text) for i, (part, _) in enumerate(parts) if isinstance(part, Text)}
    said: dict[int, list[int]] = {}
    shown = 0
    for piece in pieces:
        (row,) = tokenize_piece([part for part, _ in parts], [slots for _, slots in parts], piece, expected, tokenizer)
        cost = piece_cost(piece, is_text, tokens, rows)
        assert cost[0] == len(row.tokens) <= most and cost[1] <= (most_rows or cost[1])
        assert not row.embeddings and sum(span.length for span in row.media) == cost[1]
        shown += len(row.media)
        for run in piece:
            if is_text[run.part]:
                ids = tokenizer.encode(parts[run.part][0].text)
                said[run.part] = said.get(run.part, []) + ids[run.start : run.stop]
        for position, label in enumerate(row.labels[:-1]):
            assert label in (IGNORE, row.tokens[position + 1])
    assert shown == sum(not text and length > 0 for text, length in zip(is_text, tokens, strict=True))
    assert said == expected


def test_equal_content_has_equal_hashes_that_fit_int64():
    hashes = {content_hash(bytes([number])) for number in range(256)}
    assert len(hashes) == 256 and min(hashes) >= 0 and max(hashes) < 2**63
    assert content_hash(b"a") == content_hash(b"a")

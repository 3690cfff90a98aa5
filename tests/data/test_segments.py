from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import SENTINELS, costs_of, parts_of_documents, task_tokenizer

from mmpt.data.form import Form
from mmpt.data.pieces import Costs, Run, piece_cost, split
from mmpt.data.segments import MODALITY, Segmenter, content_hash, document_lengths
from mmpt.data.tokens import Tokenizer
from mmpt.types import (
    AUDIO,
    IGNORE,
    IMAGE,
    MASKED,
    NEXT_TOKEN,
    NOTHING,
    SPAN,
    TEXT,
    VIDEO,
    Audio,
    Image,
    Part,
    Text,
    TokenizedDocument,
)

SLOTS = 4  # tokens of a picture in the examples worked by hand
PLAIN = Form(longest=512)

relaxed = settings(deadline=None)
forms = st.builds(
    Form,
    longest=st.just(512),
    task=st.sampled_from([NEXT_TOKEN, MASKED, SPAN]),
    is_causal=st.booleans(),
    mean=st.booleans(),
    pairs=st.booleans(),
    sentinels=st.just(SENTINELS),
).map(lambda form: replace(form, pairs=form.pairs and form.task == MASKED, is_causal=form.is_causal or form.task == SPAN))
silent = forms.map(lambda form: replace(form, contrasts=False))
towers = st.builds(Form, longest=st.integers(8, 20), fusion=st.just(False), mean=st.booleans())


def image(data: bytes) -> Image:
    return Image(data=data, crc32=0, width=1, height=1)


def sound(data: bytes) -> Audio:
    return Audio(data=data, crc32=0, sample_rate=1, samples=1)


def made(
    parts: Sequence[Part], slots: Sequence[int], form: Form = PLAIN, key: int = 0, reverse: bool = False
) -> list[TokenizedDocument]:
    tokenizer = task_tokenizer()
    return Segmenter(form, tokenizer).document(parts, costs_of(parts, slots, tokenizer, form.fusion), key, reverse)


def arrays(documents: Sequence[Costs]) -> tuple[Costs, np.ndarray]:
    """Those of all documents, end to end, and where each begins."""
    columns = (np.concatenate([np.array(column, dtype=np.int64) for column in of]) for of in zip(*documents, strict=True))
    kind, predict, tokens, rows = columns
    return Costs(kind, predict.astype(bool), tokens, rows), np.cumsum([0, *(len(each.kind) for each in documents)])


def test_a_picture_and_its_name():
    tokenizer = task_tokenizer()
    name = tokenizer.encode("red disc")
    row, text = made([image(b"x"), Text(text="red disc")], [SLOTS, 0])
    assert row.tokens == (*[tokenizer.media] * SLOTS, tokenizer.emb, tokenizer.bos, *name, tokenizer.eos)
    assert row.labels == (*[IGNORE] * (SLOTS + 1), *name, tokenizer.eos, IGNORE)
    assert [(span.start, span.length, span.modality, span.item) for span in row.media] == [(0, SLOTS, IMAGE, 0)]
    (shown,) = row.embeddings
    assert (shown.start, shown.stop, shown.modality, shown.item) == (SLOTS, SLOTS + 1, IMAGE, 0)
    assert shown.content == content_hash(b"x", b"")
    assert text.tokens == (tokenizer.bos, *name, tokenizer.emb) and set(text.labels) == {IGNORE} and not text.media
    (said,) = text.embeddings
    assert (said.start, said.stop, said.modality, said.item) == (len(name) + 1, len(name) + 2, TEXT, NOTHING)
    assert said.content == content_hash(b"red disc")


def test_a_mean_is_over_the_tokens_of_the_part_and_emb():
    name = task_tokenizer().encode("red disc")
    parts = [image(b"x"), Text(text="red disc"), sound(b"y")]
    row, text, heard = made(parts, [SLOTS, 0, 2], replace(PLAIN, mean=True))
    assert [(e.start, e.stop) for e in row.embeddings] == [(0, SLOTS + 1)]
    assert [(e.start, e.stop) for e in text.embeddings] == [(1, len(name) + 2)]
    assert [(e.start, e.stop) for e in heard.embeddings] == [(0, 3)]


def test_the_first_of_each_modality_is_contrasted():
    tokenizer = task_tokenizer()
    parts = [Text(text="a"), image(b"x"), sound(b"y"), sound(b"z"), image(b"w"), Text(text="b")]
    row, text, shown, heard = made(parts, [0, SLOTS, 3, 2, SLOTS, 0])
    assert not row.embeddings
    assert [(span.modality, span.item) for span in row.media] == [(IMAGE, 0), (AUDIO, 0), (AUDIO, 1), (IMAGE, 1)]
    assert text.tokens == (tokenizer.bos, *tokenizer.encode("a"), tokenizer.emb)
    assert shown.tokens == (*[tokenizer.media] * SLOTS, tokenizer.emb)
    assert heard.tokens == (*[tokenizer.media] * 3, tokenizer.emb)
    sides = [(e.modality, e.item) for segment in (text, shown, heard) for e in segment.embeddings]
    assert sides == [(TEXT, NOTHING), (IMAGE, 0), (AUDIO, 0)]


def test_two_media_without_words_are_contrasted():
    row, heard = made([image(b"x"), sound(b"y"), image(b"z")], [SLOTS, 3, SLOTS])
    assert [(e.modality, e.stop) for e in row.embeddings] == [(IMAGE, SLOTS + 1)]
    assert [(e.modality, e.stop) for e in heard.embeddings] == [(AUDIO, 4)]


def test_one_kind_alone_is_one_segment():
    (text,) = made([Text(text="a"), Text(text="b")], [0, 0])
    assert not text.embeddings
    (picture,) = made([image(b"x"), image(b"y")], [SLOTS, SLOTS])
    assert [embedding.start for embedding in picture.embeddings] == [SLOTS]


def test_where_all_tokens_see_one_another_a_leading_medium_gets_a_segment_of_its_own():
    tokenizer, form = task_tokenizer(), replace(PLAIN, is_causal=False)
    row, shown, text = made([image(b"x"), Text(text="a")], [SLOTS, 0], form)
    assert not row.embeddings and tokenizer.emb not in row.tokens and set(row.labels) == {IGNORE}
    assert [segment.embeddings[0].modality for segment in (shown, text)] == [IMAGE, TEXT]
    (alone,) = made([image(b"x")], [SLOTS], form)
    assert alone.embeddings[0].stop == SLOTS + 1 == len(alone.tokens)
    (two,) = made([image(b"x"), image(b"y")], [SLOTS, SLOTS], form)
    assert not two.embeddings
    costs = [costs_of([image(b"x")] * count, [SLOTS] * count, tokenizer) for count in (1, 2)]
    assert document_lengths(form, *arrays(costs)).total.tolist() == [SLOTS + 1, 2 * SLOTS]


def test_a_pair_the_other_way_round():
    parts, slots = [image(b"x"), Text(text="a")], [SLOTS, 0]
    turned = made(parts[::-1], slots[::-1])
    assert made(parts, slots, reverse=True) == turned and len(turned) == 3


def test_a_medium_without_rows_is_left_out():
    assert made([image(b"x"), Text(text="a")], [0, 0]) == made([Text(text="a")], [0])


def test_without_fusion_a_document_is_its_first_text_and_media_beside_it():
    tokenizer, form = task_tokenizer(), Form(longest=8, fusion=False)
    words = tokenizer.encode("zebra crossing")
    parts = [image(b"x"), Text(text="zebra crossing"), sound(b"y"), image(b"z"), Text(text="no")]
    (one,) = made(parts, [SLOTS, 0, 3, SLOTS, 0], form)
    assert len(words) > 6 and one.tokens == (tokenizer.bos, *words[:6], tokenizer.emb)
    assert set(one.labels) == {IGNORE} and not one.media
    found = [(e.start, e.stop, e.modality, e.item) for e in one.embeddings]
    assert found == [(7, 8, TEXT, NOTHING), (0, 0, IMAGE, 0), (0, 0, AUDIO, 0)]
    assert made(parts[1:2], [0], replace(form, mean=True))[0].embeddings[0].start == 1
    (silent,) = made([sound(b"y")], [3], form)
    assert silent.tokens == (tokenizer.pad,) and [(e.start, e.stop, e.item) for e in silent.embeddings] == [(0, 0, 0)]


def test_a_prompt_is_a_contrasted_text():
    parts = [Text(text="zebra crossing"), image(b"x")]
    for form in (PLAIN, replace(PLAIN, mean=True), replace(PLAIN, is_causal=False)):
        assert Segmenter(form, task_tokenizer()).embedded_text(parts[0]) == made(parts, [0, SLOTS], form)[1]
    short = Form(longest=8, fusion=False)
    alone = made(parts[:1], [0], short)
    assert [Segmenter(short, task_tokenizer()).embedded_text(parts[0])] == alone and len(alone[0].tokens) == 8


def test_a_text_is_the_token_row_of_clip():
    open_clip = pytest.importorskip("open_clip")
    theirs, ours = open_clip.get_tokenizer("ViT-B-32"), Tokenizer.load("open_clip:ViT-B-32")
    segmenter = Segmenter(Form(longest=theirs.context_length, fusion=False), ours)
    for text in ("a photo of a red disc.", "", "many words " * 60):
        row = segmenter.embedded_text(Text(text=text)).tokens
        assert [*row, *[0] * (theirs.context_length - len(row))] == theirs(text)[0].tolist()


@relaxed
@given(
    form=forms | towers | silent,
    documents=st.lists(parts_of_documents | st.just([]), min_size=1, max_size=5),
    reverse=st.booleans(),
)
def test_the_lengths_are_known_from_the_index(form: Form, documents: list, reverse: bool):
    costs = [costs_of(*_columns(parts), task_tokenizer(), form.fusion) for parts in documents]
    lengths = document_lengths(form, *arrays(costs), reverse)
    for number, parts in enumerate(documents):
        found = [len(segment.tokens) for segment in made(*_columns(parts), form, key=number, reverse=reverse)] if parts else [0]
        assert lengths.total[number] == sum(found)
        assert lengths.row[number] == found[0] == max(found)


def _columns(parts: list) -> tuple[list[Part], list[int]]:
    return [part for part, _ in parts], [0 if isinstance(part, Text) else slots for part, slots in parts]


@relaxed
@given(parts=parts_of_documents)
def test_labels_are_the_next_token_of_texts_to_predict(parts: list):
    tokenizer = task_tokenizer()
    row, *sides = made(*_columns(parts))
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
@given(form=silent, parts=parts_of_documents)
def test_a_model_without_levels_reads_rows_alone(form: Form, parts: list):
    (row,) = made(*_columns(parts), form)
    assert not row.embeddings and task_tokenizer().emb not in row.tokens


@relaxed
@given(form=forms, parts=parts_of_documents)
def test_no_embedding_sees_another_side(form: Form, parts: list):
    """What an `<emb>` sees: all of its segment, or what stands before it there. There is nothing but its own part."""
    tokenizer, seen = task_tokenizer(), []
    for segment in made(*_columns(parts), form):
        assert segment.tokens.count(tokenizer.emb) == len(segment.embeddings)
        for embedding in segment.embeddings:
            assert segment.tokens[embedding.stop - 1] == tokenizer.emb
            before = segment.tokens[: embedding.stop - 1]
            assert form.is_causal or embedding.stop == len(segment.tokens)
            if embedding.modality == TEXT:
                assert before[0] == tokenizer.bos and tokenizer.media not in before and tokenizer.eos not in before
            else:
                assert set(before) == {tokenizer.media} and segment.media[0].length == len(before)
                assert (segment.media[0].modality, segment.media[0].item) == (embedding.modality, embedding.item)
            seen.append(embedding.modality)
    kept = [part for part, slots in parts if isinstance(part, Text) or slots]
    kinds = {MODALITY[type(part)] for part in kept}
    if len(kinds) > 1:
        assert sorted(seen) == sorted(kinds)
    else:
        is_shown = kept and kinds != {TEXT} and (form.is_causal or len(kept) == 1)
        assert seen == (list(kinds) if is_shown else [])


# What tasks ask


def test_hidden_words_are_asked_for_where_they_stand():
    tokenizer, form = task_tokenizer(), replace(PLAIN, task=MASKED)
    parts = [image(b"x"), Text(text="red disc " * 5), Text(text="not asked " * 9, predict=False)]
    (plain, *_), (row, text) = made(parts, [SLOTS, 0, 0]), made(parts, [SLOTS, 0, 0], form, key=1)
    words = tokenizer.encode(parts[1].text)
    chosen = [place for place, label in enumerate(row.labels) if label != IGNORE]
    assert len(chosen) == round(0.15 * len(words)) and row.task == MASKED
    first = SLOTS + 2  # behind the slots, <emb> and <bos>
    assert all(first <= place < first + len(words) and row.labels[place] == plain.tokens[place] for place in chosen)
    assert all(row.tokens[place] == plain.tokens[place] for place in range(len(row.tokens)) if place not in chosen)
    assert text.tokens == (tokenizer.bos, *words, tokenizer.emb), "the contrasted side is whole"
    assert made(parts, [SLOTS, 0, 0], form, key=1)[0] == row != made(parts, [SLOTS, 0, 0], form, key=2)[0]


def test_hidden_spans_are_said_behind_the_rest():
    tokenizer, form = task_tokenizer(), replace(PLAIN, task=SPAN, sentinels=SENTINELS)
    words = tokenizer.encode("red disc " * 5)
    row, _ = made([image(b"x"), Text(text="red disc " * 5)], [SLOTS, 0], form)
    ends = [place for place, token in enumerate(row.tokens) if token == tokenizer.eos]
    left, target = row.tokens[SLOTS + 2 : ends[0]], row.tokens[ends[0] + 1 :]
    assert row.tokens[SLOTS + 1] == tokenizer.bos and target[-1] == tokenizer.eos and len(ends) == 2
    assert target[0] == tokenizer.sentinels[0] and len(left) + len(target) == len(words) + 2 * (set_of(left) & set_of(target)) + 1
    assert row.labels == (*[IGNORE] * ends[0], *target, IGNORE)
    (short,) = made([Text(text="a")], [0], form)
    assert short.tokens == (tokenizer.bos, *tokenizer.encode("a"), tokenizer.eos) and set(short.labels) == {IGNORE}


def set_of(tokens: Sequence[int]) -> int:
    """How many sentinels there are."""
    return sum(token in task_tokenizer().sentinels for token in tokens)


def test_a_text_becomes_two_in_a_row():
    tokenizer, form = task_tokenizer(), replace(PLAIN, task=MASKED, pairs=True)
    first, second = tokenizer.encode("the red disc stands above the blue box."), tokenizer.encode(" then another one!")
    text = "the red disc stands above the blue box. then another one!"
    assert first + second == tokenizer.encode(text)
    for key in range(20):
        (row,) = made([Text(text=text)], [0], form, key)
        assert row.second == len(first) + 2 and row.next_sentence == 0
        shown = [token if label == IGNORE else label for token, label in zip(row.tokens, row.labels, strict=True)]
        assert shown == [tokenizer.bos, *first, tokenizer.eos, *second, tokenizer.eos]
        assert tokenizer.eos not in row.labels and tokenizer.bos not in row.labels
    picture, _ = made([image(b"x"), Text(text=text)], [SLOTS, 0], form)
    assert picture.second is None and picture.next_sentence == IGNORE
    assert [row.tokens for row in made([image(b"x")], [0], form)] == [()]


@pytest.mark.parametrize("text", ["", "a"])
def test_less_than_two_words_are_no_pair(text: str):
    tokenizer = task_tokenizer()
    (row,) = made([Text(text=text)], [0], replace(PLAIN, task=MASKED, pairs=True))
    assert len(row.tokens) == 3 + len(text) and row.second is None and row.next_sentence == IGNORE
    assert row.tokens[0] == tokenizer.bos and row.tokens[-2:] == (tokenizer.eos, tokenizer.eos)


@relaxed
@given(forms, st.lists(st.tuples(st.sampled_from(["a b c. d e f.", "red disc", ""]), st.booleans()), min_size=1, max_size=4))
def test_words_that_are_not_to_predict_are_never_asked_for(form: Form, said: list):
    tokenizer = task_tokenizer()
    (row,) = made([Text(text=text, predict=predict) for text, predict in said], [0] * len(said), form)
    asked = {label for label in row.labels if label != IGNORE}
    words = {token for text, predict in said if predict for token in tokenizer.encode(text)}
    assert asked <= words | {tokenizer.eos} | set(tokenizer.sentinels)
    assert bool(asked) <= any(predict for _, predict in said)


# Pieces


def listed(kinds: Sequence[int], tokens: Sequence[int], rows: Sequence[int]) -> Costs:
    return Costs(list(kinds), [kind == TEXT for kind in kinds], list(tokens), list(rows))


def test_a_long_document_is_cut_between_its_parts():
    costs = listed([TEXT, IMAGE, TEXT, VIDEO], [3, 4, 2, 4], [0, 16, 0, 16])
    assert split(Form(longest=10), costs, None) == [[Run(0, 0, 3), Run(1, 0, 4)], [Run(2, 0, 2), Run(3, 0, 4)]]
    assert split(Form(longest=100), costs, 20) == [[Run(0, 0, 3), Run(1, 0, 4), Run(2, 0, 2)], [Run(3, 0, 4)]]


def test_a_text_longer_than_a_segment_is_cut_within():
    pieces = split(Form(longest=5), listed([TEXT, TEXT], [10, 1], [0, 0]), None)
    assert pieces == [[Run(0, 0, 4)], [Run(0, 4, 8)], [Run(0, 8, 10)], [Run(1, 0, 1)]]
    assert split(Form(longest=5), listed([TEXT], [4], [0]), None) == [[Run(0, 0, 3)], [Run(0, 3, 4)]]


def test_two_texts_in_a_row_share_their_marks_in_a_piece():
    form = Form(longest=10, task=MASKED, pairs=True)
    costs = listed([TEXT, TEXT, TEXT], [3, 4, 9], [0, 0, 0])
    assert split(form, costs, None) == [[Run(0, 0, 3), Run(1, 0, 4)], [Run(2, 0, 7)], [Run(2, 7, 9)]]
    assert [piece_cost(form, costs, piece) for piece in split(form, costs, None)] == [(10, 0), (10, 0), (5, 0)]


def test_a_text_with_more_spans_than_sentinels_is_cut():
    """Of 49 words 7 are dropped, in 2 spans; of 50 there are 8, in 3."""
    form = Form(longest=512, task=SPAN, sentinels=2)
    assert form.widest(is_pair=False, predict=True) == (49, 49)
    costs = listed([TEXT, TEXT], [10, 60], [0, 0])
    assert split(form, costs, None) == [[Run(0, 0, 10)], [Run(1, 0, 49)], [Run(1, 49, 60)]]


@relaxed
@given(
    form=forms,
    parts=parts_of_documents,
    longest=st.integers(8, 20),
    most_rows=st.none() | st.integers(20, 36),
    key=st.integers(0),
)
def test_pieces_hold_every_word_once_and_fit(form: Form, parts: list, longest: int, most_rows: int | None, key: int):
    tokenizer, form = task_tokenizer(), replace(form, longest=longest)
    made_of, slots = _columns(parts)
    costs = costs_of(made_of, slots, tokenizer)
    words = {i: tokenizer.encode(part.text) for i, part in enumerate(made_of) if isinstance(part, Text)}
    said: dict[int, list[int]] = {}
    shown = 0
    for piece in split(form, costs, most_rows):
        (row,) = Segmenter(form, tokenizer).piece(made_of, costs, piece, words, key)
        cost = piece_cost(form, costs, piece)
        assert cost[0] == len(row.tokens) <= longest and cost[1] <= (most_rows or cost[1])
        assert not row.embeddings and 4 * sum(span.length for span in row.media) == cost[1]
        for modality in (IMAGE, AUDIO, VIDEO):
            items = [span.item for span in row.media if span.modality == modality]
            assert items == list(range(len(items))), "numbered from 0 within the piece"
        shown += len(row.media)
        for run in piece:
            if run.part in words:
                said[run.part] = said.get(run.part, []) + words[run.part][run.start : run.stop]
    assert shown == sum(count > 0 for count in slots)
    assert said == words


def test_equal_content_has_equal_hashes_that_fit_int64():
    hashes = {content_hash(bytes([number])) for number in range(256)}
    assert len(hashes) == 256 and min(hashes) >= 0 and max(hashes) < 2**63
    assert content_hash(b"a") == content_hash(b"a")

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from functools import cache

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import task_tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mmpt.data.sentences import exchange, middle
from mmpt.data.tokens import Tokenizer
from mmpt.types import IGNORE, TokenizedDocument


@cache
def bytewise() -> Tokenizer:
    """A tokenizer without merges: every byte is a token."""
    return Tokenizer.train([], vocabulary=261)


def halves(text: str, ends: Collection[int] = ()) -> tuple[str, str]:
    tokenizer = bytewise()
    ids = tokenizer.encode(text)
    cut = middle(ids, tokenizer.decode, ends)
    return tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("the red disc stands there. then another one came.", "the red disc stands there."),
        ("a b c d. e f g. h i j k", "a b c d. "),
        ('"is it red?" said the disc, "or green."', '"is it red?" '),
        ("it costs 3.141 or 2.718 in all of them", "it costs 3.141 or "),
        ("a b. c d e f g h i j k l m n o p q r s t", "a b. c d e f g h i j"),
        ("红色的圆站在那里。蓝色的", "红色的圆站在那里。"),
        ("abcdefgh", "abcd"),
        ("ab", "a"),
    ],
)
def test_a_text_is_cut_at_the_end_of_a_sentence_near_the_middle(text: str, first: str):
    """Else between words; a stop within a number ends nothing."""
    found, rest = halves(text)
    assert found + rest == text
    assert found == first


def test_where_one_text_ends_another_begins():
    assert halves("abcdefgh", {3}) == ("abc", "defgh")
    assert halves("abcdefgh", {1, 8}) == ("abcd", "efgh"), "too far from the middle"


def word_piece() -> tokenizers.Tokenizer:
    """As BERT's: pieces of a word that begin with ##, and a stop that is a word."""
    words = ["[UNK]", "the", "disc", "##s", "stand", ".", "box", "##es", "fall"]
    inner = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return inner


def test_words_in_pieces_stay_together():
    inner = word_piece()
    ids = inner.encode("the discs stand. the boxes fall.", add_special_tokens=False).ids
    assert inner.decode(ids[: middle(ids, inner.decode)]) == "the discs stand."
    ids = inner.encode("the stand discs the boxes", add_special_tokens=False).ids
    assert inner.decode(ids[: middle(ids, inner.decode)]) == "the stand"


@given(st.text(min_size=2, max_size=40))
@settings(deadline=None)
def test_both_halves_have_words(text: str):
    tokenizer = task_tokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) < 2 or 0 < middle(ids, tokenizer.decode) < len(ids)


# Exchange


def pair(number: int, first: int = 2, second: int = 3) -> TokenizedDocument:
    """A row of `first` + `second` words; its first word is asked for, and its last, which is hidden."""
    a, b = [100 * number + word for word in range(first)], [100 * number + 50 + word for word in range(second)]
    tokens, labels = [1, *a, 2, *b, 2], [IGNORE] * (first + second + 3)
    labels[1], labels[-2], tokens[-2] = tokens[1], tokens[-2], 7
    return TokenizedDocument(tokens=tuple(tokens), labels=tuple(labels), second=first + 2, next_sentence=0)


def exchanged(rows: list[TokenizedDocument], first_seed: int = 0, longest: int = 512, owners: list | None = None):
    seeds = [first_seed + number for number in range(len(rows))]
    return exchange(rows, seeds, owners or list(range(len(rows))), longest)


def second_of(row: TokenizedDocument) -> tuple:
    return row.tokens[row.second :], row.labels[row.second :]


def test_half_of_the_documents_get_the_second_text_of_the_next_one_chosen():
    rows = [pair(number, second=1 + number % 3) for number in range(41)]
    found = exchanged(rows)
    chosen = [i for i, row in enumerate(found) if row.next_sentence == 1]
    assert len(chosen) in (20, 21)
    for i, j in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        assert found[i].tokens == rows[i].tokens[:4] + rows[j].tokens[4:]
        assert found[i].labels == rows[i].labels[:4] + rows[j].labels[4:]
    assert all(found[i] == row for i, row in enumerate(rows) if i not in chosen)


@pytest.mark.parametrize(("count", "share"), [(1, 0.0), (2, 0.5), (3, 0.5), (4, 0.5), (5, 0.5)])
def test_half_of_few_documents_do_so_on_average(count: int, share: float):
    rows = [pair(number) for number in range(count)]
    found = [sum(row.next_sentence for row in exchanged(rows, seed)) for seed in range(0, 6000, 6)]
    assert sum(found) / (1000 * count) == pytest.approx(share, abs=0.06) and 1 not in found


def test_a_second_text_that_is_too_long_loses_its_end():
    """Rows of 8 tokens: behind four words of the first there is room for one of the second."""
    rows = [pair(0, first=4, second=1), pair(1, first=1, second=4)]
    for seed in range(0, 40, 2):
        one, other = exchanged(rows, seed, longest=8)
        if one.next_sentence:
            assert one.tokens == (*rows[0].tokens[:6], 150, 2) and one.labels == (*rows[0].labels[:6], IGNORE, IGNORE)
            assert other.tokens == (*rows[1].tokens[:3], 7, 2) and other.labels == (*rows[1].labels[:3], 50, IGNORE)
            return
    raise AssertionError("none of twenty was exchanged")


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3)), max_size=12),
    st.integers(0, 10**6),
    st.booleans(),
)
@settings(deadline=None)
def test_no_word_is_lost_but_to_the_longest_row(sizes: list, seed: int, is_short: bool):
    rows = [pair(number, first, second) for number, (first, second, _) in enumerate(sizes)]
    owners, longest = [owner for *_, owner in sizes], 21 if is_short else 512
    found = exchanged(rows, seed, longest, owners)
    assert is_short or Counter(map(second_of, found)) == Counter(map(second_of, rows))
    given_on = []
    for i, (row, old) in enumerate(zip(found, rows, strict=True)):
        assert row.tokens[: row.second] == old.tokens[: old.second] and row.second == old.second
        assert len(row.tokens) == len(row.labels) <= longest and row.tokens[-1] == 2
        donor = (row.tokens[row.second] if row.labels[row.second] == IGNORE else row.labels[row.second]) // 100
        assert row.next_sentence == (donor != i) and (donor == i or owners[donor] != owners[i])
        assert row.tokens[row.second : -2] == rows[donor].tokens[rows[donor].second :][: len(row.tokens) - row.second - 2]
        given_on.append(donor)
    assert sorted(given_on) == list(range(len(rows)))


def test_documents_of_one_owner_do_not_pass_on_among_themselves():
    rows = [pair(number) for number in range(12)]
    assert exchanged(rows, owners=["one"] * 12) == rows
    for seed in range(0, 400, 20):
        found = exchanged(rows, seed, owners=["one"] * 9 + ["two", "three", "four"])
        strangers = sum(row.next_sentence for row in found[9:])
        assert sum(row.next_sentence for row in found[:9]) <= strangers or strangers == 3


def test_no_document_is_nothing_to_exchange():
    assert exchanged([]) == []


def test_an_equal_second_text_follows():
    twins = [pair(1) for _ in range(30)]
    twins = [replace(row, tokens=(*row.tokens[:-2], token, 2)) for row, token in zip(twins, [7, 152] * 15, strict=True)]
    twins = [replace(row, labels=(*row.labels[:-2], 152, IGNORE)) for row in twins]
    assert {row.next_sentence for row in exchanged(twins)} == {0}


def test_rows_of_one_text_are_left_alone():
    plain = TokenizedDocument(tokens=(1, 2), labels=(IGNORE, IGNORE))
    assert all(row == plain for row in exchanged([plain] * 20))

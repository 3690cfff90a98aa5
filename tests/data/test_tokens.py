from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mmpt.data.tokens import SPECIALS, Tokenizer
from mmpt.types import UserError

TEXTS = ["red apple", "green apple", "red heart", "smiling face with hearts", "Côte d’Ivoire", "keycap: 9", "", "red apple"]
TRAINED = Tokenizer.train(TEXTS, vocabulary=320)

plain = st.text(st.characters(exclude_categories=["Cs"]))
with_specials = st.lists(st.one_of(plain, st.sampled_from(SPECIALS))).map("".join)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    TRAINED.save(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def change(path: Path, **fields: object) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return path


def test_the_specials_have_their_numbers() -> None:
    assert (TRAINED.pad, TRAINED.bos, TRAINED.eos, TRAINED.media, TRAINED.emb) == (0, 1, 2, 3, 4)
    assert 5 + 256 < len(TRAINED) <= 320


@given(with_specials)
def test_any_text_comes_back_and_none_becomes_a_special(text: str) -> None:
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert all(number > TRAINED.emb for number in ids)


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary = 260: 261 or more"):
        Tokenizer.train(TEXTS, vocabulary=260)
    assert len(Tokenizer.train(TEXTS, vocabulary=261)) == 261


def test_specials_and_unknown_numbers_leave_no_text() -> None:
    red = TRAINED.encode("red")
    assert TRAINED.decode([TRAINED.bos, *red, TRAINED.eos, TRAINED.pad]) == "red"
    assert TRAINED.decode([*red, 100_000]) == "red"


def test_what_it_was_trained_on_is_short() -> None:
    assert len(TRAINED.encode("red apple")) == 2
    assert len(TRAINED.encode("xylophone")) > 2


def test_the_order_of_texts_and_the_process_do_not_matter(saved: Path, tmp_path: Path) -> None:
    """Merges of equal count are where an order could slip in; hash seeds differ between processes."""
    code = f"from mmpt.data.tokens import Tokenizer; Tokenizer.train({TEXTS[::-1]!r}, 320).save({str(tmp_path / 'other.json')!r})"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    assert (tmp_path / "other.json").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("how", ["file", "pickle"])
def test_a_copy_is_the_same_tokenizer(saved: Path, how: str) -> None:
    copy = Tokenizer.load(saved) if how == "file" else pickle.loads(pickle.dumps(TRAINED))
    text = "a red <emb> heart"
    assert copy.encode(text) == TRAINED.encode(text)
    assert copy.fingerprint == TRAINED.fingerprint


def test_other_merges_have_another_fingerprint() -> None:
    assert Tokenizer.train([*TEXTS, "blue blue blue"], vocabulary=320).fingerprint != TRAINED.fingerprint


def test_truncation_and_padding_of_a_file_are_left_out(saved: Path) -> None:
    """Files of published models often carry both."""
    inner = tokenizers.Tokenizer.from_file(str(saved))
    inner.enable_truncation(2)
    inner.enable_padding(length=50)
    inner.save(str(saved))
    text = "smiling face with red hearts"
    assert Tokenizer.load(saved).encode(text) == TRAINED.encode(text)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"not json", b"\xff\xfe", b'{"version": "1.0"}'])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        Tokenizer.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            Tokenizer.load(path)


def test_a_tokenizer_without_our_specials_is_refused_naming_them(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "other.json"))
    with pytest.raises(UserError, match="lacks the special token <pad>, <bos>, <eos>, <media>, <emb>"):
        Tokenizer.load(tmp_path / "other.json")


def test_a_tokenizer_whose_specials_can_be_typed_is_refused(saved: Path) -> None:
    added = json.loads(saved.read_text())["added_tokens"]
    change(saved, added_tokens=[{**token, "special": token["content"] != "<emb>"} for token in added])
    with pytest.raises(UserError, match="the text '<emb>' becomes the token"):
        Tokenizer.load(saved)

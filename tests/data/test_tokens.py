from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.config import DataConfig, RunConfig, SpecialTokensConfig, parse
from mmpt.data.loader import Loader
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
    with pytest.raises(UserError, match=r"lacks the special tokens pad <pad>, bos <bos>, eos <eos>; name its own under data\."):
        Tokenizer.load(tmp_path / "other.json")


def test_mask_and_sentinels_when_asked() -> None:
    assert TRAINED.mask is None and TRAINED.sentinels == ()
    asked = Tokenizer.train(TEXTS, vocabulary=320, mask=True, sentinels=3)
    assert (asked.emb, asked.mask, asked.sentinels) == (4, 5, (6, 7, 8))
    assert asked.special == {1: "<bos>", 2: "<eos>", 3: "<media>", 4: "<emb>", 5: "<mask>"} | {
        6 + number: f"<extra_id_{number}>" for number in range(3)
    }
    assert not set(asked.encode("<mask> <extra_id_0>")) & set(asked.special)
    assert asked.decode([5, *asked.encode("red"), 6]) == "red"
    with pytest.raises(ValueError, match="265 or more are wanted, for 256 bytes and 9 specials"):
        Tokenizer.train(TEXTS, vocabulary=264, mask=True, sentinels=3)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A tokenizer.json as BERT's: words in pieces, other names, and further tokens that nothing uses."""
    vocabulary = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "red", "##dish", "un"]
    model = tokenizers.models.WordPiece({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]")
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = tokenizers.normalizers.BertNormalizer()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    inner.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 5), ("[CLS]", 4))
    inner.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    inner.save(str(tmp_path / "bert.json"))
    return tmp_path / "bert.json"


BERT = SpecialTokensConfig(pad="[PAD]", bos="[CLS]", eos="[SEP]", media="[unused0]", emb="[unused1]", mask="[MASK]")


def test_a_tokenizer_of_another_origin(bert: Path) -> None:
    data = DataConfig(spec="none", tokenizer=str(bert), special_tokens=BERT)
    for loaded in (Tokenizer.of(data), pickle.loads(pickle.dumps(Tokenizer.load(bert, BERT)))):
        assert (loaded.pad, loaded.bos, loaded.eos, loaded.media, loaded.emb, loaded.mask) == (0, 4, 5, 1, 2, 6)
        assert loaded.sentinels == () and len(loaded) == 12
        assert loaded.encode("Reddish red") == [9, 10, 9]
        assert not set(loaded.encode("[CLS] [SEP] [MASK] [unused0] [unused1]")) & set(loaded.special)


def test_what_a_tokenizer_lacks_is_none(bert: Path) -> None:
    names = SpecialTokensConfig(pad="[PAD]", bos="[CLS]", eos="[SEP]")
    loaded = Tokenizer.load(bert, names)
    assert (loaded.media, loaded.emb, loaded.mask) == (None, None, None) and loaded.special == {4: "[CLS]", 5: "[SEP]"}
    assert loaded.fingerprint != Tokenizer.load(bert, BERT).fingerprint  # other ids stand for the same words


def test_sentinels_of_another_name(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"<pad>": 0, "<bos>": 1, "<eos>": 2, "b": 3, "[1]": 4, "[0]": 5}, []))
    inner.save(str(tmp_path / "t.json"))
    assert Tokenizer.load(tmp_path / "t.json", SpecialTokensConfig(sentinel="[{}]")).sentinels == (5, 4)
    with pytest.raises(UserError, match=r"special_tokens\.sentinel = '\[0\]': \{\} must stand where"):
        Tokenizer.load(tmp_path / "t.json", SpecialTokensConfig(sentinel="[0]"))


CLIP = Tokenizer.load("open_clip:ViT-B-32")
OPEN_CLIP = open_clip.get_tokenizer("ViT-B-32")
ODD = ["<end_of_text>", "<start_of_text>", "<END_OF_TEXT>", "<media>", "&amp;", "&lt;br&gt;", "'s", "'RE", "\n", "\u00a0", "é"]
ODD += [
    "e\u0301",
    "İ",
    "ß",
    "ﬁ",
    "😀",
    "👨‍👩‍👧",
    "中文",
    "\x1b[31m",
    "\ufeff",
    "Ã©",
    "â€™",
    "٣½",
    "_-_",
    "</w>",
    "Ġ",
    "!",
    "\x00",
    "ǅ",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(plain, st.sampled_from(ODD), st.sampled_from(["A photo", "of", " ", "dogs", "running"]))).map("".join))
def test_open_clips_ids(text: str) -> None:
    assert CLIP.encode(text) == OPEN_CLIP.encode(text)


def test_a_row_of_open_clips() -> None:
    """`<bos> words <emb>` is what CLIP reads."""
    assert (CLIP.pad, CLIP.bos, CLIP.eos, CLIP.emb) == (0, 49406, 49407, 49407)
    assert (CLIP.media, CLIP.mask, CLIP.sentinels, len(CLIP)) == (None, None, (), 49408)
    row = OPEN_CLIP(["A diagram, &amp; a cat's  toy"])[0].tolist()
    ids = [CLIP.bos, *CLIP.encode("A diagram, &amp; a cat's  toy"), CLIP.emb]
    assert row == [*ids, *[CLIP.pad] * (77 - len(ids))]
    assert CLIP.decode(ids).split() == ["a", "diagram", ",", "&", "a", "cat", "'s", "toy"]
    assert CLIP.decode(CLIP.encode("naïve Ünïcode")).strip() == "naïve ünïcode"


def test_open_clips_in_workers_and_paths() -> None:
    copy = pickle.loads(pickle.dumps(CLIP))
    assert copy.fingerprint == CLIP.fingerprint != TRAINED.fingerprint
    assert Tokenizer.load(Path("open_clip:ViT-B-32")).encode("a cat") == copy.encode("a cat") == [320, 2368]
    assert Tokenizer.load("open_clip:ViT-L-14").fingerprint == CLIP.fingerprint  # whose ids are the same


def test_a_long_word_takes_little_time() -> None:
    """open_clip's own takes the square of its length, minutes here."""
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=200_000))
    assert len(CLIP.encode(letters)) > 50_000


@pytest.mark.parametrize(
    "name, mistake",
    [
        ("ViT-B-33", "open_clip knows no such model; near it: ViT-B-32"),
        ("ViT-B-16-SigLIP", "that model's tokenizer is not CLIP's"),
        ("roberta-ViT-B-32", "that model's tokenizer is not CLIP's"),
    ],
)
def test_other_models_of_open_clip_are_refused(name: str, mistake: str) -> None:
    with pytest.raises(UserError, match=f"open_clip:{name}: {mistake}"):
        Tokenizer.load(f"open_clip:{name}")


@pytest.mark.parametrize("which, role", [("open_clip", "media"), ("bert", "emb")])
def test_media_without_their_tokens_are_refused(which: str, role: str, bert: Path, tiny_config: RunConfig) -> None:
    tree = tiny_config.model_dump()
    tree["model"]["vocabulary"] = 49408
    tree["data"]["tokenizer"] = "open_clip:ViT-B-32" if which == "open_clip" else str(bert)
    if which == "bert":
        tree["data"]["special_tokens"] = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]"}
    with pytest.raises(UserError, match=f"has no token {role}, and source tiny has media; name one of its tokens as data"):
        Loader(parse(tree, "tiny"), 0, 1)


def test_names_beside_open_clips_are_refused() -> None:
    with pytest.raises(UserError, match="those of open_clip:ViT-B-32 are known; leave the section out"):
        Tokenizer.load("open_clip:ViT-B-32", BERT)


def test_a_tokenizer_whose_specials_can_be_typed_is_refused(saved: Path) -> None:
    added = json.loads(saved.read_text())["added_tokens"]
    change(saved, added_tokens=[{**token, "special": token["content"] != "<emb>"} for token in added])
    with pytest.raises(UserError, match="the text '<emb>' becomes the token"):
        Tokenizer.load(saved)

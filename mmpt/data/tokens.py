"""Text to token ids: Hugging Face's tokenizers, and open_clip's for CLIP.

tokenizer.json and the names of its special tokens, or open_clip:NAME --Tokenizer.load--> Tokenizer --encode--> ids
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmpt.config import DataConfig, SpecialTokensConfig
from mmpt.types import UserError

NAMES = SpecialTokensConfig()
"""Of the special tokens, where nothing else is said."""

ROLES = ("pad", "bos", "eos", "media", "emb", "mask")  # of single tokens, besides which there are the sentinels
NEEDED = ("pad", "bos", "eos")
SPECIALS = (NAMES.pad, NAMES.bos, NAMES.eos, NAMES.media, NAMES.emb)
OPEN_CLIP = "open_clip:"


class Tokenizer:
    """Text <-> token ids. No text, whatever it spells, becomes one of the special tokens.

    `media`, `emb` and `mask` are None where the tokenizer has no such token, and `sentinels` may be empty.
    """

    pad: int
    bos: int
    eos: int
    media: int | None
    emb: int | None
    mask: int | None
    sentinels: tuple[int, ...]

    def __init__(self, inner: tokenizers.Tokenizer, names: SpecialTokensConfig = NAMES) -> None:
        """`inner` must have the tokens that `names` calls NEEDED."""
        inner.encode_special_tokens = True  # "<emb>" typed by a person is five characters, not the token
        # A file may carry settings of its last user; here every token of a text counts, and packs are padded elsewhere.
        inner.no_truncation()
        inner.no_padding()
        self.inner, self.names = inner, names
        for role in ROLES:
            setattr(self, role, inner.token_to_id(getattr(names, role)))
        self.sentinels = tuple(_sentinels(inner, names.sentinel))

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int, *, mask: bool = False, sentinels: int = 0) -> Tokenizer:
        """Learn merges of bytes on `texts`, up to `vocabulary` tokens, the specials and the 256 bytes among them.

        `mask` and `sentinels` ask for the tokens of the tasks masked and span. The order of the texts does not matter.
        Raises ValueError for a vocabulary too small for specials and bytes.
        """
        specials = [*SPECIALS, *[NAMES.mask] * mask, *(NAMES.sentinel.replace("{}", str(number)) for number in range(sentinels))]
        if vocabulary < 256 + len(specials):
            raise ValueError(
                f"vocabulary = {vocabulary}: {256 + len(specials)} or more are wanted, for 256 bytes and {len(specials)} specials"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(sorted(texts), trainer)
        return cls(inner)

    @classmethod
    def of(cls, data: DataConfig) -> Tokenizer:
        """A run's. Raises UserError as `load` does."""
        return cls.load(data.tokenizer, data.special_tokens)

    @classmethod
    def load(cls, name: str | Path, special_tokens: SpecialTokensConfig = NAMES) -> Tokenizer:
        """Read a tokenizer.json in which `special_tokens` are spelled so, or take that of a model: open_clip:NAME.

        Raises UserError for a missing file, another format, missing special tokens, and a model that has another kind.
        """
        if str(name).startswith(OPEN_CLIP):
            if special_tokens != NAMES:
                raise UserError(f"data.special_tokens: those of {name} are known; leave the section out")
            return OpenClipTokenizer.of_model(str(name).removeprefix(OPEN_CLIP))
        path = Path(name)
        if not path.is_file():
            raise UserError(f"tokenizer {path}: no such file; `mmpt data build` writes tokenizer.json beside the shards")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"tokenizer {path}: not a tokenizer.json of Hugging Face tokenizers ({error})") from error
        missing = [
            f"{role} {getattr(special_tokens, role)}"
            for role in NEEDED
            if inner.token_to_id(getattr(special_tokens, role)) is None
        ]
        if missing:
            raise UserError(
                f"tokenizer {path}: lacks the special tokens {', '.join(missing)}; name its own under data.special_tokens"
            )
        loaded = cls(inner, special_tokens)
        taken = [name for number, name in loaded.special.items() if number in loaded.encode(name)]
        if taken:
            raise UserError(
                f"tokenizer {path}: the text {taken[0]!r} becomes the token of that name; "
                f"set special: true for it under added_tokens"
            )
        return loaded

    def save(self, path: str | Path) -> None:
        self.inner.save(str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added to it."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def __len__(self) -> int:
        """Rows that an embedding needs: one more than the largest id, as ids may have gaps."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special(self) -> dict[int, str]:
        """How the special tokens that a segment may hold are spelled."""
        found = {getattr(self, role): getattr(self.names, role) for role in ROLES if role != "pad"}
        found |= {number: self.names.sentinel.replace("{}", str(i)) for i, number in enumerate(self.sentinels)}
        return {number: name for number, name in found.items() if number is not None}

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that ids depend on."""
        numbers = [getattr(self, role) for role in ROLES], self.sentinels
        return hashlib.blake2b(f"{self.inner.to_str()} {numbers}".encode(), digest_size=8).hexdigest()

    def __reduce__(self):
        """Worker processes get the JSON: the library's own pickle drops the setting above."""
        return _from_json, (self.inner.to_str(), self.names)


def _from_json(text: str, names: SpecialTokensConfig) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text), names)


def _sentinels(inner: tokenizers.Tokenizer, name: str) -> Iterable[int]:
    """The ids of sentinels 0, 1, 2, ... as far as there are any. Raises UserError for a name that has no place for a number."""
    if "{}" not in name:
        raise UserError(f"data.special_tokens.sentinel = {name!r}: {{}} must stand where the numbers 0, 1, 2, ... do")
    number = 0
    while (found := inner.token_to_id(name.replace("{}", str(number)))) is not None:
        yield found
        number += 1


class OpenClipTokenizer(Tokenizer):
    """The byte-pair encoding of CLIP: ids are those of `open_clip.get_tokenizer(NAME).encode`, for every text.

    Cleaning and the pattern of words are open_clip's; its merges are applied by Hugging Face's tokenizers, whose memory is
    bounded and whose time grows no faster than a word. <bos> is open_clip's start of text; its end of text is both <eos> and
    <emb>, as CLIP pools there. There is no token for media: CLIP has none in its texts. Typed out, `<end_of_text>` becomes
    the token, as in open_clip.
    """

    def __init__(self, model: str, origin: object) -> None:
        """`origin`: open_clip's SimpleTokenizer of that model."""
        merges = sorted(origin.bpe_ranks, key=origin.bpe_ranks.get)
        inner = tokenizers.Tokenizer(models.BPE(vocab=origin.encoder, merges=merges, end_of_word_suffix="</w>"))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])
        inner.add_special_tokens([origin.decoder[number] for number in origin.all_special_ids])
        bos, eos = (origin.decoder[number] for number in (origin.sot_token_id, origin.eot_token_id))
        super().__init__(inner, SpecialTokensConfig(pad="!", bos=bos, eos=eos, emb=eos))
        inner.encode_special_tokens = False
        self.model, self.clean, self.words = model, origin.clean_fn, origin.pat.findall

    @classmethod
    def of_model(cls, name: str) -> OpenClipTokenizer:
        """Raises UserError for an unknown model, and one whose tokenizer is of another kind."""
        import open_clip  # takes seconds, and other runs do without
        from open_clip.tokenizer import SimpleTokenizer

        known = open_clip.list_models()
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5)) or "ViT-B-32, ViT-L-14"
            raise UserError(f"data.tokenizer = {OPEN_CLIP}{name}: open_clip knows no such model; near it: {near}")
        is_other = "hf_tokenizer_name" in open_clip.get_model_config(name)["text_cfg"]  # making it would fetch files
        origin = None if is_other else open_clip.get_tokenizer(name)
        if type(origin) is not SimpleTokenizer:
            raise UserError(f"data.tokenizer = {OPEN_CLIP}{name}: that model's tokenizer is not CLIP's; give its tokenizer.json")
        return cls(name, origin)

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(self.words(self.clean(text)), is_pretokenized=True, add_special_tokens=False).ids

    @cached_property
    def fingerprint(self) -> str:
        name = f"{super().fingerprint} {self.clean.__name__}"
        return hashlib.blake2b(name.encode(), digest_size=8).hexdigest()

    def __reduce__(self):
        return OpenClipTokenizer.of_model, (self.model,)

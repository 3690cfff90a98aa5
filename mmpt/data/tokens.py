"""Byte-level BPE: Hugging Face's tokenizers, with the five tokens that mean something to the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmpt.types import UserError

SPECIALS = ("<pad>", "<bos>", "<eos>", "<media>", "<emb>")
SMALLEST = 256 + len(SPECIALS)  # tokens


class Tokenizer:
    """Text <-> token ids. No text, whatever it spells, becomes one of the special tokens."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.encode_special_tokens = True  # "<emb>" typed by a person is five characters, not the token
        # A file may carry settings of its last user; here every token of a text counts, and packs are padded elsewhere.
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self.pad, self.bos, self.eos, self.media, self.emb = (inner.token_to_id(special) for special in SPECIALS)

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> Tokenizer:
        """Learn merges on `texts`, up to `vocabulary` tokens, the specials and the 256 bytes among them.

        The order of the texts does not matter. Raises ValueError for a vocabulary too small for specials and bytes.
        """
        if vocabulary < SMALLEST:
            raise ValueError(
                f"vocabulary = {vocabulary}: {SMALLEST} or more are wanted, for 256 bytes and {len(SPECIALS)} specials"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIALS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(sorted(texts), trainer)
        return cls(inner)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json. Raises UserError for a missing file, another format, or missing special tokens."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"tokenizer {path}: no such file; `mmpt data build` writes tokenizer.json beside the shards")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"tokenizer {path}: not a tokenizer.json of Hugging Face tokenizers ({error})") from error
        missing = [special for special in SPECIALS if inner.token_to_id(special) is None]
        if missing:
            raise UserError(
                f"tokenizer {path}: lacks the special token {', '.join(missing)}; mmpt's Tokenizer.train makes one with them"
            )
        loaded = cls(inner)
        taken = [special for special in SPECIALS if inner.token_to_id(special) in loaded.encode(special)]
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

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self.inner.to_str().encode(), digest_size=8).hexdigest()

    def __reduce__(self):
        """Worker processes get the JSON: the library's own pickle drops the setting above."""
        return _from_json, (self.inner.to_str(),)


def _from_json(text: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text))

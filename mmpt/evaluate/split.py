"""A split that a run is measured on, opened as the run reads it.

config, spec, split --HeldOut--> batches, documents by key; the level and the modality that are measured
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool

from mmpt.config import RunConfig
from mmpt.data.corpus import Corpus
from mmpt.data.loader import cache_of, refuse_faults, sequential_batches
from mmpt.data.spec import load_spec
from mmpt.data.tokens import Tokenizer
from mmpt.evaluate.embed import Level
from mmpt.types import AUDIO, IMAGE, MODALITIES, TEXT, VIDEO, Document, PackedBatch, UserError

ItemName = Literal["image", "audio", "video"]
MEDIA = (IMAGE, AUDIO, VIDEO)
WORDS: dict[ItemName, str] = {"image": "picture", "audio": "sound", "video": "clip"}
"""What people call them."""


class HeldOut:
    """A split of one spec, under a run's config. Raises UserError for data that is not there, or not fit to be read."""

    def __init__(self, config: RunConfig, spec: str | Path, split: str) -> None:
        self.config, self.spec, self.split = config, spec, split
        self.corpus = Corpus.open(load_spec(spec), split, cache_of(config.data))
        self.tokenizer = Tokenizer.of(config.data)

    def batches(self) -> Iterator[PackedBatch]:
        """Every document once, in order. Raises UserError for one that is faulty."""
        return refuse_faults(sequential_batches(self.corpus, self.tokenizer, self.config))

    def document(self, key: str) -> Document:
        return self.corpus.document(self._numbers[key])

    @cached_property
    def _numbers(self) -> dict[str, int]:
        numbers: dict[str, int] = {}
        for number in range(len(self.corpus)):
            key = self.corpus.key(number)
            if numbers.setdefault(key, number) != number:
                raise UserError(
                    f"spec {self.spec}, split {self.split!r}: two documents have the key {key!r}, so neither can be looked up; "
                    f"give each one of its own (`mmpt data validate` lists them)"
                )
        return numbers

    def level(self, wanted: Level | None) -> Level:
        """The level asked for, or the model's first. Raises UserError for one that the model does not have."""
        levels = self.config.model.levels
        if wanted and wanted not in levels:
            raise UserError(f"--level {wanted}: the model has {' and '.join(levels) or 'none'} (model.levels)")
        if not levels:
            raise UserError("model.levels is empty: the model makes no embeddings")
        return wanted or levels[0]

    def item(self, wanted: ItemName | None) -> int:
        """The modality asked for, or the one that the split has beside texts and the model reads.

        Raises UserError where there is none, or several.
        """
        found = [MODALITIES[kind] for kind in self._read_media if self._documents_with(kind).any()]
        has = f"spec {self.spec}, split {self.split!r}, has {' and '.join(found) or 'nothing'} that the model reads beside texts"
        if wanted and wanted not in found:
            raise UserError(f"--item {wanted}: {has}")
        if len(found) != 1 and not wanted:
            raise UserError(f"{has}: " + ("name one of them with --item" if found else "there are no items"))
        return MODALITIES.index(wanted or found[0])

    def paired_items(self) -> list[int]:
        """The modalities that the model reads and of which any document has an item beside a text."""
        return [kind for kind in self._read_media if self.pairs(kind)]

    def pairs(self, kind: int) -> int:
        """How many documents have an item of a modality beside a text."""
        return int((self._documents_with(kind) & self._documents_with(TEXT)).sum())

    @property
    def _read_media(self) -> list[int]:
        return [kind for kind in MEDIA if getattr(self.config.model, MODALITIES[kind]) is not None]

    @property
    def predicts(self) -> bool:
        """Whether any text is to be predicted."""
        return bool((self.corpus.parts["predict"] & (self.corpus.parts["kind"] == TEXT)).any())

    def _documents_with(self, kind: int) -> Bool[np.ndarray, " documents"]:
        parts = np.concatenate([[0], np.cumsum(self.corpus.parts["kind"] == kind)])
        return np.diff(parts[self.corpus.first_part]) > 0
